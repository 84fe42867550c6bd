"""Stops `sparsight extract` by signals at random moments, and prints what each left.

Run as a program, with the folders of a model, of photos and of the stores, the number of stops, the
signal and the number of workers: imports are paid once, and each extraction is a fork of its own.
The last line that it prints is JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from activation_parts import BLOCK_0, BLOCK_1, digests
from sparsight.cli import main as sparsight


def arguments(model: str, photos: str, out: Path, workers: str) -> list[str]:
    flags = {"--model": model, "--images": photos, "--out": str(out), "--workers": workers}
    flags |= {"--batch-size": "3", "--max-failed": "0.1"}
    return ["extract", "--sites", BLOCK_0, BLOCK_1, *(x for pair in flags.items() for x in pair)]


def start(given: list[str], told: Path) -> int:
    """Run the command in a fork with a process group of its own, as a shell does."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = sparsight(given)
        sys.stderr.flush()
    finally:
        os._exit(code)


def on_disk(out: Path) -> int:
    manifest = out / "manifest.json"
    shards = json.loads(manifest.read_text())["shards"] if manifest.exists() else []
    return shards[-1]["stop"] if shards else 0


def group_is_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def main(model: str, photos: str, folder: str, n_stops: str, name: str, workers: str) -> None:
    torch.set_num_threads(1)  # so that forks inherit no threads
    whole, out, told = Path(folder) / "whole", Path(folder) / "cut", Path(folder) / "told.txt"
    sparsight(arguments(model, photos, whole, "0"))  # here: forks start warm
    expected = digests(whole)
    rng, bytes_differ = random.Random(0), 0
    stops: list[dict[str, Any]] = []
    began = time.monotonic()
    os.waitpid(start(arguments(model, photos, out, workers), told), 0)
    seconds = time.monotonic() - began
    while len(stops) < int(n_stops):
        if (out / "images.parquet").exists():  # it is complete, or nearly
            os.waitpid(start(arguments(model, photos, out, workers), told), 0)
            bytes_differ += digests(out) != expected
            shutil.rmtree(out)
        child = start(arguments(model, photos, out, workers), told)
        time.sleep(rng.uniform(0, seconds))
        began = time.monotonic()
        with suppress(ProcessLookupError):  # it has finished, or has no group yet
            os.killpg(child, getattr(signal, name))
        _, ended = os.waitpid(child, 0)
        stops.append(
            {
                "code": os.waitstatus_to_exitcode(ended),
                "seconds": time.monotonic() - began,
                "told": told.read_text(),
                "on_disk": on_disk(out),
                "workers_are_gone": group_is_gone(child, 1),
            }
        )
    os.waitpid(start(arguments(model, photos, out, workers), told), 0)
    bytes_differ += digests(out) != expected
    print(json.dumps({"stops": stops, "bytes_differ": bytes_differ, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
