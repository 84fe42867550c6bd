"""Stop real command-line runs at random moments, and continue them: WHAT N SEED FOLDER.

`train`: N runs get SIGINT and N get SIGTERM. `sweep` and `finetune`: N processes get SIGKILL. Each
command is then repeated until it succeeds. In the end the result has the bits of a run that nothing
stopped, and the folder holds the same files. What differs is an `AssertionError`.

Every command runs in a fork of this process, which has already imported the modules.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

import sparsight.cli.extract
import sparsight.cli.finetune
import sparsight.cli.main
import sparsight.cli.sweep
import sparsight.cli.train  # noqa: F401
from sparsight.finetuning import FinetuneRun
from sparsight.runs import checkpoint_files
from sparsight.training import Run, checkpoint

BATCH, N_VECTORS = 32, 32 * 300
SITES = ("blocks.1.resid_post", "blocks.2.resid_post")
SMALL = [
    "--batch-size", str(BATCH), "--n-vectors", str(N_VECTORS), "--sae.n-latents", "64",
    "--ema", "0.9", "--remedy.dead-after", "96", "--lr", "1e-3", "--device", "cpu",
    "--checkpoint-seconds", "0.3",
]  # fmt: skip
WALL_CLOCK = {"vectors_per_second", "seconds_per_step"}
HELD = {signal.SIGINT, signal.SIGTERM}
PATIENCE = 60.0
KEPT = re.compile(r"Kept ([\d,]+) of ([\d,]+) (vectors|steps); the same command goes on\.")


@dataclass
class Ended:
    """How a command ended, what it printed, and how long it took."""

    code: int
    told: str
    seconds: float
    seconds_after_signal: float


def run(arguments: list[str], log: Path, number: int | None = None, after: float = 0.0) -> Ended:
    """Run a command in a fork; send it a signal after `after` seconds if it still runs."""
    begun = time.monotonic()
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    pid = os.fork()
    if pid == 0:
        _be(arguments, log)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    sent = None
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        now = time.monotonic()
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return Ended(code, log.read_text(), now - begun, now - (sent or now))
        if number is not None and sent is None and now - begun >= after:
            os.kill(pid, number)
            sent = now
        if now - begun > PATIENCE:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"{arguments[0]} does not end: {log.read_text()}")
        time.sleep(0.002)


def _be(arguments: list[str], log: Path) -> None:
    """Become the command, in the fork; signals arrive once its handlers are installed."""
    code = 1
    try:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        command = sys.modules["sparsight.cli.main"]
        within = command.run

        def heard(verb: str, rest: list[str]) -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
            within(verb, rest)

        command.run = heard
        code = command.main(arguments)
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        threading._shutdown()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


def files(folder: Path) -> list[str]:
    """Return everything in a folder, except for which checkpoints exist."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return [name for name in found if "checkpoints/" not in name]


def told(path: Path) -> list[dict]:
    """Return a log without measured times."""
    lines = map(json.loads, path.read_text().splitlines())
    return [{key: x for key, x in line.items() if key not in WALL_CLOCK} for line in lines]


def assert_same(found: Path, wanted: Path) -> None:
    """Check that files, weights and logs are the same."""
    assert files(found) == files(wanted), (files(found), files(wanted))
    for path in wanted.rglob("*"):
        inside = path.relative_to(wanted)
        if "checkpoints" in inside.parts:
            continue
        if path.suffix == ".safetensors" or path.name == "config.json":
            assert (found / inside).read_bytes() == path.read_bytes(), inside
        elif path.name == "metrics.jsonl":
            assert told(found / inside) == told(path), inside


def assert_tidy(folder: Path) -> None:
    """Check that there are no temporary files, folders or locks."""
    left = [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".lock"))]
    assert not left, left


