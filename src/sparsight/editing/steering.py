"""Turn latents up and down, and see what the model makes of the pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from sparsight.config import check_positive
from sparsight.editing.actions import Off, Scale, Set
from sparsight.editing.bench import Bench, Halves
from sparsight.editing.changes import CodeMemo
from sparsight.editing.class_codes import ClassCodes, class_codes
from sparsight.editing.class_curves import checked_ks, class_curves
from sparsight.editing.edits import NO_SITE, LatentEdit, Positions
from sparsight.editing.interventions import check_site, interventions
from sparsight.editing.steering_table import rows_of
from sparsight.errors import UserError
from sparsight.evaluation.report import finite
from sparsight.images import ImageSource
from sparsight.notebooks import data_frame
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel, classifier_weights, names_by_label

if TYPE_CHECKING:
    import pandas

STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
Unit = Literal["max", "absolute", "factor"]
"""What a strength of 1 is: the latent's largest activation; an activation of 1; or a factor on
whatever its activation is."""


@dataclass(frozen=True)
class SteerReport:
    """What came of steering.

    Attributes:
        about: model, SAE, site, tokens, images, sentences, how many images.
        original: figures of the model as it is.
        latents: for each latent a list of figures by strength.
        curves: figures with only the k strongest latents of each class, or without them; empty if
            left out.
        omitted: what was left out, and why.
    """

    about: dict[str, Any]
    original: dict[str, Any]
    latents: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    omitted: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        values: dict[str, Any] = finite(vars(self))  # strengths may be beyond what a model computes
        return values

    def table(self) -> list[dict[str, Any]]:
        """The rows of `steer.csv`: the model as it is, each latent and strength, the curves."""
        return list(rows_of(self.original, self.latents, self.curves))

    def to_pandas(self) -> pandas.DataFrame:
        """What `table` gives as a data frame of pandas.

        Raises:
            MissingExtra: pandas is not installed.
        """
        return data_frame(self.table())


@torch.no_grad()
def steer(
    model: VisionModel,
    images: ImageSource,
    sae: SparseAutoencoder,
    latents: Sequence[int] = (),
    *,
    strengths: Sequence[float] = STRENGTHS,
    unit: Unit = "max",
    site: str | None = None,
    tokens: Positions | None = None,
    class_names: Sequence[str] | Mapping[str, str] | None = None,
    templates: str | Sequence[str] = "openai80",
    curves: bool = True,
    ks: Sequence[int] | None = None,
    names: Mapping[int, str] | None = None,
    max_images: int | None = None,
    batch_images: int = 64,
    workers: int | None = None,
    seed: int = 0,
    check: bool = True,
    quiet: bool = True,
) -> SteerReport:
    """Measure zero-shot probabilities and retrieval over a range of strengths of some latents, and
    accuracy with only, or without, the latents of each class.

    Every other image of a class serves to choose (the classes' latents, the largest activations),
    the others to measure.

    The curves are those of PatchSAE (Lim et al. 2025, "Sparse autoencoders reveal selective
    remapping of visual concepts during adaptation", section 3.3): a class's latents are those with
    the largest mean activation over its images; on-k keeps only the k first of them, off-k switches
    them off, and accuracy is over all classes. Beside them stand as many random latents of equal
    density. Edits keep what the SAE does not reconstruct.

    Args:
        model: one with a text tower.
        images: with labels for probabilities of their own class, with captions for retrieval.
        sae: an autoencoder.
        latents: which to steer, each by itself.
        strengths: in `unit`; 0 switches a latent off (unit "factor", too).
        unit: see `Unit`; "max" and "absolute" set the latent at every position that is edited.
        site: default that of the SAE.
        tokens: default those of the SAE.
        class_names: see `sparsight.vision.zero_shot`.
        templates: see `sparsight.vision.classifier_weights`.
        curves: measure the on-k and off-k curves, too.
        ks: of the curves; default 1, 2, 5, 10, … and all latents.
        names: of latents, for the report.
        max_images: a random sample of so many images; default all.
        batch_images: images at a time.
        workers: processes that decode.
        seed: of the sample and the random latents.
        check: see `intervene`.
        quiet: no progress line.

    Raises:
        UserError: model, images, SAE and latents do not fit each other, or there is nothing to
            measure.
    """
    check_positive(max_images=max_images, batch_images=batch_images)
    asked_ks = checked_ks(ks, sae.n_latents)
    images = images if max_images is None else images.sample(max_images, seed)
    infos = [images.known(i) for i in range(len(images))]
    labels = sorted({each.label for each in infos if each.label})
    by_label = names_by_label(labels, class_names)
    known = [label for label in by_label if label in set(labels)]
    halves = Halves.of([each.label for each in infos], known)
    captions = {i: each.caption for i, each in enumerate(infos) if each.caption}
    omitted = _omitted(model, images, by_label, known, captions, curves)
    plan = LatentEdit(sae, list(latents), Off(), site, tokens)
    if plan.site is None:
        raise UserError(NO_SITE)
    if not latents and ("curves" in omitted or not curves):
        raise UserError(
            "Nothing to steer: name latents (by number or by name), or take images with labels, "
            "for which the curves of their classes can be drawn."
        )
    _check_strengths(strengths)
    where = check_site(model, plan, check=check)
    assert plan.tokens is not None
    each_class = class_codes(
        model, images, sae, where, _position(model, where, plan.tokens), halves.choose,
        batch_images=batch_images, workers=workers, quiet=quiet,
    )  # fmt: skip
    weights = classifier_weights(model, list(by_label.values()), templates) if by_label else None
    bench = Bench(model, images, where, halves, by_label, weights, captions)
    settings: dict[str, Any] = {"batch_images": batch_images, "workers": workers, "quiet": quiet}

    unit_of = _units(each_class, latents, unit)
    edits: dict[str, LatentEdit] = {}
    for latent in latents:
        for strength in strengths:
            action = Scale(strength) if unit == "factor" else Set(strength * unit_of[latent])
            edits[f"{latent} {strength}"] = LatentEdit(sae, [latent], action, where, plan.tokens)
    memo = CodeMemo()
    made = {
        name: interventions(model, edit, check=check, memo=memo)[where]
        for name, edit in edits.items()
    }
    tallies = bench.run(made, "steering", **settings)
    original = tallies.pop("original").result()
    rows = []
    for latent in latents:
        found = []
        for strength in strengths:
            figures = tallies[f"{latent} {strength}"].result()
            # A factor makes another activation of each.
            value = None if unit == "factor" else strength * unit_of[latent]
            found.append({"strength": strength, "activation": value, **figures})
        rows.append(
            {
                "latent": int(latent),
                "name": (names or {}).get(int(latent)),
                "unit": unit_of[latent],
                "density": float(each_class.density[latent]),
                "strengths": found,
            }
        )
    shown = []
    if curves and "curves" not in omitted:
        shown = class_curves(bench, sae, where, plan.tokens, each_class, asked_ks, seed, **settings)
    about = {
        "model": {"id": model.id, "weights_hash": model.weights_hash},
        "sae": sae.fingerprint(),
        "site": where,
        "tokens": plan.tokens,
        "images": images.spec,
        "templates": templates if isinstance(templates, str) else list(templates),
        "n_classes": len(by_label),
        "n_choose": int(each_class.n_images.sum()),
        "n_measure": sum(map(len, halves.measure.values())) - bench.failed,
        "failed": each_class.failed + bench.failed,
        "strength": unit,
        "seed": seed,
    }
    return SteerReport(about, original, rows, shown, omitted)


def _units(found: ClassCodes, latents: Sequence[int], unit: Unit) -> dict[int, float]:
    """The activation that a strength of 1 stands for."""
    if unit != "max":
        return dict.fromkeys(latents, 1.0)
    units = {latent: float(found.highest[latent]) for latent in latents}
    never = [latent for latent, value in units.items() if value <= 0]
    if never:
        raise UserError(
            f"Latent {never[0]} is not active on any of the {int(found.n_images.sum())} images "
            "that its largest activation is taken from. Take more images, or unit 'absolute'."
        )
    return units


def _check_strengths(strengths: Sequence[float]) -> None:
    if not strengths or not all(math.isfinite(each) for each in strengths):
        raise UserError(f"strengths are {tuple(strengths)}; give finite numbers, at least one.")
    if len(set(strengths)) < len(strengths):
        raise UserError(f"strengths are {tuple(strengths)}; one is given twice.")


def _position(model: VisionModel, site: str, tokens: Positions) -> Positions:
    return "all" if model.token_count(site, "all") == 1 else tokens


def _omitted(
    model: VisionModel,
    images: ImageSource,
    by_label: Mapping[str, str],
    known: Sequence[str],
    captions: Mapping[int, str],
    curves: bool,
) -> dict[str, str]:
    if not model.has_text:
        raise UserError(
            f"{model.id} has no text tower, so that there are no probabilities and no retrieval."
        )
    omitted = {}
    if not known:
        reason = f"{images.spec} has no labels." if not by_label else "No image has a known label."
        omitted["accuracy"] = reason
        if curves:
            omitted["curves"] = reason
    if not by_label:
        omitted["probabilities"] = f"{images.spec} has no labels, and class_names was not given."
    if len(set(captions.values())) < 2:
        omitted["retrieval"] = f"{images.spec} has no captions."
    if not by_label and "retrieval" in omitted:
        raise UserError(
            f"{images.spec} has neither labels nor captions: there is nothing to measure. Give "
            "class_names, or a table of labels."
        )
    return omitted
