"""Find the best feature for each attribute: chosen on half of the scenes, scored on the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.evaluation.pooling import PooledFeatures, Pooling
from sparsight.evaluation.ranks import (
    auc_matrix,
    auc_of_pairs,
    best_f1_on_grid,
    best_threshold,
    f1_at,
)
from sparsight.evaluation.scenes import SceneTruth

MIN_POSITIVES = 5
"""How many scenes of each half must show an attribute, and how many must not."""

COLUMNS_AT_A_TIME = 512
POOLING: Mapping[str, Pooling] = {"background": "mean", "pattern": "mean"}


def pooling_of(kind: str) -> Pooling:
    """Return how a kind of attribute is pooled over patches."""
    return POOLING.get(kind, "max")


@dataclass(frozen=True)
class Halves:
    """The scenes for choosing, and the scenes for scoring."""

    selection: Int[Tensor, " n"]
    held_out: Int[Tensor, " m"]

    @classmethod
    def split(cls, n_scenes: int, seed: int) -> Halves:
        """Split the scenes at random, by `seed`."""
        order = torch.from_numpy(np.random.default_rng(seed).permutation(n_scenes))
        return cls(order[: n_scenes // 2].sort().values, order[n_scenes // 2 :].sort().values)


@dataclass(frozen=True)
class Question:
    """The scenes, what they show, and which attributes are shown often enough to be scored.

    Attributes:
        truth: what the scenes show.
        halves: the two halves of the scenes.
        asked: numbers of the attributes to score, in `truth`.
        skipped: the other attributes, each with the reason.
    """

    truth: SceneTruth
    halves: Halves
    asked: Int[Tensor, " asked"]
    skipped: dict[str, str]

    @classmethod
    def about(cls, truth: SceneTruth, seed: int) -> Question:
        """Ask about all attributes with enough positives and negatives in both halves."""
        halves = Halves.split(len(truth.shows), seed)
        counts = torch.stack(
            [truth.shows[half].sum(dim=0) for half in (halves.selection, halves.held_out)]
        )
        sizes = torch.tensor([[len(halves.selection)], [len(halves.held_out)]])
        fewest = torch.minimum(counts, sizes - counts).amin(dim=0)
        skipped = {
            truth.attributes[
                i
            ]: f"shown in {counts[0, i]} scenes of one half and {counts[1, i]} of "
            f"the other; {MIN_POSITIVES} with and without are needed in each"
            for i in (fewest < MIN_POSITIVES).nonzero()[:, 0].tolist()
        }
        return cls(truth, halves, (fewest >= MIN_POSITIVES).nonzero()[:, 0], skipped)

    def pools(self) -> dict[Pooling, Int[Tensor, " some"]]:
        """Return, for each pooling, the places of its attributes in `asked`."""
        found: dict[Pooling, list[int]] = {}
        for place, attribute in enumerate(self.asked.tolist()):
            found.setdefault(pooling_of(self.truth.kind(attribute)), []).append(place)
        return {pooling: torch.tensor(places) for pooling, places in found.items()}


@dataclass(frozen=True)
class Choice:
    """One feature per attribute, and how well it does on the held-out scenes.

    Attributes:
        feature: its number; `PooledFeatures` says how signs are numbered.
        attribute: number of the attribute.
        auc_selection: AUC on the half on which it was chosen.
        auc: AUC on the other half.
        threshold: threshold on the score of a scene.
        f1: F1 on the held-out scenes.
    """

    feature: Int[Tensor, " pairs"]
    attribute: Int[Tensor, " pairs"]
    auc_selection: Float[Tensor, " pairs"]
    auc: Float[Tensor, " pairs"]
    threshold: Float[Tensor, " pairs"]
    f1: Float[Tensor, " pairs"]


def choose_features(question: Question, pooled: PooledFeatures) -> Choice:
    """Choose, for each attribute to score, the feature with the highest AUC on the first half."""
    half = question.halves.selection
    feature = torch.zeros(len(question.asked), dtype=torch.int64)
    for pooling, places in question.pools().items():
        labels = question.truth.shows[half][:, question.asked[places]]
        best = torch.full((len(places),), -1.0, dtype=torch.float64)
        for first in range(0, pooled.n_features, COLUMNS_AT_A_TIME):
            columns = pooled.columns(pooling, slice(first, first + COLUMNS_AT_A_TIME))
            highest, which = auc_matrix(columns[half], labels).max(dim=0)
            feature[places] = torch.where(highest > best, first + which, feature[places])
            best = torch.maximum(best, highest)
    return score_pairs(question, pooled, feature, question.asked)


def score_pairs(
    question: Question,
    pooled: PooledFeatures,
    feature: Int[Tensor, " pairs"],
    attribute: Int[Tensor, " pairs"],
) -> Choice:
    """Fit thresholds on the first half; return them with AUC and F1 on the second, per pair."""
    n = len(feature)
    figures = {
        name: torch.zeros(n, dtype=torch.float64) for name in ("first", "auc", "threshold", "f1")
    }
    kinds = [question.truth.kind(i) for i in attribute.tolist()]
    for pooling in ("max", "mean"):
        places = torch.tensor([i for i, kind in enumerate(kinds) if pooling_of(kind) == pooling])
        for some in places.long().split(COLUMNS_AT_A_TIME):
            scores = pooled.columns(pooling, feature[some])
            labels = question.truth.shows[:, attribute[some]]
            one, other = question.halves.selection, question.halves.held_out
            threshold = best_threshold(scores[one], labels[one])
            figures["first"][some] = auc_of_pairs(scores[one], labels[one])
            figures["auc"][some] = auc_of_pairs(scores[other], labels[other])
            figures["threshold"][some] = threshold
            figures["f1"][some] = f1_at(scores[other], labels[other], threshold)
    first, auc, threshold, f1 = figures.values()
    return Choice(feature, attribute, first, auc, threshold, f1)


def name_latents(question: Question, pooled: PooledFeatures) -> dict[int, dict[str, Any]]:
    """Find, for each latent that is active on the first half, the attribute that it detects best.

    That is the attribute with the highest F1 on the first half; AUC and F1 are from the second.
    (AUC would name a rarely active latent after whatever attribute is rare.)

    Returns:
        Latent → `attribute`, `auc`, `f1`, `threshold`, by decreasing F1.
    """
    half = question.halves.selection
    if not len(question.asked):
        return {}
    f1 = torch.zeros(pooled.n_features, len(question.asked))
    active = torch.zeros(pooled.n_features, dtype=torch.bool)
    for pooling, places in question.pools().items():
        labels = question.truth.shows[half][:, question.asked[places]]
        for first in range(0, pooled.n_features, COLUMNS_AT_A_TIME):
            part = slice(first, first + COLUMNS_AT_A_TIME)
            columns = pooled.columns(pooling, part)[half]
            found = best_f1_on_grid(columns, labels)
            f1[first : first + len(found), places] = found
            active[part] |= (columns > 0).any(dim=0)
    latents = active.nonzero()[:, 0]
    scored = score_pairs(question, pooled, latents, question.asked[f1[latents].argmax(dim=1)])
    order = scored.f1.argsort(descending=True, stable=True).tolist()
    return {
        int(latents[i]): {
            "attribute": question.truth.attributes[int(scored.attribute[i])],
            "auc": float(scored.auc[i]),
            "f1": float(scored.f1[i]),
            "threshold": float(scored.threshold[i]),
        }
        for i in order
    }
