"""What verbs print when they are done: notes, and tables of scores beside their baselines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsight.latents.scores import (
    BASELINES,
    cls_warning,
    dig,
    figure,
    measured_on,
    percent,
    truth_by_kind,
)

WIDTH = 120
PERCENTAGES = ("dead", "zero_shot.reconstructed.top1", "zero_shot.original.top1")
HEADLINES = {
    "FVU": "fvu",
    "FVU of CLS": "fvu_cls",
    "FVU of patches": "fvu_patches",
    "L0": "l0",
    "dead": "dead",
    "zero-shot, original": "zero_shot.original.top1",
    "zero-shot, reconstructed": "zero_shot.reconstructed.top1",
}


def print_notes(notes: Iterable[str]) -> None:
    """Print what opening a source left out, on stderr."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def plain_table() -> Table:
    """A table without lines."""
    return Table(box=None, header_style="bold", pad_edge=False)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of words, the first of them heads, the first column names."""
    table = plain_table()
    head, *body = rows
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in body:
        table.add_row(*row)
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:  # figures with their intervals need room; a pipe has it
        console = Console(width=WIDTH, markup=False, emoji=False)
    console.print(table)


def print_scores(names: Sequence[str], metrics: Sequence[Mapping[str, Any]]) -> None:
    """Print the headline figures of some SAEs, a column each, baselines in brackets below.

    Args:
        names: heads of the columns.
        metrics: what `metrics.json` holds, in the same order.
    """
    table = plain_table()
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for title, key in HEADLINES.items():
        show = percent if key in PERCENTAGES else figure
        if any(dig(each, key) is not None for each in metrics):
            table.add_row(title, *(show(dig(each, key)) for each in metrics))
            for baseline, words in BASELINES.items():
                values = [dig(each, f"baselines.{baseline}.{key}") for each in metrics]
                if any(value is not None for value in values):
                    table.add_row(f"  {words}", *map(show, values), style="dim")
    kinds = list(dict.fromkeys(kind for each in metrics for kind in truth_by_kind(each)))
    for kind in kinds:
        words = f"{kind.replace('_', ' ')}: mean AUC"
        table.add_row(words, *(_mean_auc(each, kind) for each in metrics))
        for baseline, name in BASELINES.items():
            blocks = [dig(each, f"baselines.{baseline}") or {} for each in metrics]
            if any(kind in truth_by_kind(block) for block in blocks):
                row = (_mean_auc(block, kind) for block in blocks)
                table.add_row(f"  {name}", *row, style="dim")
    console = Console(markup=False, emoji=False)
    console.print(table)
    for sentence in dict.fromkeys(map(measured_on, metrics)):
        which = [n for n, each in zip(names, metrics, strict=True) if measured_on(each) == sentence]
        _print_about(console, which if len(which) < len(names) else [], sentence)
    for name, each in zip(names, metrics, strict=True):
        _print_about(console, [name] if len(names) > 1 else [], cls_warning(each))


def _print_about(console: Console, names: Sequence[str], sentence: str) -> None:
    if sentence:
        text = f"{', '.join(names)}: {sentence}" if names else sentence
        console.print(text, style="dim", markup=False, highlight=False)


def print_sweep(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a line an autoencoder of a sweep.

    Args:
        out: folder of the sweep.
        rows: what `Sweep.table` gives, or the members of `compare`.
    """
    table = plain_table()
    table.add_column(f"in {out}", overflow="fold")
    table.add_column("site", overflow="fold")
    accurate = any(row.get("accuracy") is not None for row in rows)
    for name in ("FVU", "L0", "dead", *(["zero-shot"] * accurate), "vectors/s"):
        table.add_column(name, justify="right")
    for row in rows:
        if "diverged" in row:
            table.add_row(row["name"], row["site"], "diverged")
            continue
        rate = row["vectors_per_second"]
        figures = [figure(row["fvu"]), figure(row["l0"]), percent(row["dead"])]
        if accurate:
            figures.append(percent(row.get("accuracy")))
        table.add_row(row["name"], row["site"], *figures, "–" if rate is None else f"{rate:,.0f}")
    Console(markup=False, emoji=False).print(table)


def _mean_auc(block: Mapping[str, Any], kind: str) -> str:
    return figure(truth_by_kind(block).get(kind, {}).get("auc"))
