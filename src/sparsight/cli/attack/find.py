"""`sparsight attack find`: find the latents or neurons that respond to words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from sparsight.attacks import (
    AttackPairs,
    CausalReport,
    SalienceTable,
    Target,
    causal_check,
    find_text_salient,
)
from sparsight.attacks.latent_reading import Statistic
from sparsight.attacks.salience import FDR, SELECTIVE, Contrast, Read
from sparsight.attacks.significance import PERMUTATIONS, Alternative
from sparsight.cli.attack.shared import PairOptions, check_failed, pairs_of
from sparsight.cli.help import Help
from sparsight.cli.opening import as_trained, open_model, open_saes
from sparsight.cli.options import parse
from sparsight.cli.printing import print_notes, print_table
from sparsight.errors import UserError
from sparsight.files import check_folder
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel

HELP = Help(
    examples=(
        "runs/b32-l9 --images photos/ --out attack/",
        "--neurons blocks.7.mlp_post --model calibration --images calibration --out attack/",
    ),
    needed=("runs", "images", "out"),
    common=(
        "model",
        "neurons",
        "n",
        "classes",
        "contrast",
        "tokens",
        "fdr",
        "selectivity",
        "check",
    ),
)


@dataclass(frozen=True)
class FindOptions(PairOptions):
    """Test each latent or neuron for a response to words on one half of the images; switch off the
    responsive ones on the other half."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders of SAEs; each is tested at its own site."""

    neurons: tuple[str, ...] = ()
    """Sites whose neurons are tested, e.g. blocks.7.mlp_post."""

    out: Path = Path("attack")
    """Folder for the results, with one folder per site."""

    contrast: Contrast = "attack"
    """word: class name against nonsense. writing: nonsense against no text. attack: class name
    against no text."""

    statistic: Statistic = "mean"
    """Statistic over an image's positions."""

    alternative: Alternative = "greater"
    """greater: find latents or neurons that are more active with words. two-sided: also find less
    active ones."""

    tokens: Read | None = None
    """Positions to read and edit; default: those on which the SAE was trained, or all."""

    fdr: float = FDR
    """Allowed false discovery rate."""

    selectivity: float = SELECTIVE
    """Switch off latents and neurons with at least this selectivity: 0.9 means 19 times as active
    with words as without."""

    permutations: int = PERMUTATIONS
    """Number of random sign flips in the test."""

    check: bool = True
    """Switch off the latents or neurons that were found and, for comparison, as many random ones.
    With --no-check, the search uses all images."""

    draws: int = 10
    """Number of random sets to compare with."""


def main(arguments: Sequence[str]) -> None:
    """Parse, test, switch off, save and print the results."""
    options = parse(FindOptions, "attack find", arguments, helped=HELP)
    if not options.runs and not options.neurons:
        raise UserError(
            "Nothing to test: name run folders of SAEs, or sites with --neurons, e.g. "
            "blocks.-2.mlp_post."
        )
    check_folder(options.out)
    saes = open_saes(options.runs, options.device) if options.runs else {}
    model = _model(options, saes)
    whole = pairs_of(options)
    pairs, others = whole.halves(options.seed) if options.check else (whole, None)
    for subject in _subjects(options, model, saes):
        place = options.out / subject.name
        table = _find(options, model, pairs, subject)
        if others is None or not table.selective or not place.exists():
            # Replace an earlier search only once this one is complete.
            table.save(place)
        _print_found(place, table)
        if others is None:
            continue
        if not table.selective:
            print_notes([f"{subject.site}: nothing is selective enough to switch off."])
            continue
        report = _switch_off(options, model, others, Target(table, None, subject.sae))
        table.save(place, report.to_dict())
        print_table(report.table())


def _model(options: FindOptions, saes: Mapping[Path, SparseAutoencoder]) -> VisionModel:
    """Load the named model, or else the one that all SAEs share."""
    abouts = [about for sae in saes.values() if (about := sae.metadata.get("model"))]
    ids = {about.get("id") for about in abouts} - {None}
    if options.model is None and len(ids) != 1:
        raise UserError("The model is not known; name it with --model.")
    id, wanted = as_trained(abouts[0] if abouts else {}, options, options.model)
    assert id is not None
    return open_model(id, wanted)


@dataclass(frozen=True)
class _Subject:
    """What to test: the latents of an SAE, or without one the neurons of a site."""

    site: str
    sae: SparseAutoencoder | None = None
    folder: Path | None = None

    @property
    def name(self) -> str:
        """Return the name of the subject's folder."""
        return self.site if self.sae is not None else f"{self.site}-neurons"


def _subjects(
    options: FindOptions, model: VisionModel, saes: Mapping[Path, SparseAutoencoder]
) -> list[_Subject]:
    subjects = [
        *(_Subject(str(sae.metadata.get("site")), sae, folder) for folder, sae in saes.items()),
        *(_Subject(model.canonical_site(site)) for site in options.neurons),
    ]
    if len({subject.name for subject in subjects}) < len(subjects):
        raise UserError("Two runs have the same site; test each with its own --out.")
    return subjects


def _find(
    options: FindOptions, model: VisionModel, pairs: AttackPairs, subject: _Subject
) -> SalienceTable:
    table = find_text_salient(
        model,
        pairs,
        subject.sae,
        site=subject.site,
        tokens=options.tokens,
        contrast=options.contrast,
        statistic=options.statistic,
        alternative=options.alternative,
        fdr=options.fdr,
        selectivity=options.selectivity,
        permutations=options.permutations,
        seed=options.seed,
        batch_size=options.batch_images,
        workers=options.workers,
        quiet=False,
    )
    check_failed(table.about["failed"], len(pairs), options.max_failed)
    if subject.folder is not None:
        table.about["sae_folder"] = str(subject.folder.absolute())
    return table


def _switch_off(
    options: FindOptions, model: VisionModel, pairs: AttackPairs, target: Target
) -> CausalReport:
    report = causal_check(
        model,
        pairs,
        target,
        draws=options.draws,
        seed=options.seed,
        templates=options.templates,
        batch_size=options.batch_images,
        workers=options.workers,
        quiet=False,
    )
    check_failed(report.failed, len(pairs), options.max_failed)
    return report


def _print_found(place: Path, table: SalienceTable) -> None:
    kind, about = table.about["unit"], table.about
    print(
        f"{place}: {len(table.found):,} of {about['n_tested']:,} {kind}s respond to "
        f"{about['compares']} (false discovery rate {about['fdr']}), {len(table.selective):,} of "
        f"them with a selectivity of {about['selectivity']} or more"
    )
    if table.fewest > 1:
        print_notes(
            [
                f"{table.site}: {about['permutations']:,} permutations cannot find fewer than "
                f"{table.fewest} of {about['n_tested']:,} {kind}s, however strongly they respond; "
                "raise --permutations to find single ones."
            ]
        )
