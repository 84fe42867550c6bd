"""The latents at each patch of an image, on the terminal: a grid of letters and a list."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Collection, Sequence

import pyarrow as pa
from rich.text import Text

from sparsight.cli.listing import cell, console
from sparsight.cli.printing import plain_table
from sparsight.figures import rounded
from sparsight.latents.one_image import ImageLatents, PatchLatents

LETTERS = string.ascii_uppercase
COLOURS = ("red", "green", "yellow", "blue", "magenta", "cyan", "bright_red", "bright_green",
           "bright_yellow", "bright_blue", "bright_magenta", "bright_cyan")  # fmt: skip
NOTHING, OTHERS = "·", "+"
PER_PATCH = 4
"""Latents that the list shows per patch."""


def print_patches(found: ImageLatents, chosen: Sequence[int], limit: int) -> None:
    """Print the strongest latent of each patch as a grid of letters, and the strongest patches.

    Args:
        found: the latents of the image, with its code.
        chosen: the latents to show.
        limit: number of patches to list.

    Raises:
        UserError: the SAE reads no patches.
    """
    patches = _only(found.patches(), set(chosen))
    _print_grid(found, patches)
    active = [patch for patch in patches if patch.latents]
    strongest = sorted(active, key=lambda patch: -patch.activations[0])[:limit]
    table = plain_table()
    for name in ("row", "column"):
        table.add_column(name, justify="right")
    table.add_column("strongest latents")
    for patch in strongest:
        pairs = zip(patch.latents[:PER_PATCH], patch.activations[:PER_PATCH], strict=True)
        more = len(patch.latents) - PER_PATCH
        words = [f"{latent} ({rounded(value)})" for latent, value in pairs]
        words += [f"and {more} more"] if more > 0 else []
        table.add_row(str(patch.row), str(patch.column), ", ".join(words))
    print()
    console().print(table)
    hidden = len(active) - len(strongest)
    more_text = f"; --limit {len(active)} prints all" if hidden else ""
    print(f"{len(active):,} of {len(patches):,} patches{more_text}")


def patch_rows(found: ImageLatents, chosen: Collection[int]) -> pa.Table:
    """Return one row per patch and latent that is active there: `row`, `column`, `latent`,
    `activation`, `name`.
    """
    latents = found.table.select(["latent", "name"]).to_pylist()
    names = {row["latent"]: row["name"] for row in latents}
    rows = [
        (patch.row, patch.column, latent, value, names[latent])
        for patch in _only(found.patches(), set(chosen))
        for latent, value in zip(patch.latents, patch.activations, strict=True)
    ]
    kinds = (pa.int32(), pa.int32(), pa.int32(), pa.float32(), pa.string())
    columns = zip(*rows, strict=True) if rows else [()] * len(kinds)
    arrays = [pa.array(list(column), kind) for column, kind in zip(columns, kinds, strict=True)]
    return pa.table(arrays, names=["row", "column", "latent", "activation", "name"])


def _only(patches: list[PatchLatents], chosen: set[int]) -> list[PatchLatents]:
    kept = []
    for patch in patches:
        every = zip(patch.latents, patch.activations, strict=True)
        pairs = [pair for pair in every if pair[0] in chosen]
        latents, values = zip(*pairs, strict=True) if pairs else ((), ())
        kept.append(PatchLatents(patch.row, patch.column, tuple(latents), tuple(values)))
    return kept


def _print_grid(found: ImageLatents, patches: Sequence[PatchLatents]) -> None:
    assert found.grid is not None
    columns = found.grid[1]
    wins = Counter(patch.latents[0] for patch in patches if patch.latents)
    letters = {latent: LETTERS[i] for i, (latent, _) in enumerate(wins.most_common(len(LETTERS)))}
    screen = console()
    for start in range(0, len(patches), columns):
        line = Text("  ")
        for patch in patches[start : start + columns]:
            letter = letters.get(patch.latents[0], OTHERS) if patch.latents else NOTHING
            colour = COLOURS[LETTERS.index(letter) % len(COLOURS)] if letter in LETTERS else "dim"
            line.append(f"{letter} ", style=colour)
        screen.print(line)
    print()
    rows = {row["latent"]: row for row in found.table.to_pylist()}
    table = plain_table()
    for name in ("", "latent", "patches", "largest"):
        table.add_column(name, justify="right")
    table.add_column("name")
    table.add_column("top_label")
    for latent, letter in letters.items():
        row = rows[latent]
        style = COLOURS[LETTERS.index(letter) % len(COLOURS)]
        table.add_row(
            Text(letter, style=style), str(latent), str(wins[latent]), rounded(row["activation"]),
            cell("name", row["name"]), cell("top_label", row["top_label"]),
        )  # fmt: skip
    screen.print(table)
    others = sum(wins.values()) - sum(wins[latent] for latent in letters)
    if others:
        print(f"{OTHERS}: other latents, strongest at {others} patches")