def stop_training(store: Path, folder: Path, n: int, rng: random.Random) -> None:
    """Send Ctrl-C and SIGTERM at random moments of `train`, until all runs are finished."""
    arguments = ["train", "--store", str(store), *SMALL]
    whole = folder / "whole"
    first = run([*arguments, "--out", str(whole)], folder / "log")
    assert first.code == 0, first.told
    left = [signal.SIGINT, signal.SIGTERM] * n
    rng.shuffle(left)
    number, slowest = 0, 0.0
    while left:
        out = folder / f"run{number}"
        number += 1
        kept = 0
        while not Run(out, SITES).is_finished(SITES[1]):
            sent = left.pop() if left else None
            after = rng.uniform(0.0, first.seconds)
            ended = run([*arguments, "--out", str(out)], folder / "log", sent, after)
            if ended.code != 0:
                kept = _kept(ended, sent, out, kept)
                slowest = max(slowest, ended.seconds_after_signal)
        assert run([*arguments, "--out", str(out)], folder / "log").code == 0
        assert_same(out, whole)
        shutil.rmtree(out)
    print(f"train: {2 * n} signals in {number} runs; the slowest stop took {slowest:.2f} s")


def _kept(ended: Ended, sent: signal.Signals | None, out: Path, before: int) -> int:
    """Return how many vectors a stopped run kept: as many as it says, and no fewer than before."""
    assert ended.code == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(sent), ended
    assert "Traceback" not in ended.told, ended.told
    run = Run(out, SITES)
    if "Training was finished" in ended.told:
        assert run.is_finished(SITES[1])
        return before
    step = checkpoint.newest_step(run.checkpoints)
    found, problems = checkpoint.load_latest(run.checkpoints, SITES)
    assert not problems and step == (found.step if found else 0)
    said = KEPT.search(ended.told)
    if said is None:  # while the store was opened, or the run was begun
        assert re.search(r"Run the same command again|Nothing is kept yet", ended.told), ended.told
        assert step * BATCH == before
    else:
        assert int(said[1].replace(",", "")) == step * BATCH, (ended.told, step)
        assert int(said[2].replace(",", "")) == N_VECTORS
    assert step * BATCH >= before
    assert_tidy(out) if out.exists() else None
    return step * BATCH


def kill(what: str, arguments: list[str], folder: Path, n: int, rng: random.Random) -> None:
    """Send SIGKILL at random moments; in between, check that everything there is intact."""
    whole = folder / "whole"
    first = run([*arguments, "--out", str(whole)], folder / "log")
    assert first.code == 0, first.told
    number = 0
    while n > 0:
        out = folder / f"run{number}"
        number += 1
        for _ in range(20):
            sent = signal.SIGKILL if n > 0 else None
            ended = run(
                [*arguments, "--out", str(out)], folder / "log", sent, rng.uniform(0, first.seconds)
            )
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, ended
            n -= 1
            assert_whole(out)
        assert ended.code == 0, ended
        again = run([*arguments, "--out", str(out)], folder / "log")
        assert again.code == 0, again.told
        assert_tidy(out)
        assert_same(out, whole)
        shutil.rmtree(out)
    print(f"{what}: killed until {number} runs were finished")


def assert_whole(out: Path) -> None:
    """Check that every SAE, model and checkpoint under its own name can be read."""
    for path in out.rglob("sae.safetensors"):
        if not any(part.endswith(".tmp") for part in path.parts):
            Run(path.parent, ("any",)).sae()
    if (out / "model").is_dir():
        FinetuneRun(out).model("cpu")
    for path in checkpoint_files.found(out / "checkpoints"):
        if (path / checkpoint_files.STATE).exists():  # else it was being removed
            checkpoint_files.read_state(path)


def start(what: str, n: str, seed: str, folder: str) -> None:
    """Create the store, stop the runs."""
    torch.set_num_threads(1)
    place, rng = Path(folder), random.Random(int(seed))
    store = place / "store"
    made = run(
        ["extract", "--model", "calibration", "--images", "calibration:24", "--sites", *SITES,
         "--out", str(store), "--workers", "0", "--device", "cpu"],
        place / "log",
    )  # fmt: skip
    assert made.code == 0, made.told
    if what == "train":
        stop_training(store, place, int(n), rng)
    elif what == "sweep":
        sweep = ["sweep", "--store", str(store), *SMALL, "--vary", "k=4,8", "--no-verify",
                 "--accuracy-images", "0"]  # fmt: skip
        kill("sweep", sweep, place, int(n), rng)
    else:
        tune = ["finetune", "calibration", "--data", "calibration:24:71", "--steps", "6",
                "--batch-size", "4", "--workers", "0", "--no-report", "--no-latents", "--device",
                "cpu", "--checkpoint-seconds", "0.3"]  # fmt: skip
        kill("finetune", tune, place, int(n), rng)


if __name__ == "__main__":
    start(*sys.argv[1:])
