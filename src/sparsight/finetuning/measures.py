"""Figures of a CLIP before and after: typographic attacks, retained abilities, modality gap.

Every figure is measured with the same code on the same images, on which neither model was
fine-tuned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from sparsight.attacks.measuring import change_of, share_of, won_back
from sparsight.attacks.outcomes import ORIGINAL, Outcome, outcomes
from sparsight.errors import UserError
from sparsight.finetuning.latents import compare_latents
from sparsight.finetuning.pairs import CaptionedImages
from sparsight.finetuning.subjects import Subjects
from sparsight.images import ImageSource, sample_places
from sparsight.intervals import wilson_interval
from sparsight.vision import ImagePass, PassSettings, VisionModel, names_by_label, zero_shot

IN_BATCH = 48
RECALL_AT = (1, 5)
EXAMPLES = 14
RIDGE = 1e-3
"""Share of the mean variance added to the covariance before inversion: there are few images."""


def compare(
    before: VisionModel, after: VisionModel, subjects: Subjects, *, quiet: bool = True
) -> dict[str, Any]:
    """Measure both models on the same images; the result is for JSON.

    Returns:
        `attack`: accuracy and attack success by kind of image, before and after, with the paired
        change; `won_back`: the share of the accuracy lost to words that is recovered, with its
        bootstrap interval (`won_back_interval`); `clean_cost`: the accuracy lost on clean images;
        `in_batch_accuracy`, `zero_shot`, `retrieval`, `modality_gap`, `logit_scale`: `before` and
        `after` of each; `latents` (see `compare_latents`); `examples`. Figures without suitable
        images or an SAE are left out.

    Raises:
        UserError: no images load, or the SAE is not of the original model.
    """
    models = {"before": before, "after": after}
    seen = {
        name: outcomes(
            model,
            subjects.pairs,
            templates=subjects.templates,
            settings=PassSettings(workers=subjects.workers, quiet=quiet),
        )
        for name, model in models.items()
    }
    kinds = {name: found.by_variant[ORIGINAL] for name, found in seen.items()}
    attack = {
        kind: {
            **{name: _figures(kinds[name][kind]) for name in models},
            "change": asdict(change_of(kinds["before"][kind].right, kinds["after"][kind].right)),
        }
        for kind in kinds["before"]
    }
    clean, attacked = (attack[kind] for kind in ("clean", "attacked"))
    lost = clean["before"]["accuracy"] - attacked["before"]["accuracy"]
    won = won_back(
        kinds["before"]["clean"].right,
        kinds["before"]["attacked"].right,
        kinds["after"]["attacked"].right,
        subjects.seed,
    )
    found: dict[str, Any] = {
        "n": seen["before"].n,
        "n_classes": len(subjects.pairs.class_names),
        "failed": seen["before"].failed,
        "pairs": subjects.pairs.about,
        "attack": attack,
        "words_cost": lost,
        "won_back": won.value if lost > 0 else None,
        "won_back_interval": won.interval if lost > 0 else None,
        "clean_cost": -clean["change"]["value"],
        "logit_scale": {name: model.logit_scale for name, model in models.items()},
        "examples": _examples(subjects, kinds),
    }
    for name, model in models.items():
        for family, figures in _one_model(model, subjects, quiet).items():
            found.setdefault(family, {})[name] = figures
    if subjects.sae is not None:
        found["latents"] = compare_latents(before, after, subjects, quiet=quiet)
    return found


def _figures(outcome: Outcome) -> dict[str, Any]:
    right, fooled = share_of(outcome.right), share_of(outcome.fooled)
    return {
        "accuracy": right.value,
        "interval": right.interval,
        "fooled": fooled.value,
        "fooled_interval": fooled.interval,
        "margin": float(outcome.margin.mean()),
    }


def _examples(
    subjects: Subjects, kinds: Mapping[str, Mapping[str, Outcome]]
) -> list[dict[str, Any]]:
    """Draw attacked images at random, with each model's verdict."""
    pairs, n = subjects.pairs, len(kinds["before"]["attacked"].right)
    if n != len(pairs):  # some did not load, so the places differ
        return []
    chosen = np.random.default_rng(subjects.seed).permutation(n)[:EXAMPLES]
    return [
        {
            "index": int(i),
            "label": pairs.class_names[pairs.labels[i]],
            "word": pairs.class_names[pairs.words[i]],
            **{name: _verdict(kinds[name]["attacked"], int(i)) for name in ("before", "after")},
        }
        for i in chosen
    ]


