"""Zero-shot classification: compare images with class names in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.images import ImageSource
from sparsight.intervals import wilson_interval
from sparsight.vision.model import VisionModel
from sparsight.vision.passes import ImagePass, PassSettings
from sparsight.vision.templates import TEMPLATES, resolve_templates

__all__ = [
    "TEMPLATES",
    "ZeroShotResult",
    "ZeroShotTally",
    "classifier_weights",
    "classify",
    "contrastive_loss",
    "resolve_templates",
    "zero_shot",
]


@dataclass(frozen=True)
class ZeroShotResult:
    """The accuracy of a zero-shot classification.

    Attributes:
        top1: share of images whose own class scored highest.
        top5: share of images whose own class was among the best 5 (or all, if fewer).
        n: number of images scored.
        n_classes: number of classes that each image was compared with.
        interval: 95 % Wilson interval of `top1`.
        interval_top5: 95 % Wilson interval of `top5`.
        per_class: top-1 accuracy of every class that has images.
        unlabelled: images without a label, not scored.
        unknown_label: images whose label is not among the classes, not scored.
        failed: images that could not be loaded, not scored.
    """

    top1: float
    top5: float
    n: int
    n_classes: int
    interval: tuple[float, float]
    interval_top5: tuple[float, float]
    per_class: dict[str, float] = field(repr=False)
    unlabelled: int = 0
    unknown_label: int = 0
    failed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return asdict(self)


class ZeroShotTally:
    """Count hits batch by batch."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self._hits1 = torch.zeros(len(self.classes), dtype=torch.int64)
        self._hits5 = torch.zeros(len(self.classes), dtype=torch.int64)
        self._seen = torch.zeros(len(self.classes), dtype=torch.int64)

    def update(
        self, logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]
    ) -> None:
        """Count a batch; ties go to the class that comes first.

        Raises:
            SparsightError: a logit is NaN or infinite.
        """
        if not bool(logits.isfinite().all()):
            raise SparsightError("Zero-shot logits are not finite (NaN or infinity in embeddings).")
        logits, targets = logits.cpu(), targets.cpu()
        order = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
        hit = order == targets[:, None]
        self._seen += torch.bincount(targets, minlength=len(self.classes))
        for hits, mask in ((self._hits1, hit[:, 0]), (self._hits5, hit.any(dim=1))):
            hits += torch.bincount(targets[mask], minlength=len(self.classes))

    def result(
        self, *, unlabelled: int = 0, unknown_label: int = 0, failed: int = 0
    ) -> ZeroShotResult:
        """Return the accuracies so far.

        Raises:
            UserError: no image was scored.
        """
        n, hits1, hits5 = (int(x.sum()) for x in (self._seen, self._hits1, self._hits5))
        if n == 0:
            raise UserError(
                f"Zero-shot: no image could be scored ({unlabelled} without a label, "
                f"{unknown_label} with a label that is not among the {len(self.classes)} classes, "
                f"{failed} broken)."
            )
        share = self._hits1.double() / self._seen
        return ZeroShotResult(
            top1=hits1 / n,
            top5=hits5 / n,
            n=n,
            n_classes=len(self.classes),
            interval=wilson_interval(hits1, n),
            interval_top5=wilson_interval(hits5, n),
            per_class={
                name: float(share[i]) for i, name in enumerate(self.classes) if self._seen[i]
            },
            unlabelled=unlabelled,
            unknown_label=unknown_label,
            failed=failed,
        )


@torch.no_grad()
def classifier_weights(
    model: VisionModel,
    class_names: Sequence[str],
    templates: str | Sequence[str] = "simple",
    batch_size: int = 256,
) -> Float[Tensor, "classes d_embed"]:
    """Return one direction per class: the mean of its prompts' unit embeddings, normalised again.

    (Radford et al. 2021, section 3.1.4: ensembling in embedding space.)

    Args:
        model: a model with a text tower.
        class_names: as they are to appear in the sentences.
        templates: a set's name (`simple`, `openai80`), a template, or a list of templates.
        batch_size: texts embedded at a time.

    Raises:
        UserError: there are no classes, a template is bad, or the model has no text tower.
    """
    if isinstance(class_names, str) or not class_names:
        raise UserError("class_names: give a list of at least one class name.")
    sentences = resolve_templates(templates)
    prompts = [(i, s.replace("{}", name)) for i, name in enumerate(class_names) for s in sentences]
    total: Tensor | None = None
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        unit = F.normalize(model.embed_texts([text for _, text in batch]), dim=-1)
        if total is None:
            total = unit.new_zeros(len(class_names), unit.shape[1])
        total.index_add_(0, torch.tensor([i for i, _ in batch], device=unit.device), unit)
    assert total is not None
    return F.normalize(total, dim=-1)


