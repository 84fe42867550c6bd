"""How our training step scales with the SAE and with the batch: time and peak memory.

    python benchmarks/scaling.py [--ours torch native] [--largest-latents 65536]

Latents 2¹³ … 2¹⁸ at a batch of 2,048, and batches of 256 … 16,384 at 24,576 latents; d 768, k 32.
Every point runs in a separate process, one at a time. Writes docs/plots/scaling.json, and .svg; a
point that failed is left out of the plot, and the file says why.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from contenders import Result, Shape, Task, race
from data import save_batches
from matplotlib.figure import Figure
from tables import cores, machine

from sparsight.files import atomic_path, write_text

PLOTS = Path(__file__).parents[1] / "docs" / "plots"
D_IN, BATCH, LATENTS = 768, 2048, 24576
SWEEPS = {
    "n_latents": tuple(2**power for power in range(13, 19)),
    "batch_size": tuple(2**power for power in range(8, 15)),
}
LABELS = {"n_latents": "latents", "batch_size": "vectors a batch"}
MARKS = {"dense": "s", "torch": "o", "native": "^", "triton": "D"}


@dataclass(frozen=True)
class Options:
    """Time our training step over widths and batch sizes."""

    ours: tuple[str, ...] = ("torch", "native")
    """Our kernels."""

    largest_latents: int = 2**18
    """Leave out wider SAEs."""

    largest_batch: int = 2**14
    """Leave out larger batches."""

    rounds: int = 3
    """Rounds per point."""

    steps: int = 3
    """Steps per round."""

    precision: Literal["auto", "float32", "bfloat16", "int8", "float8"] = "auto"
    """Precision of the selection."""

    device: str = "cpu"
    """Where to train."""

    out: Path = PLOTS
    """Folder of the figures and the plot."""


def main(options: Options) -> None:
    rows: list[dict[str, Any]] = []
    for swept, shape in points(options):
        with tempfile.TemporaryDirectory() as folder:
            task = Task(
                shape=shape,
                data=save_batches("mixture", shape, Path(folder)),
                precision=options.precision,
                device=options.device,
                threads=cores(),
            )
            for kernels in options.ours:
                result: Result = race(
                    [(f"sparsight-{kernels}", "ours")],
                    task,
                    "step",
                    rounds=options.rounds,
                    calls=options.steps,
                )[0]
                point = {"swept": swept, "kernels": kernels, swept: getattr(shape, swept)}
                rows.append(point | result.row())
                print(rows[-1], flush=True)
    text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
    write_text(options.out / "scaling.json", text + "\n")
    with atomic_path(options.out / "scaling.svg") as path:
        draw(rows).savefig(path, format="svg", metadata={"Date": None})


def points(options: Options) -> Iterator[tuple[str, Shape]]:
    """Yield the name of the varied size, and the shape."""
    for n_latents in SWEEPS["n_latents"]:
        if n_latents <= options.largest_latents:
            yield "n_latents", Shape(D_IN, n_latents, BATCH)
    for batch_size in SWEEPS["batch_size"]:
        if batch_size <= options.largest_batch:
            yield "batch_size", Shape(D_IN, LATENTS, batch_size)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Plot time above and memory below; the SAE's width on the left, the batch on the right."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, swept in enumerate(SWEEPS):
        for kernels in dict.fromkeys(row["kernels"] for row in rows):
            mine = [
                row
                for row in rows
                if row["swept"] == swept and row["kernels"] == kernels and row["ms"] is not None
            ]
            where = [row[swept] for row in mine]
            style = {"marker": MARKS[kernels], "label": kernels, "linewidth": 1.5}
            axes[0, column].plot(where, [row["ms"] for row in mine], **style)
            low, high = ([row[end] for row in mine] for end in ("low", "high"))
            axes[0, column].fill_between(where, low, high, alpha=0.2)
            axes[1, column].plot(where, [row["peak_gib"] for row in mine], **style)
        fixed = f"batch {BATCH:,}" if swept == "n_latents" else f"{LATENTS:,} latents"
        axes[0, column].set_title(f"d {D_IN}, k 32, {fixed}", fontsize=10)
        axes[1, column].set_xlabel(LABELS[swept])
        axes[1, column].set_xscale("log", base=2)
    axes[0, 0].set_ylabel("ms a step")
    axes[1, 0].set_ylabel("peak memory, GiB")
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Options))