def _verdict(outcome: Outcome, index: int) -> str:
    if outcome.right[index]:
        return "right"
    return "word" if outcome.fooled[index] else "other"


def _one_model(model: VisionModel, subjects: Subjects, quiet: bool) -> dict[str, Any]:
    """Measure the figures that need only one model."""
    labelled = subjects.images if subjects.images is not None else subjects.pairs.clean
    names = subjects.pairs.class_names if subjects.images is None else None
    found: dict[str, Any] = {
        "in_batch_accuracy": in_batch_accuracy(
            model,
            labelled,
            names,
            limit=subjects.max_images,
            seed=subjects.seed,
            workers=subjects.workers,
            quiet=quiet,
        )
    }
    if subjects.images is not None:
        result = zero_shot(
            model,
            subjects.images,
            templates=subjects.templates,
            workers=subjects.workers,
            limit=subjects.max_images,
            seed=subjects.seed,
            quiet=quiet,
        )
        found["zero_shot"] = {
            key: value for key, value in result.to_dict().items() if key != "per_class"
        }
    if subjects.captioned is not None:
        images, texts, own = embed_pairs(
            model,
            subjects.captioned,
            subjects.max_images,
            subjects.seed,
            PassSettings(workers=subjects.workers, quiet=quiet),
        )
        found["retrieval"] = retrieval(images, texts, own)
        found["modality_gap"] = modality_gap(images, texts, subjects.seed)
    return found


