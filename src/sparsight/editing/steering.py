"""Turn latents up and down, and see what the model makes of the pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from sparsight.config import check_positive
from sparsight.editing.actions import Off, Scale, Set
from sparsight.editing.bench import Bench, Halves, Tally
from sparsight.editing.changes import CodeMemo
from sparsight.editing.class_codes import ClassCodes, class_codes
from sparsight.editing.class_curves import checked_ks, class_curves
from sparsight.editing.edits import NO_SITE, LatentEdit, Positions
from sparsight.editing.interventions import Intervention, check_site, interventions
from sparsight.editing.steering_table import rows_of
from sparsight.errors import UserError
from sparsight.evaluation.report import finite
from sparsight.images import ImageSource
from sparsight.notebooks import data_frame
from sparsight.sae import SparseAutoencoder
from sparsight.vision import PassSettings, VisionModel, classifier_weights, names_by_label

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
    said = _Said.by(images, class_names)
    omitted = _omitted(model, images, said, curves)
    curves = curves and "curves" not in omitted
    plan = LatentEdit(sae, list(latents), Off(), site, tokens)
    _check_plan(plan, curves)
    _check_strengths(strengths)
    where = check_site(model, plan, check=check)
    assert plan.tokens is not None
    settings = PassSettings(batch_images, workers, quiet)
    position = _position(model, where, plan.tokens)
    codes = class_codes(model, images, sae, where, position, said.halves.choose, settings)
    sentences = list(said.by_label.values())
    weights = classifier_weights(model, sentences, templates) if sentences else None
    bench = Bench(model, images, where, said.halves, said.by_label, weights, said.captions)

    edits = _Edits(sae, where, plan.tokens, strengths, unit, _units(codes, latents, unit), check)
    tallies = bench.run(edits.made(model), "steering", settings=settings)
    rows = [
        {
            "latent": int(latent),
            "name": (names or {}).get(int(latent)),
            "unit": edits.units[latent],
            "density": float(codes.density[latent]),
            "strengths": edits.figures(latent, tallies),
        }
        for latent in latents
    ]
    shown = []
    if curves:
        shown = class_curves(bench, sae, where, plan.tokens, codes, asked_ks, seed, settings)
    measured = sum(map(len, said.halves.measure.values())) - bench.failed
    about = {
        "model": {"id": model.id, "weights_hash": model.weights_hash},
        "sae": sae.fingerprint(),
        "site": where,
        "tokens": plan.tokens,
        "images": images.spec,
        "templates": templates if isinstance(templates, str) else list(templates),
        "n_classes": len(said.by_label),
        "n_choose": int(codes.n_images.sum()),
        "n_measure": measured,
        "failed": codes.failed + bench.failed,
        "strength": unit,
        "seed": seed,
    }
    return SteerReport(about, tallies["original"].result(), rows, shown, omitted)


@dataclass(frozen=True)
class _Said:
    """What the images say of themselves, and which of them are for what."""

    by_label: dict[str, str]
    known: list[str]
    halves: Halves
    captions: dict[int, str]

    @classmethod
    def by(
        cls, images: ImageSource, class_names: Sequence[str] | Mapping[str, str] | None
    ) -> _Said:
        """Read labels and captions; `class_names` say which labels count."""
        infos = [images.known(i) for i in range(len(images))]
        labels = sorted({info.label for info in infos if info.label})
        by_label = names_by_label(labels, class_names)
        known = [label for label in by_label if label in set(labels)]
        return cls(
            by_label,
            known,
            Halves.of([info.label for info in infos], known),
            {i: info.caption for i, info in enumerate(infos) if info.caption},
        )


@dataclass(frozen=True)
class _Edits:
    """Each latent at each strength.

    Attributes:
        units: by latent, the activation that a strength of 1 stands for.
    """

    sae: SparseAutoencoder
    site: str
    tokens: Positions
    strengths: Sequence[float]
    unit: Unit
    units: dict[int, float]
    check: bool

    def made(self, model: VisionModel) -> dict[str, Intervention]:
        """Ready to be applied, by `_key`; they share their codes."""
        memo = CodeMemo()
        return {
            _key(latent, strength): interventions(
                model, self._edit(latent, strength), check=self.check, memo=memo
            )[self.site]
            for latent in self.units
            for strength in self.strengths
        }

    def figures(self, latent: int, tallies: Mapping[str, Tally]) -> list[dict[str, Any]]:
        """Of a latent, by strength."""
        figures = []
        for strength in self.strengths:
            # A factor makes another activation of each.
            value = None if self.unit == "factor" else strength * self.units[latent]
            found = tallies[_key(latent, strength)].result()
            figures.append({"strength": strength, "activation": value, **found})
        return figures

    def _edit(self, latent: int, strength: float) -> LatentEdit:
        factor = self.unit == "factor"
        action = Scale(strength) if factor else Set(strength * self.units[latent])
        return LatentEdit(self.sae, [latent], action, self.site, self.tokens)


def _key(latent: int, strength: float) -> str:
    return f"{latent} {strength}"


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


def _check_plan(plan: LatentEdit, curves: bool) -> None:
    if plan.site is None:
        raise UserError(NO_SITE)
    if not plan.latents and not curves:
        raise UserError(
            "Nothing to steer: name latents (by number or by name), or take images with labels, "
            "for which the curves of their classes can be drawn."
        )


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
    said: _Said,
    curves: bool,
) -> dict[str, str]:
    if not model.has_text:
        raise UserError(
            f"{model.id} has no text tower, so that there are no probabilities and no retrieval."
        )
    omitted = {}
    if not said.known:
        reason = (
            f"{images.spec} has no labels." if not said.by_label else "No image has a known label."
        )
        omitted["accuracy"] = reason
        if curves:
            omitted["curves"] = reason
    if not said.by_label:
        omitted["probabilities"] = f"{images.spec} has no labels, and class_names was not given."
    if len(set(said.captions.values())) < 2:
        omitted["retrieval"] = f"{images.spec} has no captions."
    if not said.by_label and "retrieval" in omitted:
        raise UserError(
            f"{images.spec} has neither labels nor captions: there is nothing to measure. Give "
            "class_names, or a table of labels."
        )
    return omitted
