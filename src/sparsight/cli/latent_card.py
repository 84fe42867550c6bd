"""Everything that an index knows about one latent, on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sparsight.cli.listing import cell, console
from sparsight.cli.printing import plain_table
from sparsight.figures import percent, rounded
from sparsight.latents import LatentIndex
from sparsight.latents.index_files import NAMES, NEIGHBOURS
from sparsight.latents.neighbour_tables import By

BARS = " ▁▂▃▄▅▆▇█"
MOST_LABELS, MOST_IMAGES, MOST_NEIGHBOURS = 8, 8, 5


def print_card(index: LatentIndex, latent: int, run: Path) -> None:
    """Print name, statistics, distribution, labels and top images of a latent.

    Args:
        index: the index.
        latent: its number.
        run: the folder that the user named, for the command that steers the latent.

    Raises:
        UserError: the index has no latent of this number.
    """
    row = index.row(latent)
    screen = console()
    screen.print(f"latent {latent} · {row['name'] or 'no name'}", style="bold")
    lines = [*_name(index, row), *_statistics(index, row), *_distribution(row)]
    for line in [*lines, *_neighbours(index, latent)]:
        screen.print(f"  {line}")
    if index.version > 1:
        _print_table("labels", _labels(index, latent))
    _print_table("top images", _images(index, latent))
    screen.print(f"  steer it: sparsight steer {run} --latents {latent}")


def _name(index: LatentIndex, row: dict[str, Any]) -> Iterator[str]:
    if row["name"]:
        threshold = row.get("name_threshold")
        needed = "" if threshold is None else f" (needed: {rounded(threshold)})"
        yield f"name by {row['name_source']}: {rounded(row['name_score'])}{needed}"
    path = index.file(NAMES)
    if path is None:
        return
    columns = ["method", "name", "score", "accepted", "runners_up"]
    names = pq.read_table(path, columns=columns, filters=[("latent", "=", row["latent"])])
    for found in names.to_pylist():
        others = [
            f"{other['name']} {rounded(other['score'])}" for other in found.get("runners_up") or []
        ]
        verdict = "accepted" if found["accepted"] else "not accepted"
        best = "nothing" if found["name"] is None else f"{found['name']} {rounded(found['score'])}"
        then = f"; then {', '.join(others[:4])}" if others else ""
        yield f"by {found['method']}: {best} ({verdict}){then}"


def _neighbours(index: LatentIndex, latent: int) -> Iterator[str]:
    if index.file(NEIGHBOURS) is None:
        return
    names = index.table["name"].to_pylist()
    words: dict[By, str] = {"decoder": "closest decoder rows", "coactivation": "fires with"}
    for by, heading in words.items():
        listed = [
            f"{near.latent}{f' {names[near.latent]}' if names[near.latent] else ''} "
            f"({rounded(near.score)})"
            for near in index.neighbours(latent, by, MOST_NEIGHBOURS)
        ]
        if listed:
            yield f"{heading}: {', '.join(listed)}"


def _statistics(index: LatentIndex, row: dict[str, Any]) -> Iterator[str]:
    n_images = index.manifest["images"]["n_images"]
    share = percent(row["n_active_images"] / n_images)
    yield (
        f"fires in {row['n_active_images']:,} of {n_images:,} images ({share}), on "
        f"{percent(row['density'])} of the vectors"
    )
    if not row["n_active"]:
        return
    mean, largest = rounded(row["mean_activation"]), rounded(row["max_activation"])
    yield f"activation: mean {mean}, largest {largest}"
    if row.get("cls_share") is not None:
        yield f"at CLS or another prefix position: {percent(row['cls_share'])}"
    if row.get("moran") is not None:
        yield (
            f"spatial autocorrelation (Moran's I): {rounded(row['moran'])}, by chance "
            f"{rounded(row['moran_null'])}"
        )


def _distribution(row: dict[str, Any]) -> Iterator[str]:
    if not row.get("histogram") or not row["n_active"]:
        return
    low, high = rounded(row["histogram_low"]), rounded(row["histogram_high"])
    yield f"image maxima: {low} {bars(row['histogram'])} {high}"
    parts = [f"{name[1:]} %: {rounded(row[name])}" for name in ("q10", "q50", "q90", "q99")]
    yield f"quantiles: {', '.join(parts)}"


def bars(counts: Sequence[int]) -> str:
    """Draw counts as one bar each; every count above 0 has a visible bar."""
    most = max(counts)
    if not most:
        return BARS[0] * len(counts)
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts)


def _labels(index: LatentIndex, latent: int) -> list[Sequence[str]]:
    counts, totals = index.label_counts(latent), index.label_totals
    n_fires, n_images = index.row(latent)["n_active_images"], len(index.image_places)
    if not counts:
        return []
    rows: list[Sequence[str]] = [("label", "images", "share", "in the collection", "lift")]
    for label, n in list(counts.items())[:MOST_LABELS]:
        share, base = n / n_fires, totals[label] / n_images
        rows.append((label, f"{n:,}", percent(share), percent(base), f"{share / base:.2f}"))
    if len(counts) > MOST_LABELS:
        rows.append((f"and {len(counts) - MOST_LABELS:,} more", "", "", "", ""))
    return rows


def _images(index: LatentIndex, latent: int) -> list[Sequence[str]]:
    examples = index.top(latent)[:MOST_IMAGES]
    if not examples:
        return []
    rows: list[Sequence[str]] = [("image", "activation", "position", "label", "id")]
    for example in examples:
        info = index.info(example.image)
        value, label = rounded(example.activation), info.label or ""
        rows.append(
            (str(example.image), value, str(example.token), cell("", label), cell("", info.id))
        )
    return rows


def _print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = plain_table()
    head, *body = rows
    table.add_column(f"  {title}", style="dim")
    for name in head:
        text = name in ("label", "id")
        table.add_column(name, justify="left" if text else "right", overflow="fold")
    for row in body:
        table.add_row("", *row)
    console().print(table)
