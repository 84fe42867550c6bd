"""Runs extractions that are cut off at chosen points, and prints what the stores then hold.

Run as a program, with the folders of a model, of photos and of the stores: imports are paid once,
and each extraction is a fork that dies on its own. Prints JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from activation_parts import BLOCK_0, BLOCK_1, digests
from sparsight.activations import extract
from sparsight.images import open_images
from sparsight.vision import load_model

SETTINGS: dict[str, Any] = {
    "sites": [BLOCK_0, BLOCK_1],
    "batch_size": 3,
    "shard_images": 6,
    "max_failed": 0.1,
    "quiet": True,
}


def die_at_rename(number: int, after: bool) -> None:
    """SIGKILL at the nth file that is renamed into place: just before, or just after."""
    seen = 0
    over = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen, over
        if over and event != "os.kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.rename":
            seen += 1
            if seen == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            over = seen == number

    sys.addaudithook(hook)


def die_in_file(number: int, n_bytes: int) -> None:
    """The system ends this process `n_bytes` into the nth temporary file that it writes."""
    seen = 0
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "tempfile.mkstemp":
            seen += 1
            if seen == number:
                resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    sys.addaudithook(hook)


def main(model_folder: str, photos: str, out: str) -> None:
    torch.set_num_threads(1)  # so that forks inherit no threads
    model = load_model(model_folder, device="cpu")
    images = open_images(photos)

    def run(folder: Path, *, cut: Any = None, workers: int = 0) -> int:
        """The signal that ended a fork's extraction, 0 if none did."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if cut is not None:
                    cut[0](*cut[1:])
                extract(model, images, out=folder, workers=workers, **SETTINGS)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        if os.WIFEXITED(ended) and os.WEXITSTATUS(ended):
            raise SystemExit(f"{folder}: the extraction failed")
        return os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else 0

    found: dict[str, Any] = {}
    extract(model, images, out=Path(out) / "whole", workers=0, **SETTINGS)  # here: forks start warm
    found["whole"] = {"signals": [], "files": digests(Path(out) / "whole")}

    def compare(name: str, cuts: list[Any], workers: int = 0) -> bool:
        folder = Path(out) / name
        signals = [run(folder, cut=cut, workers=workers) for cut in cuts]
        run(folder, workers=workers)
        found[name] = {"signals": signals, "files": digests(folder)}
        return all(signals)

    number = 0
    while True:
        number += 1
        alive = not compare(f"before {number}", [(die_at_rename, number, False)])
        if number % 5 == 1:  # a manifest, with every file of a shard before it
            compare(f"after {number}", [(die_at_rename, number, True)])
        if alive:
            break
    for number in (2, 3, 7):
        for n_bytes in (1, 1000):
            compare(f"file {number} byte {n_bytes}", [(die_in_file, number, n_bytes)])
    compare("again and again", [(die_at_rename, 6, False)] * 3)
    compare("with workers", [(die_at_rename, 7, False)], workers=2)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
