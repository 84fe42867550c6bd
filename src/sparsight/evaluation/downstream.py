"""What the model can still do with a site replaced: zero-shot accuracy, KL, contrastive loss.

All replacements are measured on the same images in one pass over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sparsight.errors import UserError
from sparsight.images import ImageInfo, ImageSource
from sparsight.intervals import paired_difference
from sparsight.vision import (
    ImagePass,
    PassSettings,
    VisionModel,
    ZeroShotTally,
    classifier_weights,
    classify,
    contrastive_loss,
    embed_variants,
    names_by_label,
)

CONTRASTIVE_BATCH = 256
"""Images (and captions) in one batch of the contrastive loss; chance is ln 256 = 5.55 nats."""

Replacement = Callable[[Tensor], Tensor]
"""A function from vectors `[n, d_in]` of a site, float32, to their replacements."""


@dataclass(frozen=True)
class Downstream:
    """The figures of each variant, and why some are missing.

    Attributes:
        zero_shot: zero-shot figures by variant, `original` first; empty if left out.
        contrastive: contrastive figures by variant; empty if left out.
        omitted: what was left out, and why.
    """

    zero_shot: dict[str, dict[str, Any]]
    contrastive: dict[str, dict[str, Any]]
    omitted: dict[str, str]


def why_not(model: VisionModel | None, images: ImageSource | None, tokens: str) -> str | None:
    """Return the reason why nothing can be measured downstream; None if it can."""
    if tokens == "mean":
        return "The mean over patches is not a position of the model, so it cannot be replaced."
    if model is None:
        return "No model was given; give model=sp.load_model(…)."
    if not model.has_text:
        return f"{model.id} has no text tower."
    if images is None:
        return "The images are not available; give images=…."
    return None


@torch.no_grad()
def downstream(
    model: VisionModel,
    images: ImageSource,
    site: str,
    tokens: str,
    replacements: Mapping[str, Replacement],
    *,
    class_names: Sequence[str] | Mapping[str, str] | None = None,
    templates: str | Sequence[str] = "simple",
    limit: int | None = None,
    seed: int = 0,
    batch_images: int = 64,
    workers: int | None = None,
    quiet: bool = True,
) -> Downstream:
    """Measure the unchanged model, and the model with each replacement at a site.

    Args:
        model: a model with a text tower.
        images: the images; labels give zero-shot accuracy, captions contrastive loss.
        site: the site to replace.
        tokens: the positions to replace: `all`, `patches` or `cls`.
        replacements: the replacements, by name.
        class_names: labels, or a mapping from label to the name in the sentence; default: the
            labels of `images`, with spaces for underscores.
        templates: see `sparsight.vision.classifier_weights`.
        limit: size of a random sample of images; default: all images.
        seed: seed of the sample.
        batch_images: images per batch.
        workers: processes that decode images.
        quiet: show no progress line.
    """
    whole = images
    images = whole if limit is None else whole.sample(limit, seed)
    infos = [images.known(i) for i in range(len(images))]
    own = sorted({info.label for info in infos if info.label})
    names = names_by_label(own if images is whole else whole.labels(), class_names)
    numbers = {label: i for i, label in enumerate(names)}
    captions = {i: info.caption for i, info in enumerate(infos) if info.caption}
    omitted = _omitted(infos, numbers, len(captions))
    if len(omitted) == 2:
        return Downstream({}, {}, omitted)

    edits = {
        name: replacing(function, model, site, tokens) for name, function in replacements.items()
    }
    variants = _Variants(model, site, tokens, edits)
    zero_shot = None
    if "zero_shot" not in omitted:
        weights = classifier_weights(model, list(names.values()), templates)
        zero_shot = _ZeroShot(list(names), variants.names, weights, model.logit_scale)
    contrastive = _Contrastive(model, variants.names, len(captions))
    classes = {i: numbers.get(info.label or "", -1) for i, info in enumerate(infos)}
    wanted = {i: n for i, n in classes.items() if (zero_shot and n >= 0) or i in captions}
    settings = PassSettings(batch_images, workers, quiet)
    with ImagePass(model, images, "downstream", settings, classes=wanted) as seen:
        for batch in seen:
            found = variants.embed(batch.pixels.to(model.device))
            if zero_shot is not None:
                zero_shot.add(found, seen.classes_of(batch))
            contrastive.add(found, [captions.get(i) for i in batch.indices])
    shots: dict[str, dict[str, Any]] = {}
    if zero_shot is not None:
        unlabelled = sum(info.label is None for info in infos)
        unknown = sum(info.label is not None and info.label not in numbers for info in infos)
        shots = zero_shot.result(unlabelled, unknown, len(seen.failures))
    return Downstream(shots, {} if "contrastive" in omitted else contrastive.result(), omitted)


def _omitted(
    infos: Sequence[ImageInfo], numbers: Mapping[str, int], n_captions: int
) -> dict[str, str]:
    """Return the figures that these images cannot give, and why."""
    omitted: dict[str, str] = {}
    if not numbers:
        omitted["zero_shot"] = "The images have no labels, and class_names was not given."
    elif not any(info.label in numbers for info in infos):
        omitted["zero_shot"] = "None of the images' labels is among the classes."
    if n_captions < 2:
        omitted["contrastive"] = "The images have no captions."
    return omitted


class _Variants:
    """Embeds images with the unchanged model and with each replacement.

    An ablation whose output does not depend on the image runs on one batch only.
    """

    def __init__(
        self, model: VisionModel, site: str, tokens: str, edits: Mapping[str, Replacement]
    ) -> None:
        self.model, self.site, self.tokens = model, site, tokens
        self.edits = dict(edits)
        self.names = ["original", *edits]
        self._constant: dict[str, Tensor] = {}

    def embed(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> dict[str, Float[Tensor, "batch d_embed"]]:
        """Return the embeddings by variant, `original` first."""
        edits = {name: edit for name, edit in self.edits.items() if name not in self._constant}
        found = embed_variants(self.model, pixels, self.site, edits)
        found |= {name: row.expand(len(pixels), -1) for name, row in self._constant.items()}
        for name in edits:
            if _is_constant(name, self.site, self.tokens, found[name]):
                self._constant[name] = found[name][:1]
        return found


def replacing(function: Replacement, model: VisionModel, site: str, tokens: str) -> Replacement:
    """Return an edit of `model` that applies `function` to the vectors of some positions."""
    only_one = model.token_count(site, "cls" if model.has_cls else "all") == 1 and (
        model.token_count(site, "all") == 1
    )
    where = {
        "all": slice(None),
        "patches": slice(model.n_prefix, None),
        "cls": slice(0, 1),
    }.get(tokens)
    if where is None:
        raise UserError(f"tokens={tokens!r} cannot be replaced; 'all', 'patches' and 'cls' can.")
    if only_one:
        where = slice(None)

    def edit(x: Tensor) -> Tensor:
        part = x[:, where]
        new = function(part.flatten(0, 1).float()).view(part.shape).to(x)
        if part.shape == x.shape:
            return new
        out = x.clone()
        out[:, where] = new
        return out

    return edit


class _ZeroShot:
    """Zero-shot tallies of each variant, and paired counts against the original."""

    def __init__(
        self, classes: list[str], variants: list[str], weights: Tensor, logit_scale: float
    ) -> None:
        self.weights, self.logit_scale = weights, logit_scale
        self.tallies = {name: ZeroShotTally(classes) for name in variants}
        self.kl = dict.fromkeys(variants, 0.0)
        self.lost = dict.fromkeys(variants, 0)
        self.won = dict.fromkeys(variants, 0)

    def add(self, found: Mapping[str, Tensor], targets: Tensor) -> None:
        """Count a batch; −1 marks an image without a known label."""
        known = targets >= 0
        if not bool(known.any()):
            return
        targets = targets[known]
        here = known.to(self.weights.device)
        logits = {
            name: classify(x[here], self.weights, self.logit_scale).double().cpu()
            for name, x in found.items()
        }
        original = logits["original"].log_softmax(dim=1)
        right = _best(logits["original"]) == targets
        for name, each in logits.items():
            self.tallies[name].update(each, targets)
            now = _best(each) == targets
            self.lost[name] += int((right & ~now).sum())
            self.won[name] += int((now & ~right).sum())
            divergence = original.exp() * (original - each.log_softmax(dim=1))
            self.kl[name] += float(divergence.sum())

    def result(self, unlabelled: int, unknown: int, failed: int) -> dict[str, dict[str, Any]]:
        """Return the figures by variant."""
        counts = {"unlabelled": unlabelled, "unknown_label": unknown, "failed": failed}
        results = {name: tally.result(**counts) for name, tally in self.tallies.items()}
        top1 = results["original"].top1
        out = {}
        for name, result in results.items():
            out[name] = result.to_dict()
            del out[name]["per_class"]
            if name == "original":
                continue
            difference, interval = paired_difference(self.lost[name], self.won[name], result.n)
            out[name] |= {
                "preserved": result.top1 / top1 if top1 else None,
                "difference": difference,
                "difference_interval": interval,
                "kl": max(0.0, self.kl[name] / result.n),
            }
        return out


class _Contrastive:
    """Contrastive loss over batches of `CONTRASTIVE_BATCH` images, whatever batches are added."""

    def __init__(self, model: VisionModel, variants: list[str], n_captions: int) -> None:
        self.model = model
        self.size = min(CONTRASTIVE_BATCH, n_captions)
        self.loss = dict.fromkeys(variants, 0.0)
        self.n = 0
        self._texts: list[str] = []
        self._waiting: dict[str, list[Tensor]] = {name: [] for name in variants}

    def add(self, found: Mapping[str, Tensor], captions: Sequence[str | None]) -> None:
        """Count a batch; images without a caption are left out."""
        rows = [i for i, caption in enumerate(captions) if caption]
        self._texts += [caption for caption in captions if caption]
        for name, x in found.items():
            self._waiting[name] += list(x[rows])
        while self.size > 1 and len(self._texts) >= self.size:
            text = self.model.embed_texts(self._texts[: self.size])
            for name, rows_of in self._waiting.items():
                loss = contrastive_loss(
                    torch.stack(rows_of[: self.size]), text, self.model.logit_scale
                )
                self.loss[name] += float(loss)
                del rows_of[: self.size]
            del self._texts[: self.size]
            self.n += 1

    def result(self) -> dict[str, dict[str, Any]]:
        """Return the figures by variant; images that do not fill a last batch are only counted."""
        if not self.n:
            return {}
        mean = {name: loss / self.n for name, loss in self.loss.items()}
        about = {"n": self.n * self.size, "batch": self.size, "left_over": len(self._texts)}
        out: dict[str, dict[str, Any]] = {
            name: {"loss": loss, **about} for name, loss in mean.items()
        }
        for name in mean:
            if name in ("original", "zero", "mean"):
                continue
            for ablation in ("zero", "mean"):
                if ablation in mean:
                    lost = mean[ablation] - mean["original"]
                    recovered = (mean[ablation] - mean[name]) / lost if abs(lost) > 1e-9 else None
                    out[name][f"recovered_{ablation}"] = recovered
        return out


def _best(logits: Float[Tensor, "batch classes"]) -> Tensor:
    """Return the class with the highest logit; the first of equals, like `ZeroShotTally`."""
    return logits.argsort(dim=1, descending=True, stable=True)[:, 0]


def _is_constant(
    name: str, site: str, tokens: str, embeddings: Float[Tensor, "batch d_embed"]
) -> bool:
    """Return whether an ablation removes the image altogether, so that it needs to run only once.

    This holds if every position of the residual stream becomes the same vector; a batch confirms it
    first.
    """
    if name not in ("zero", "mean") or tokens != "all" or len(embeddings) < 2:
        return False
    if not (".resid_" in site or site in ("embedding", "final_norm")):
        return False
    unit = functional.normalize(embeddings, dim=1)
    return bool((unit - unit[:1]).abs().max() < 1e-4)
