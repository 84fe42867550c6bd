"""Train as `test_resume.py` does, and be killed (SIGKILL) on the way: OUT, and where.

With "sweep" behind these it trains as `test_sweep.py` does.

With "waits in a step" it first says so, and waits until its input ends.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from test_resume import CONFIG, SITES

from memory_activations import sparse_mixtures
from sparsight import files
from sparsight.runs import checkpoint_files
from sparsight.training import train, trainer


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(out: str, where: str, what: str = "train") -> None:
    if where in ("in a step", "waits in a step"):
        step = trainer.SiteTraining.step

        def step_or_die(self, x, number, factor, target) -> None:
            if number == 21:
                if where == "waits in a step":
                    print("waits", flush=True)
                    sys.stdin.read()
                die()
            step(self, x, number, factor, target)

        trainer.SiteTraining.step = step_or_die
    elif where == "in a checkpoint":
        write_json = files.write_json

        def write_or_die(path, value) -> None:
            if path.name == "state.json" and value["step"] == 16:
                die()
            write_json(path, value)

        checkpoint_files.write_json = write_or_die
    elif where == "while it finishes":
        trainer.Loop._finish = die
    torch.set_num_threads(1)
    if what == "sweep":
        from test_sweep import _sweep

        _sweep(Path(out))
    else:
        train(sparse_mixtures(SITES), CONFIG, out=out, quiet=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
