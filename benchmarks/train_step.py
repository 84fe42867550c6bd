"""One training step: ours compared with the peers', in their PyPI releases.

    make bench-peers                                   # installs the peers, runs this at shape S
    python benchmarks/train_step.py [--shape M] [--peers sparsify saev] [--ours torch native]

Each contender has a process, and all stay in memory; rounds go A B C, C B A. A time is the median
of the rounds' medians, with the least and the most. Peak memory is that of the process, including
everything that the package imports. FVU is that of the first batch after the same number of steps;
peers initialise and step in their own ways, so theirs only shows that they train. Ours must agree
with each other.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ours
import peers
import tyro
from contenders import SHAPES, Result, Task, check_memory, race
from data import Data, save_batches
from tables import RESULTS, cores, keep

from sparsight.files import write_text

PEERS = Path(__file__).parent.parent / ".venv" / "peers"
OPEN_CLIP = PEERS.with_name("open_clip")
CPU_KERNELS = ("dense", "torch", "native")
SPARSE = ("sparsify", "sparsify-as-shipped", "sparsight-torch", "sparsight-native")
"""Contenders that hold few tensors of `[batch, n_latents]`."""

AGREE = 1e-5
"""Largest relative difference between the FVU of our own contenders."""


@dataclass(frozen=True)
class Options:
    """Time a training step of ours and of the peers."""

    shape: Literal["XS", "S", "M", "L"] = "S"
    """Size of batch and SAE; XS is for a quick trial."""

    peers: tuple[str, ...] = tuple(peers.CONTENDERS)
    """Names of peers, or "none"."""

    ours: tuple[str, ...] = CPU_KERNELS
    """Our kernels, or "none"."""

    dead: float = 0.0
    """Share of the latents that are dead in every step; above 0, AuxK is on, with k = d / 2."""

    data: Data = "mixture"
    """A synthetic mixture, or activations of the calibration CLIP."""

    precision: Literal["auto", "float32", "bfloat16", "int8", "float8"] = "auto"
    """Precision of our selection."""

    rounds: int = 5
    """How many times each contender is asked."""

    steps: int = 4
    """Steps per round."""

    device: str = "cpu"
    """Device on which all train."""

    peers_folder: Path = PEERS
    """Where the peers are installed."""

    json: Path | None = None
    """File for the rows."""

    out: Path = RESULTS
    """File for the table, which replaces one of the same title."""


def main(options: Options) -> None:
    shape = SHAPES[options.shape]
    contenders = chosen(options.ours, options.peers)
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            shape=shape,
            data=save_batches(options.data, shape, Path(folder)),
            dead=options.dead,
            precision=options.precision,
            device=options.device,
            threads=cores(),
        )
        names = [name for name, _ in contenders]
        check_memory(task, names, [name for name in names if name not in SPARSE])
        results = race(
            contenders,
            task,
            "step",
            rounds=options.rounds,
            calls=options.steps,
            path=options.peers_folder.absolute(),
        )
    rows = finished(results)
    agree(rows)
    if options.json is not None:
        write_text(options.json, json.dumps({"rows": rows}, indent=1) + "\n")
    title = f"Training step, {options.shape}: {shape}, {options.data}"
    if options.dead:
        title += f", {options.dead:.0%} dead (AuxK)"
    if options.precision != "auto":
        title += f", ours selects in {options.precision}"
    if options.device != "cpu":
        title += f", {options.device}"
    table = [line(row, f"FVU after {2 + options.rounds * options.steps}") for row in rows]
    keep(title, table, options.out, versions(options.peers, options.peers_folder))


def chosen(kernels: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """Return name and module of each contender.

    Raises:
        SystemExit: one of them is unknown.
    """
    found = [(f"sparsight-{name}", "ours") for name in kernels if name != "none"]
    found += [(name, "peers") for name in names if name != "none"]
    known = [*ours.CONTENDERS, *peers.CONTENDERS]
    for name, _ in found:
        if name not in known:
            raise SystemExit(f"No contender is called {name!r}; there are: {', '.join(known)}.")
    if not found:
        raise SystemExit("Nobody to measure: both --ours and --peers are none.")
    return found


def finished(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return rows with the time relative to the best peer."""
    rows = [result.row() for result in results]
    times = [row["ms"] for row in rows if row["name"] in peers.CONTENDERS and row["ms"]]
    for row in rows:
        row["of_best_peer"] = row["ms"] / min(times) if times and row["ms"] else None
    return rows


def agree(rows: Sequence[dict[str, Any]]) -> None:
    """Add a note to each row whose FVU differs from that of our first contender."""
    same = [row for row in rows if row["name"].startswith("sparsight-") and row["loss"] is not None]
    for row in same[1:]:
        difference = abs(row["loss"] / same[0]["loss"] - 1)
        if not difference <= AGREE:
            row["note"] = f"FVU differs from {same[0]['name']} by {difference:.1e} of it"


def line(row: dict[str, Any], fvu: str) -> dict[str, Any]:
    """Make a row of the table."""
    if "error" in row:
        columns = ("ms", "of the best peer", "peak GiB", fvu)
        note = row["error"].replace("|", "/").replace("\n", " ")
        return {"": row["name"], **dict.fromkeys(columns, "–"), "note": note}
    ratio = row["of_best_peer"]
    return {
        "": row["name"],
        "ms": f"{row['ms']:.1f} [{row['low']:.1f} … {row['high']:.1f}]",
        "of the best peer": "–" if ratio is None else f"{ratio:.2f}",
        "peak GiB": f"{row['peak_gib']:.2f}",
        fvu: f"{row['loss']:.5f}",
        "note": row["note"],
    }


def versions(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Return the installed version of each peer."""
    found = importlib.metadata.distributions(path=[str(folder)])
    installed = {each.metadata["Name"].lower().replace("_", "-"): each.version for each in found}
    wanted = peers.distributions([name for name in names if name != "none"])
    return {name: installed[name] for name in wanted if name in installed}


if __name__ == "__main__":
    main(tyro.cli(Options))
