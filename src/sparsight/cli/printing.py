"""The output of verbs when they are done: notes, and tables of metrics next to baselines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsight.figures import (
    BASELINES,
    Figure,
    dig,
    figure_of,
    rounded,
    shown_in,
)
from sparsight.pages.scores import cls_warning, measured_on, truth_by_kind

WIDTH = 120


def print_notes(notes: Iterable[str]) -> None:
    """Print notes, such as what opening a source left out, on stderr."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def plain_table() -> Table:
    """Return a table without lines."""
    return Table(box=None, header_style="bold", pad_edge=False)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text; the first row holds the headings, the first column the names."""
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
    """Print the main metrics of SAEs, one column per SAE, each metric with its baselines below it.

    Args:
        names: headings of the columns.
        metrics: the contents of each `metrics.json`, in the same order.
    """
    table = plain_table()
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for figure in _headlines():
        if any(figure.of(each) is not None for each in metrics):
            table.add_row(figure.label, *(figure.show(figure.of(each)) for each in metrics))
            for baseline, words in BASELINES.items():
                values = [figure.of(dig(each, f"baselines.{baseline}")) for each in metrics]
                if any(value is not None for value in values):
                    table.add_row(f"  {words}", *map(figure.show, values), style="dim")
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


def _headlines() -> list[Figure]:
    """Return the main figures of an SAE; if they have variants, the original and reconstruction."""
    found: list[Figure] = []
    for figure in shown_in("headline"):
        found += [figure.at(variant) for variant in figure.variants[:2]] or [figure]
    return found


def _print_about(console: Console, names: Sequence[str], sentence: str) -> None:
    if sentence:
        text = f"{', '.join(names)}: {sentence}" if names else sentence
        console.print(text, style="dim", markup=False, highlight=False)


def print_sweep(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one line per autoencoder of a sweep.

    Args:
        out: folder of the sweep.
        rows: the result of `Sweep.table`, or the members of `compare`.
    """
    table = plain_table()
    table.add_column(f"in {out}", overflow="fold")
    table.add_column("site", overflow="fold")
    figures = [*shown_in("log")]
    if any(row.get("accuracy") is not None for row in rows):
        figures.append(figure_of("accuracy"))
    speed = figure_of("vectors_per_second")
    for each in (*figures, speed):
        table.add_column(each.name, justify="right")
    for row in rows:
        if "diverged" in row:
            table.add_row(row["name"], row["site"], "diverged")
            continue
        cells = [each.show(each.of(row)) for each in figures]
        rate = speed.of(row)
        table.add_row(row["name"], row["site"], *cells, "–" if rate is None else speed.show(rate))
    Console(markup=False, emoji=False).print(table)


def _mean_auc(block: Mapping[str, Any], kind: str) -> str:
    return rounded(truth_by_kind(block).get(kind, {}).get("auc"))
