"""`sparsight demo`: the whole chain on rendered images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sparsight.cli.help import Help
from sparsight.cli.options import SHOWN_ALIASES, CommandOptions, Shown, parse
from sparsight.cli.printing import print_scores
from sparsight.demo import DemoConfig, run_demo

HELP = Help(
    examples=("", "--out demo/"),
)


@dataclass(frozen=True)
class DemoOptions(DemoConfig, CommandOptions):
    """Extract, train, evaluate, index and report on rendered images: minutes, offline, no GPU."""

    ALIASES: ClassVar[Mapping[str, str]] = SHOWN_ALIASES

    latents: Shown = DemoConfig.latents
    """Number of latents of each autoencoder that the report shows."""

    out: Path = Path("demo")
    """Folder for report.html, store/, held-out/ and runs/; an interrupted demo is continued."""


def main(arguments: Sequence[str]) -> None:
    """Parse, run, print the table and the path of the page."""
    options = parse(DemoOptions, "demo", arguments, helped=HELP)
    names = [field.name for field in dataclasses.fields(DemoConfig)]
    config = DemoConfig(**{name: getattr(options, name) for name in names})
    result = run_demo(options.out, config)
    print_scores(list(result.metrics), list(result.metrics.values()))
    print(f"\nThe report: {result.report}")
