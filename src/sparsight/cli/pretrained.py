"""`sparsight pretrained`: list published SAEs and their names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.padding import Padding

from sparsight.cli.help import Help
from sparsight.cli.options import CommandOptions, parse
from sparsight.formats.pretrained import OTHER, Published, look_up

HELP = Help(
    examples=("", "--model vit-large --site resid_post"),
)


@dataclass(frozen=True)
class PretrainedOptions(CommandOptions):
    """List published SAEs of CLIP and similar models, from a table that comes with Sparsight."""

    model: str | None = None
    """List only models whose name contains this text."""

    site: str | None = None
    """List only sites whose name contains this text, e.g. embedding, blocks.9. or resid_post."""

    format: str | None = None
    """List only SAEs in this format."""

    json: bool = False
    """Print JSON, with the source of each row."""


def main(arguments: Sequence[str]) -> None:
    """Parse, look up, print."""
    options = parse(PretrainedOptions, "pretrained", arguments, helped=HELP)
    rows = look_up(model=options.model, site=options.site, format=options.format)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    for model in dict.fromkeys(row.model for row in rows):
        console.print(model, style="bold", soft_wrap=True)
        for row in (row for row in rows if row.model == model):
            # On a line of its own, never wrapped: users copy it.
            console.print(f"  {row.id}", soft_wrap=True)
            console.print(Padding(_about(row), (0, 0, 0, 6)), style="dim")
    unread = sum(row.format == OTHER for row in rows)
    console.print(
        f"{len(rows)} entries"
        + (f", {unread} in formats that Sparsight does not read (other)" if unread else "")
        + ". Load one with SparseAutoencoder.from_pretrained(id); --json shows the sources."
    )


def _about(row: Published) -> str:
    """Describe an entry, except for model and id, as far as it is known."""
    known = (
        row.site,
        row.tokens,
        None if row.latents is None else f"{row.latents:,} latents",
        None if row.k is None else f"k = {row.k}",
        row.format,
        row.licence,
        row.note,
    )
    return " · ".join(field for field in known if field)
