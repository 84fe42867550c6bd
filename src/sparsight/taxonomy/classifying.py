"""`classify`: the kind of every latent of several SAEs of the same model and images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.activations import ActivationSource
from sparsight.config import check_positive, check_seed
from sparsight.errors import SparsightError, UserError
from sparsight.evaluation.baselines import untrained
from sparsight.evaluation.data import Passes, find_site
from sparsight.evaluation.scenes import TruthSource
from sparsight.evaluation.truth import MIN_SCENES, truth_table
from sparsight.images import ImageError, ImageSource
from sparsight.latents.code_shards import CodeBatch
from sparsight.latents.image_maxima import image_maxima
from sparsight.latents.image_records import image_records
from sparsight.progress import progress
from sparsight.sae import SparseAutoencoder, SparseCode
from sparsight.taxonomy.deciding import Rule, decide, gate_threshold
from sparsight.taxonomy.evidence import Evidence
from sparsight.taxonomy.kinds import TRUTH_KINDS, Kinds
from sparsight.taxonomy.looks import Looks, looks_of
from sparsight.taxonomy.measuring import Measures, Measuring
from sparsight.vision.geometry import seen_picture

MAX_IMAGES = 4000
TRUTH_F1 = 0.5
INIT_VECTORS = 4096
USUAL_K = 32
"""Active latents per vector of an untrained SAE whose sparsity does not set their number."""


@dataclass(frozen=True)
class LayerKinds:
    """The kinds of one SAE's latents.

    Attributes:
        name: name of the run.
        site: where in the model the SAE reads.
        sae: fingerprint of the SAE.
        kind: kind of each latent: by truth where it is known, otherwise by the rule.
        source: where each kind comes from: "truth", "name", "label" or "spatial" (the rule).
        by_rule: kind of each latent by the rule alone, which knows no truth, label or name.
        truth: latent → `attribute`, `f1`, …, for latents with an F1 of `TRUTH_F1` or more.
        measures: what the rule is based on.
        threshold: least score of the gate.
        null_share: share of the latents of a second untrained SAE that the rule gives a kind.
        activity: each latent's strongest activation in each image, `[images, n_latents]`, sparse.
        n_images: number of images.
    """

    name: str
    site: str
    sae: str
    kind: Kinds
    source: Kinds
    by_rule: Kinds
    truth: Mapping[int, Mapping[str, Any]]
    measures: Measures
    threshold: float
    null_share: float
    activity: Tensor = field(repr=False)
    n_images: int

    @property
    def n_latents(self) -> int:
        """Number of latents of the SAE."""
        return len(self.kind)

    def agreement(self, least_f1: float = TRUTH_F1) -> tuple[int, int]:
        """Return on how many latents with a known kind the rule agrees, and their number.

        Args:
            least_f1: least F1 of the attribute for a kind to count as known.
        """
        known = [latent for latent, about in self.truth.items() if about["f1"] >= least_f1]
        hits = sum(self.by_rule[i] == truth_kind(self.truth[i]) for i in known)
        return hits, len(known)


def truth_kind(about: Mapping[str, Any]) -> str | None:
    """Return the kind of an attribute of ground truth; None if its kind is not known."""
    return TRUTH_KINDS.get(str(about["attribute"]).split("/")[0])


@torch.no_grad()
def classify(
    layers: Mapping[str, tuple[SparseAutoencoder, ActivationSource]],
    *,
    rule: Rule | None = None,
    truth: bool = True,
    evidence: Mapping[str, Evidence] | None = None,
    max_images: int | None = MAX_IMAGES,
    seed: int = 0,
    quiet: bool = False,
) -> list[LayerKinds]:
    """Find the kind of every latent of several SAEs, e.g. one per layer.

    Args:
        layers: by name, each SAE and activations for it; all of one model on the same images.
        rule: thresholds; see `Rule`.
        truth: use ground truth where the images have one (`calibration:…`).
        evidence: by name of the layer, what names and labels say; see `Evidence.of`.
        max_images: size of the random sample of images; None for all. Memory holds two numbers per
            patch and one per active latent of each image.
        seed: seed of the sample and of the untrained SAEs.
        quiet: show no progress bars.

    Raises:
        UserError: no layers, layers of different models or images, or too few images.
        SparsightError: an activation is not finite.
    """
    check_positive(max_images=max_images)
    check_seed(seed)
    check_layers(layers)
    rule, found = rule or Rule(), []
    looks: dict[int, tuple[Tensor, Tensor]] = {}
    for name, (sae, given) in layers.items():
        site = find_site(sae, given, None)
        passes = Passes(given, site, max_images=max_images, seed=seed)
        pixels = _Pixels.of(given, passes.layout.grid, looks)
        sample = passes.first_vectors(INIT_VECTORS)
        nulls = [untrained(sae, sample, seed + i, USUAL_K) for i in (1, 2)]
        with progress(f"taxonomy of {name}", passes.n_images, "images", quiet=quiet) as line:
            (own, first, second), activity = _measured([sae, *nulls], passes, pixels, line)
        threshold = gate_threshold(first, rule)
        known = _truth(sae, passes, given, seed) if truth else {}
        by_rule = decide(own, threshold, rule)
        kind, source = _final(by_rule, known, (evidence or {}).get(name, Evidence()), name)
        null_kinds = decide(second, threshold, rule)[second.images > 0]
        null_share = float((null_kinds != "none").mean()) if len(null_kinds) else 0.0
        found.append(
            LayerKinds(
                name, site, sae.fingerprint(), kind, source, by_rule, known, own, threshold,
                null_share, activity, activity.shape[0],
            )
        )  # fmt: skip
    return found


def check_layers(layers: Mapping[str, tuple[SparseAutoencoder, ActivationSource]]) -> None:
    """Raise a `UserError` unless all activations are of one model on the same images."""
    if not layers:
        raise UserError("No SAE given: name at least one run.")
    facts = {
        name: (given.model_info.get("weights_hash"), image_records(given).fingerprint)
        for name, (_, given) in layers.items()
    }
    (first, one), *others = facts.items()
    for name, other in others:
        for what, a, b in zip(("model", "images"), one, other, strict=True):
            if a != b:
                raise UserError(
                    f"{first} and {name} are of different {what}: layers can only be compared on "
                    "the same model and images. Name runs of one model, or give --store or "
                    "--images for all of them."
                )


def _final(
    by_rule: Kinds,
    known: Mapping[int, Mapping[str, Any]],
    evidence: Evidence,
    name: str,
) -> tuple[Kinds, Kinds]:
    """Return kinds and their sources: truth comes before names, these before labels and the rule.

    A label makes an object, unless the rule says that the latent is about text or a position.
    """
    kind, source = by_rule.copy(), np.full(len(by_rule), "spatial", dtype="<U10")
    truths = {i: truth_kind(about) for i, about in known.items()}
    for latent in (*evidence.names, *evidence.labels):
        if not 0 <= latent < len(kind):
            raise UserError(f"{name}: no latent {latent}; it has 0 to {len(kind) - 1}.")
    labelled = {i: "object" for i in evidence.labels if by_rule[i] not in ("text", "position")}
    for origin, kinds in (("label", labelled), ("name", evidence.names), ("truth", truths)):
        for latent, value in kinds.items():
            if value is not None:
                kind[latent], source[latent] = value, origin
    return kind, source


class _Pixels:
    """Colours and textures of the images' patches, computed once for all layers."""

    def __init__(
        self,
        source: ImageSource,
        preprocessing: Mapping[str, Any],
        grid: tuple[int, int],
        known: dict[int, tuple[Tensor, Tensor]],
    ) -> None:
        self.source, self.preprocessing, self.grid = source, preprocessing, grid
        self.known = known

    @classmethod
    def of(
        cls,
        given: ActivationSource,
        grid: tuple[int, int] | None,
        known: dict[int, tuple[Tensor, Tensor]],
    ) -> _Pixels:
        about = given.model_info
        preprocessing = about.get("preprocessing") or {}
        # SAEs on CLS or means have no patches, but the images' main colours are known all the same.
        grid = grid or tuple(about.get("patch_grid") or (8, 8))
        assert grid is not None
        return cls(given.source(), preprocessing, grid, known)

    def looks(self, places: Tensor) -> Looks:
        """Return the looks of the images at these places.

        Raises:
            UserError: an image can no longer be read, or it is unknown what the model saw of it.
        """
        for place in places.tolist():
            if place not in self.known:
                looks = looks_of(self._pixels(place)[None], self.grid)
                self.known[place] = looks.colour[0].short(), looks.texture[0].short()
        colours, textures = zip(*(self.known[place] for place in places.tolist()), strict=True)
        return Looks(torch.stack(colours).long(), torch.stack(textures).long())

    def _pixels(self, place: int) -> Tensor:
        side = self.preprocessing.get("jpeg_min_side")
        try:
            image = self.source.load(place, min_side=side) if side else self.source.load(place)
        except ImageError as error:
            raise UserError(
                f"{self.source.known(place).id}: can no longer be read ({error.reason})."
            ) from error
        seen = seen_picture(image, self.preprocessing)
        if seen is None:
            raise UserError(
                "The model's preprocessing is not known well enough to see which pixels are under "
                "which patch, so colours and textures cannot be measured."
            )
        return torch.from_numpy(np.array(seen.convert("RGB")))


