"""Encoding: vectors per second from activation to the k strongest latents, ours and the peers'.

    python benchmarks/encode.py [--shape M] [--peers sparsify] [--ours torch native]

All have the same weights: encoder and decoder rows are the directions of the data.
The baseline is one line of torch. "Same latents" is the share of the baseline's latents that a
contender selects too, on 64 vectors. Method and memory are those of train_step.py.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peers
import tyro
from contenders import SHAPES, Task, check_memory, race
from data import save_batches, save_dictionary
from tables import RESULTS, cores, keep
from train_step import CPU_KERNELS, PEERS, SPARSE, chosen, finished, versions

from sparsight.files import write_text

BASELINE = "torch.topk"


@dataclass(frozen=True)
class Options:
    """Time encoding, ours and the peers'."""

    shape: Literal["XS", "S", "M", "L"] = "S"
    """Size of batch and SAE; XS is for a quick trial."""

    peers: tuple[str, ...] = tuple(
        name for name in peers.CONTENDERS if name != "sparsify-as-shipped"
    )
    """Names of peers, or "none"."""

    ours: tuple[str, ...] = CPU_KERNELS
    """Our kernels, or "none"."""

    rounds: int = 5
    """How many times each contender is asked."""

    calls: int = 4
    """Batches per round."""

    device: str = "cpu"
    """Device on which all encode."""

    peers_folder: Path = PEERS
    """Where the peers are installed."""

    json: Path | None = None
    """File for the rows."""

    out: Path = RESULTS
    """File for the table, which replaces one of the same title."""


def main(options: Options) -> None:
    shape = SHAPES[options.shape]
    contenders = [(BASELINE, "ours"), *chosen(options.ours, options.peers)]
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            shape=shape,
            data=save_batches("mixture", shape, Path(folder)),
            dictionary=save_dictionary(shape, Path(folder)),
            device=options.device,
            threads=cores(),
        )
        names = [name for name, _ in contenders]
        check_memory(task, names, [name for name in names if name not in SPARSE])
        results = race(
            contenders,
            task,
            "encode",
            rounds=options.rounds,
            calls=options.calls,
            path=options.peers_folder.absolute(),
        )
    rows = finished(results)
    compare(rows)
    for row in rows:
        row["vectors_per_second"] = 1000 * shape.batch_size / row["ms"] if row["ms"] else None
    if options.json is not None:
        write_text(options.json, json.dumps({"rows": rows}, indent=1) + "\n")
    title = f"Encoding, {options.shape}: {shape}"
    if options.device != "cpu":
        title += f", {options.device}"
    table = [line(row, rows[0]) for row in rows]
    keep(title, table, options.out, versions(options.peers, options.peers_folder))


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Replace the latents in each row by the share that the baseline selects too."""
    truth = rows[0].get("latents")
    for row in rows:
        latents = row.pop("latents", None)
        row["same_latents"] = None
        if truth and latents:
            pairs = list(zip(truth, latents, strict=True))
            shared = sum(len(set(a) & set(b)) for a, b in pairs)
            row["same_latents"] = shared / sum(len(a) for a, _ in pairs)


def line(row: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """Make a row of the table."""
    columns = ("vectors/s", "ms a batch", "of torch.topk", "peak GiB", "same latents")
    if "error" in row:
        note = row["error"].replace("|", "/").replace("\n", " ")
        return {"": row["name"], **dict.fromkeys(columns, "–"), "note": note}
    same = row["same_latents"]
    cells = (
        f"{row['vectors_per_second']:,.0f}",
        f"{row['ms']:.1f} [{row['low']:.1f} … {row['high']:.1f}]",
        f"{row['ms'] / baseline['ms']:.2f}" if baseline["ms"] else "–",
        f"{row['peak_gib']:.2f}",
        "–" if same is None else f"{100 * same:.1f} %",
    )
    return {"": row["name"], **dict(zip(columns, cells, strict=True)), "note": row["note"]}


if __name__ == "__main__":
    main(tyro.cli(Options))
