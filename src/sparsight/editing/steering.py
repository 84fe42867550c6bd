"""Turn latents up and down, and measure what the model makes of the images."""

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
"""What a strength of 1 means: the latent's largest activation; an activation of 1; or a factor on
its activation."""


@dataclass(frozen=True)
class SteerReport:
    """The results of steering.

    Attributes:
        about: model, SAE, site, tokens, images, sentences, number of images.
        original: figures of the model as it is.
        latents: for each latent, a list of figures by strength.
        curves: figures with only the k strongest latents of each class, or without them; empty if
            omitted.
        omitted: what was omitted, and why.
    """

    about: dict[str, Any]
    original: dict[str, Any]
    latents: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    omitted: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        values: dict[str, Any] = finite(vars(self))  # large strengths may overflow the model
        return values

    def table(self) -> list[dict[str, Any]]:
        """Return the rows of `steer.csv`: the model as it is, latents by strength, the curves."""
        return list(rows_of(self.original, self.latents, self.curves))

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows of `table` as a pandas data frame.

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
    """Measure how latents affect zero-shot classification and retrieval.

    Steering measures zero-shot probabilities and retrieval over a range of strengths of each given
    latent; the curves measure accuracy with only, or without, the latents of each class. Half of
    the images of each class are used to choose (the classes' latents, the largest activations), the
    other half to measure.

    The curves are those of PatchSAE (Lim et al. 2025, "Sparse autoencoders reveal selective
    remapping of visual concepts during adaptation", section 3.3): a class's latents are those with
    the largest mean activation over its images; on-k keeps only the first k of them, off-k switches
    them off, and accuracy is over all classes. They are compared with as many random latents of
    equal density. Edits keep what the SAE does not reconstruct.

    Args:
        model: a model with a text tower.
        images: images, with labels for the probabilities of their own class and with captions for
            retrieval.
        sae: an autoencoder.
        latents: latents to steer, each by itself.
        strengths: strengths in `unit`; 0 switches a latent off (also in unit "factor").
        unit: see `Unit`; "max" and "absolute" set the latent at every edited position.
        site: site of the edit; default: that of the SAE.
        tokens: edited positions; default: those of the SAE.
        class_names: see `sparsight.vision.zero_shot`.
        templates: see `sparsight.vision.classifier_weights`.
        curves: also measure the on-k and off-k curves.
        ks: the values of k; default: 1, 2, 5, 10, … and all latents.
        names: names of latents, for the report.
        max_images: size of a random sample of the images; default: all images.
        batch_images: images at a time.
        workers: processes that decode.
        seed: seed of the sample and of the random latents.
        check: see `intervene`.
        quiet: show no progress line.

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
    rows = edits.rows(latents, names or {}, codes, tallies)
    points = []
    if curves:
        points = class_curves(bench, sae, where, plan.tokens, codes, asked_ks, seed, settings)
    about = _about(edits, bench, said, codes, templates, seed)
    return SteerReport(about, tallies["original"].result(), rows, points, omitted)


def _about(
    edits: _Edits,
    bench: Bench,
    said: _Said,
    codes: ClassCodes,
    templates: str | Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Record what was steered, and on how many images."""
    return {
        "model": {"id": bench.model.id, "weights_hash": bench.model.weights_hash},
        "sae": edits.sae.fingerprint(),
        "site": edits.site,
        "tokens": edits.tokens,
        "images": bench.images.spec,
        "templates": templates if isinstance(templates, str) else list(templates),
        "n_classes": len(said.by_label),
        "n_choose": int(codes.n_images.sum()),
        "n_measure": sum(map(len, said.halves.measure.values())) - bench.failed,
        "failed": codes.failed + bench.failed,
        "strength": edits.unit,
        "seed": seed,
    }


@dataclass(frozen=True)
class _Said:
    """The images' labels and captions, and which images are used for what."""

    by_label: dict[str, str]
    known: list[str]
    halves: Halves
    captions: dict[int, str]

    @classmethod
    def by(
        cls, images: ImageSource, class_names: Sequence[str] | Mapping[str, str] | None
    ) -> _Said:
        """Read labels and captions; `class_names` determines which labels count."""
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
        """Return the interventions by `_key`; they share their codes."""
        memo = CodeMemo()
        return {
            _key(latent, strength): interventions(
                model, self._edit(latent, strength), check=self.check, memo=memo
            )[self.site]
            for latent in self.units
            for strength in self.strengths
        }

    def figures(self, latent: int, tallies: Mapping[str, Tally]) -> list[dict[str, Any]]:
        """Return the figures of a latent, by strength."""
        figures = []
        for strength in self.strengths:
            # With a factor, the activation differs between vectors.
            value = None if self.unit == "factor" else strength * self.units[latent]
            found = tallies[_key(latent, strength)].result()
            figures.append({"strength": strength, "activation": value, **found})
        return figures

    def rows(
        self,
        latents: Sequence[int],
        names: Mapping[int, str],
        codes: ClassCodes,
        tallies: Mapping[str, Tally],
    ) -> list[dict[str, Any]]:
        """Return for each latent its name, unit, density and figures."""
        return [
            {
                "latent": int(latent),
                "name": names.get(int(latent)),
                "unit": self.units[latent],
                "density": float(codes.density[latent]),
                "strengths": self.figures(latent, tallies),
            }
            for latent in latents
        ]

    def _edit(self, latent: int, strength: float) -> LatentEdit:
        factor = self.unit == "factor"
        action = Scale(strength) if factor else Set(strength * self.units[latent])
        return LatentEdit(self.sae, [latent], action, self.site, self.tokens)


def _key(latent: int, strength: float) -> str:
    return f"{latent} {strength}"


def _units(found: ClassCodes, latents: Sequence[int], unit: Unit) -> dict[int, float]:
    """Return the activation that a strength of 1 stands for, by latent."""
    if unit != "max":
        return dict.fromkeys(latents, 1.0)
    units = {latent: float(found.highest[latent]) for latent in latents}
    never = [latent for latent, value in units.items() if value <= 0]
    if never:
        raise UserError(
            f"Latent {never[0]} is not active on any of the {int(found.n_images.sum())} images "
            "used to find its largest activation. Use more images, or unit 'absolute'."
        )
    return units


def _check_plan(plan: LatentEdit, curves: bool) -> None:
    if plan.site is None:
        raise UserError(NO_SITE)
    if not plan.latents and not curves:
        raise UserError(
            "Nothing to steer: give latents (by number or by name), or images with labels, whose "
            "classes give curves."
        )


def _check_strengths(strengths: Sequence[float]) -> None:
    if not strengths or not all(math.isfinite(strength) for strength in strengths):
        raise UserError(f"strengths are {tuple(strengths)}; give at least one, all finite.")
    if len(set(strengths)) < len(strengths):
        raise UserError(f"strengths are {tuple(strengths)}; give each only once.")


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
            f"{model.id} has no text tower, which probabilities and retrieval need. Use a CLIP or "
            "SigLIP."
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
        omitted["probabilities"] = f"{images.spec} has no labels, and no class names were given."
    if len(set(said.captions.values())) < 2:
        omitted["retrieval"] = f"{images.spec} has no captions."
    if not said.by_label and "retrieval" in omitted:
        raise UserError(
            f"{images.spec} has neither labels nor captions, so there is nothing to measure. Give "
            "class_names, or a table of labels."
        )
    return omitted