def _measured(
    saes: list[SparseAutoencoder], passes: Passes, pixels: _Pixels, line: Any
) -> tuple[list[Measures], Tensor]:
    """Measure several SAEs in one pass; also return the activity of the first."""
    layout = passes.layout
    measuring = [Measuring(sae.n_latents, layout.n_tokens, layout.grid) for sae in saes]
    activity: list[Tensor] = []
    for batch in passes:
        looks = pixels.looks(batch.images)
        for number, (sae, measure) in enumerate(zip(saes, measuring, strict=True)):
            code = sae.encode(batch.x.flatten(0, 1))
            if not bool(torch.isfinite(code.values).all()):
                raise SparsightError(
                    f"{passes.site}: an activation is NaN or infinite in images "
                    f"{int(batch.images[0])} to {int(batch.images[-1])}."
                )
            measure.add(CodeBatch(batch.images, code, layout.n_tokens), looks)
            if number == 0:
                activity.append(peaks_of(code, layout.n_tokens))
        line.advance(len(batch.images))
    if not activity:
        raise UserError("No images to classify by: the source is empty.")
    return [measure.result() for measure in measuring], torch.cat(activity).coalesce()


def peaks_of(code: SparseCode, n_tokens: int) -> Float[Tensor, "images n_latents"]:
    """Return each latent's strongest activation in each image, as a sparse matrix."""
    maxima = image_maxima(code, n_tokens)
    where = torch.stack([maxima.image, maxima.latent]).cpu()
    shape = (len(code) // n_tokens, code.n_latents)
    return torch.sparse_coo_tensor(where, maxima.value.cpu(), shape, check_invariants=False)


def _truth(
    sae: SparseAutoencoder, passes: Passes, given: ActivationSource, seed: int
) -> dict[int, Mapping[str, Any]]:
    images = given.source()
    if not isinstance(images, TruthSource) or passes.n_images < MIN_SCENES:
        return {}
    names = truth_table(sae.encode, passes, images, seed=seed).names
    return {latent: about for latent, about in names.items() if about["f1"] >= TRUTH_F1}
