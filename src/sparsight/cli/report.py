"""`sparsight report`: write one HTML page about one or more runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from sparsight.cli.help import Help
from sparsight.cli.options import SHOWN_ALIASES, CommandOptions, Shown, parse

HELP = Help(
    examples=("runs/b32-l9", "runs/ --out report.html"),
    needed=("runs",),
)


@dataclass(frozen=True)
class ReportOptions(CommandOptions):
    """Write one self-contained HTML page about one or more runs: metrics, plots and latents."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = tyro.MISSING
    """Run folders, or one folder that contains runs."""

    out: Path = Path("report.html")
    """File of the page, or a folder in which to write report.html."""

    model: str | None = None
    """Model that tells where in the images latents are active, if neither codes nor activations of
    the images are on disk; default: the model that each index names."""

    ALIASES: ClassVar[Mapping[str, str]] = SHOWN_ALIASES

    latents: Shown = 32
    """Number of latents to show per run: three quarters are the easiest to understand, the rest are
    drawn at random."""

    seed: int = 0
    """Seed of the choice of random latents."""

    title: str | None = None
    """Title of the page; default: the model and the images."""


def main(arguments: Sequence[str]) -> None:
    """Parse, write, print the path."""
    options = parse(ReportOptions, "report", arguments, helped=HELP)
    from sparsight.latents import write_report

    page = write_report(
        options.runs,
        options.out,
        model=options.model,
        latents=options.latents,
        seed=options.seed,
        title=options.title,
    )
    print(f"{page} · {page.stat().st_size / 1e6:.1f} MB")
