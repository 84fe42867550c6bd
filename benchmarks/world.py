"""How fast the calibration world is drawn, with its masks, on one core.

    python benchmarks/world.py [--n-scenes N] [--out FILE]

It measures processor time of one thread; every scene is new, glyphs are cached as usual.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tables import RESULTS, keep

from sparsight.calibration import CalibrationWorld, WorldConfig

WORLDS = {"as it is": WorldConfig(), "single symbols, nothing written": WorldConfig.single()}


@dataclass(frozen=True)
class Options:
    """Draw scenes; print the rate."""

    n_scenes: int = 4000
    """Scenes of each kind."""

    out: Path = RESULTS
    """File that keeps the table."""


def main(options: Options) -> None:
    rows = [
        {"scenes": name, "scenes/s of a core": round(rate(config, options.n_scenes))}
        for name, config in WORLDS.items()
    ]
    keep("Calibration world, scenes with masks", rows, options.out, name="world")


def rate(config: WorldConfig, n_scenes: int) -> float:
    """Return scenes per second of processor time."""
    world = CalibrationWorld(2 * n_scenes, 0, config)
    for index in range(n_scenes):
        world.render(index)
    before = time.process_time()
    for index in range(n_scenes, 2 * n_scenes):
        world.render(index)
    return n_scenes / (time.process_time() - before)


if __name__ == "__main__":
    main(tyro.cli(Options))
