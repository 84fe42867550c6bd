"""`sparsight attack measure`: measure how far words mislead a model, as it is or edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsight.attacks import SalienceTable, causal_check, measure_attack
from sparsight.cli.attack.shared import PairOptions, check_failed, model_of, pairs_of, target_of
from sparsight.cli.help import Help
from sparsight.cli.options import parse
from sparsight.cli.printing import print_notes, print_table
from sparsight.files import check_file

HELP = Help(
    examples=(
        "--model openai/clip-vit-base-patch32 --images photos/",
        "--model openai/clip-vit-base-patch32 --images photos/ --off attack/blocks.9.resid_post",
    ),
    needed=("images", "model"),
    common=("off", "n", "classes", "templates", "writing", "out", "seed"),
)


@dataclass(frozen=True)
class MeasureOptions(PairOptions):
    """Measure a model on clean images, and on copies with words on them: the name of another class,
    the name of the image's own class, or nonsense."""

    off: tuple[Path, ...] = ()
    """Folders that `attack find` wrote: switch off the latents or neurons found there and, for
    comparison, as many random ones."""

    selectivity: float | None = None
    """Switch off latents and neurons with at least this selectivity; default: as in
    `attack find`."""

    draws: int = 10
    """Number of random sets to compare with."""

    out: Path | None = None
    """JSON file for the metrics."""


def main(arguments: Sequence[str]) -> None:
    """Parse, measure, print a table."""
    options = parse(MeasureOptions, "attack measure", arguments, helped=HELP)
    if options.out is not None:
        check_file(options.out)
    tables = [SalienceTable.load(folder) for folder in options.off]
    model = model_of(options, options.model, tables)
    pairs = pairs_of(options)
    report: Any
    if tables:
        targets = [target_of(table, options.selectivity, options.device) for table in tables]
        report = causal_check(
            model,
            pairs,
            targets,
            draws=options.draws,
            seed=options.seed,
            templates=options.templates,
            batch_size=options.batch_images,
            workers=options.workers,
            quiet=False,
        )
        if again := report.same_pictures:
            print_notes(
                [
                    f"{again:,} of these {len(pairs):,} images were used to find what is switched "
                    "off, so the results are too good; measure on other images."
                ]
            )
    else:
        report = measure_attack(
            model,
            pairs,
            templates=options.templates,
            batch_size=options.batch_images,
            workers=options.workers,
            quiet=False,
        )
    check_failed(report.failed, len(pairs), options.max_failed)
    print_table(report.table())
    if options.out is not None:
        print(report.save(options.out))