@torch.no_grad()
def in_batch_accuracy(
    model: VisionModel,
    source: ImageSource,
    class_names: Mapping[str, str] | None = None,
    *,
    batch_size: int = IN_BATCH,
    limit: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Measure what zer0int's scripts call accuracy on ImageNet and ObjectNet, within batches.

    An image is right if its label has the largest dot product among the labels of its own batch
    (bare names, no template). Embeddings are not normalised. The task is therefore at most
    `batch_size`-way, easier in small batches and with repeated labels, and not comparable with
    N-way zero-shot accuracy. Here a seed determines the batches.

    Args:
        model: a model with a text tower.
        source: images with labels.
        class_names: the name for each label.
        batch_size: batch size of the task; 48 in his script.
        limit: largest number of images.
        seed: seed of the order.
        workers: processes that decode images.
        quiet: show no progress line.

    Returns:
        `accuracy`, `interval`, `n`, `batch_size`, and `ways`: the mean number of different labels
        in a batch.

    Raises:
        UserError: no images have labels, or none with a label loads.
    """
    labels = [source.known(i).label for i in range(len(source))]
    known = [i for i, label in enumerate(labels) if label is not None]
    if not known:
        raise UserError(f"{source.spec}: none of its images has a label.")
    names = class_names or names_by_label([label for label in labels if label], None)
    order = np.random.default_rng(seed).permutation(known)[:limit].tolist()
    hits = n = 0
    ways: list[int] = []
    settings = PassSettings(batch_size, workers, quiet)
    with ImagePass(model, source, "in-batch accuracy", settings, indices=order) as seen:
        for batch in seen:
            own = [str(labels[i]) for i in batch.indices]
            texts = model.embed_texts([names[label] for label in own])
            chosen = (model.embed_images(batch.pixels) @ texts.T).argmax(dim=1).tolist()
            hits += sum(own[column] == label for column, label in zip(chosen, own, strict=True))
            n += len(own)
            ways.append(len(set(own)))
    return {
        "accuracy": hits / n,
        "interval": wilson_interval(hits, n),
        "n": n,
        "batch_size": batch_size,
        "ways": float(np.mean(ways)),
    }


@torch.no_grad()
def embed_pairs(
    model: VisionModel,
    pairs: CaptionedImages,
    limit: int | None = None,
    seed: int = 0,
    settings: PassSettings | None = None,
) -> tuple[Float[Tensor, "n d_embed"], Float[Tensor, "n d_embed"], list[str]]:
    """Return unit embeddings of `limit` random images and of their first captions, and the
    captions.
    """
    chosen = sample_places(len(pairs), limit or len(pairs), seed).tolist()
    captions = {pairs.places[i]: pairs.captions[i][0][0] for i in chosen}
    found, own = [], []
    with ImagePass(model, pairs.source, "captions", settings, indices=list(captions)) as seen:
        for batch in seen:
            found.append(model.embed_images(batch.pixels))
            own += [captions[i] for i in batch.indices]
    if len(own) < 2:
        raise UserError(f"{pairs.source.spec}: fewer than two images with captions load.")
    images, texts = torch.cat(found), model.embed_texts(own)
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1), own


def retrieval(
    images: Float[Tensor, "n d_embed"], texts: Float[Tensor, "n d_embed"], captions: Sequence[str]
) -> dict[str, Any]:
    """Measure recall at 1 and 5, both ways: the share of queries with a match among the top k.

    A match is any row with the same caption, so that equal captions do not count as errors.

    Args:
        images: unit rows.
        texts: unit rows; row i is the caption of image i.
        captions: the captions as text.

    Returns:
        `image_to_text.{1,5}`, `text_to_image.{1,5}`, each with a share and its interval; and `n`.
    """
    numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    group = torch.tensor([numbers[caption] for caption in captions])
    cosines = (images @ texts.T).cpu()
    found: dict[str, Any] = {"n": len(group), "different_captions": len(numbers)}
    for name, scores in (("image_to_text", cosines), ("text_to_image", cosines.T)):
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : max(RECALL_AT)]
        hit = group[order] == group[:, None]
        found[name] = {}
        for k in RECALL_AT:
            hits = int(hit[:, :k].any(dim=1).sum())
            interval = wilson_interval(hits, len(group))
            found[name][str(k)] = {"recall": hits / len(group), "interval": interval}
    return found


def modality_gap(
    images: Float[Tensor, "n d_embed"], texts: Float[Tensor, "n d_embed"], seed: int = 0
) -> dict[str, Any]:
    """Measure how far apart images and texts are (Liang et al. 2022, section 2).

    `distance` is ‖mean(Î) − mean(T̂)‖. `separability` is the share of held-out embeddings whose
    modality a linear discriminant predicts: w = (Σ + ε I)⁻¹ (μ_I − μ_T), threshold midway between
    the means (Fisher 1936), fitted to one half and measured on the other; 0.5 is chance.

    Args:
        images: unit rows.
        texts: unit rows.
        seed: seed of the halves.

    Returns:
        `distance`, `separability`, `interval`, `matched_cosine`, `random_cosine` (of an image with
        its own caption, and with another's) and `n`.
    """
    one, two = (x.cpu().double().numpy() for x in (images, texts))
    n = len(one)
    order = np.random.default_rng(seed).permutation(n)
    # An image and its caption stay in the same half, so no pair is in both.
    fit, held = order[: n // 2], order[n // 2 :]
    weights, threshold = discriminant(one[fit], two[fit])
    right = int((one[held] @ weights > threshold).sum() + (two[held] @ weights <= threshold).sum())
    cosines = one @ two.T
    return {
        "distance": float(np.linalg.norm(one.mean(axis=0) - two.mean(axis=0))),
        "separability": right / (2 * len(held)),
        "interval": wilson_interval(right, 2 * len(held)),
        "matched_cosine": float(np.diag(cosines).mean()),
        "random_cosine": float((cosines.sum() - np.trace(cosines)) / (n * (n - 1))),
        "n": n,
    }


def discriminant(
    one: Float64[np.ndarray, "n d"], two: Float64[np.ndarray, "m d"]
) -> tuple[Float64[np.ndarray, " d"], float]:
    """Fit Fisher's linear discriminant of two classes: weights, and the threshold of the first.

    The covariance is that within the classes, plus a little of its mean variance.
    """
    means = one.mean(axis=0), two.mean(axis=0)
    within = np.concatenate([one - means[0], two - means[1]])
    covariance = within.T @ within / len(within)
    covariance += RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    weights = np.linalg.solve(covariance, means[0] - means[1])
    return weights, float(weights @ (means[0] + means[1]) / 2)
