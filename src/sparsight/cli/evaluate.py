"""`sparsight evaluate`: measure an SAE and compare it with baselines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from sparsight.activations import ActivationSource, held_out_of
from sparsight.cli.help import Help
from sparsight.cli.opening import open_saes
from sparsight.cli.options import parse
from sparsight.cli.printing import print_notes, print_scores
from sparsight.cli.subject import SubjectOptions, Subjects
from sparsight.errors import UserError
from sparsight.evaluation import evaluate
from sparsight.files import check_file
from sparsight.sae import SparseAutoencoder

HELP = Help(
    examples=("runs/b32-l9", "runs/ --store acts-test/"),
    needed=("runs",),
)


@dataclass(frozen=True)
class EvaluateOptions(SubjectOptions):
    """Measure SAEs: error, sparsity, zero-shot accuracy and ground truth, compared with
    baselines."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = tyro.MISSING
    """Run folders, or folders that contain runs."""

    out: Path | None = None
    """File for the metrics; default: metrics.json in each run."""

    baselines: bool = True
    """Also measure an untrained SAE, PCA and raw neurons."""

    downstream: bool = True
    """Load the model to measure zero-shot accuracy and contrastive loss with reconstructed
    activations."""

    templates: str = "simple"
    """Sentences for zero-shot classification: simple, openai80, or your own with {} in it."""

    held_out: bool = True
    """Measure on the images that `train --held-out` kept out of training, if there are any."""

    max_images: int | None = None
    """Measure on a random sample of this many images; default: all."""

    batch_images: int = 64
    """Images per batch."""

    dead_window: int | None = None
    """A latent counts as dead after this many vectors without an activation; default: 10,000,000,
    or all vectors if there are fewer."""

    seed: int = 0
    """Seed of the sample of images, the untrained SAE, and the halves of the ground truth."""


def main(arguments: Sequence[str]) -> None:
    """Parse, measure, print the main metrics and what was left out."""
    options = parse(EvaluateOptions, "evaluate", arguments, helped=HELP)
    saes = open_saes(options.runs, options.device)
    if options.out is not None and len(saes) > 1:
        raise UserError(f"--out works with one SAE, but {len(saes)} are given; leave it out.")
    if options.out is not None and not options.out.is_dir():
        check_file(options.out)
    subjects = Subjects(options)
    reports = {}
    for folder, sae in saes.items():
        data = subjects.activations(folder, sae)
        if options.held_out:
            data = held_out_part(data, sae)
        report = evaluate(
            sae,
            data,
            model=subjects.model(folder, sae) if options.downstream else None,
            templates=options.templates,
            baselines=options.baselines,
            max_images=options.max_images,
            batch_images=options.batch_images,
            dead_window=options.dead_window,
            workers=options.workers,
            seed=options.seed,
        )
        report.save(options.out or folder / "metrics.json")
        reports[folder] = report
        for family, reason in report.metrics["omitted"].items():
            print(f"note: {folder.name}: no {family}: {reason}", file=sys.stderr)
    print_scores([folder.name for folder in reports], [r.metrics for r in reports.values()])


def held_out_part(data: ActivationSource, sae: SparseAutoencoder) -> ActivationSource:
    """Return the images that were held out of training; all images if none were."""
    held_out = held_out_of(sae.metadata)
    same = sae.metadata.get("images") == data.model_info.get("images")
    if held_out is None or not same:
        return data
    part = held_out.split(data)[1]
    print_notes([f"measured on the {part.n_images:,} images that were held out of training."])
    return part