def classify(
    embeddings: Float[Tensor, "batch d_embed"],
    weights: Float[Tensor, "classes d_embed"],
    logit_scale: float = 1.0,
) -> Float[Tensor, "batch classes"]:
    """Return the logits of images: `logit_scale` times the cosine with each class's direction.

    Args:
        embeddings: embeddings of images, normalised or not; half precision is cast to float32.
        weights: unit rows from `classifier_weights`.
        logit_scale: the model's; it changes probabilities, never the ranking. (SigLIP's bias is
            left out: it changes no ranking either.)
    """
    directions = weights.to(embeddings.device, torch.float32)
    return logit_scale * F.normalize(embeddings.float(), dim=-1) @ directions.T


def contrastive_loss(
    image_embeddings: Float[Tensor, "batch d_embed"],
    text_embeddings: Float[Tensor, "batch d_embed"],
    logit_scale: float,
) -> Float[Tensor, ""]:
    """Return CLIP's symmetric contrastive loss (InfoNCE) of matching images and captions, in nats.

    Rows i of both belong together; every other row is a negative, even with an equal caption.
    Chance is `ln(batch)`, so figures are comparable only at equal batch size.

    Args:
        image_embeddings: normalised or not.
        text_embeddings: normalised or not.
        logit_scale: the model's.

    Raises:
        UserError: the shapes differ.
    """
    if image_embeddings.shape != text_embeddings.shape:
        raise UserError(
            f"contrastive_loss: {list(image_embeddings.shape)} image embeddings against "
            f"{list(text_embeddings.shape)} text embeddings; they must match row by row."
        )
    logits = classify(image_embeddings, F.normalize(text_embeddings.float(), dim=-1), logit_scale)
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@torch.no_grad()
def zero_shot(
    model: VisionModel,
    source: ImageSource,
    class_names: Sequence[str] | Mapping[str, str] | None = None,
    templates: str | Sequence[str] = "simple",
    *,
    batch_size: int = 64,
    workers: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> ZeroShotResult:
    """Classify every labelled image of `source` among all classes, batch by batch.

    Active edits of `model` take effect, so this is also the downstream test of an SAE.

    Args:
        model: a model with a text tower.
        source: images with labels.
        class_names: labels, or a mapping from label to the name in the sentence; default: the
            labels of `source` with spaces instead of underscores.
        templates: see `classifier_weights`.
        batch_size: images at a time.
        workers: processes that decode; default: that of `load_batches`.
        limit: size of a random sample of the images; default: all images.
        seed: seed of the sample.
        quiet: show no progress line.

    Raises:
        UserError: there are no classes or no labelled images, or the model has no text tower.
    """
    names = names_by_label(source.labels() if class_names is None else (), class_names)
    if not names:
        raise UserError(
            f"{source.spec}: none of its images has a label, so there are no classes. Give "
            "class_names, or a source with labels."
        )
    numbers = {label: i for i, label in enumerate(names)}
    weights = classifier_weights(model, list(names.values()), templates)
    scale = model.logit_scale
    tally = ZeroShotTally(list(names))

    source = source if limit is None else source.sample(limit, seed)
    total = len(source)
    labels = [source.known(i).label for i in range(total)]
    scored = {i: numbers[label] for i, label in enumerate(labels) if label in numbers}
    unlabelled = labels.count(None)
    settings = PassSettings(batch_size, workers, quiet)
    with ImagePass(model, source, "zero-shot", settings, classes=scored) as seen:
        for batch in seen:
            logits = classify(model.embed_images(batch.pixels), weights, scale)
            tally.update(logits, seen.classes_of(batch))
    return tally.result(
        unlabelled=unlabelled,
        unknown_label=total - unlabelled - len(scored),
        failed=len(seen.failures),
    )


def names_by_label(
    labels: Sequence[str], class_names: Sequence[str] | Mapping[str, str] | None
) -> dict[str, str]:
    """Return the name that appears in the sentences, by label.

    Args:
        labels: labels of the images.
        class_names: None for the labels with spaces instead of underscores; a mapping from label
            to name; or a list of names that are also the labels.
    """
    if class_names is None:
        return {label: label.replace("_", " ") for label in labels}
    if isinstance(class_names, Mapping):
        return dict(class_names)
    return {name: name for name in class_names}
