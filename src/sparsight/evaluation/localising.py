"""Compare where a feature is active on a scene with where its attribute really is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsight.evaluation.baselines import Features
from sparsight.evaluation.choosing import Choice, Question
from sparsight.evaluation.data import Layout
from sparsight.evaluation.pooling import heat

HEAT_THRESHOLDS = 64


class HeatCollector:
    """The heatmap of each attribute's feature on each scene that shows the attribute.

    Args:
        question: the scenes and what they show.
        choice: the feature chosen for each attribute.
        layout: where the patches are.
    """

    def __init__(self, question: Question, choice: Choice, layout: Layout) -> None:
        self.question, self.choice, self.layout = question, choice, layout
        truth = question.truth
        self._features, column = choice.feature.unique(return_inverse=True)
        self._column = torch.full((len(truth.attributes),), -1)
        self._column[choice.attribute] = column
        self._heat = torch.zeros(truth.masks.shape, dtype=torch.float32)
        self._n_scenes = 0

    def add(self, features: Features) -> None:
        """Add the heatmaps of the next scenes, in order."""
        first, stop = self._n_scenes, self._n_scenes + len(features) // self.layout.n_tokens
        self._n_scenes = stop
        truth = self.question.truth
        # Scenes are in order, so the rows of a batch are contiguous.
        low, high = torch.searchsorted(truth.scene, torch.tensor([first, stop])).tolist()
        if low == high:
            return
        maps = heat(features, self.layout, self._features).transpose(1, 2).cpu()
        column = self._column[truth.attribute[low:high]]
        asked = column >= 0
        found = maps[truth.scene[low:high][asked] - first, column[asked]]
        self._heat[low:high][asked] = found

    def result(self) -> dict[int, dict[str, Any]]:
        """Return for each attribute `iou` (mean over scenes), `iou_pooled`, `iou_everywhere` and
        more.
        """
        truth, halves = self.question.truth, self.question.halves
        held_out = torch.zeros(len(truth.shows), dtype=torch.bool)
        held_out[halves.held_out] = True
        # A part that something else covers completely has no visible patch.
        visible = truth.masks.any(dim=1)
        found: dict[int, dict[str, Any]] = {}
        for attribute in self.choice.attribute.tolist():
            here = (truth.attribute == attribute) & visible
            one, other = here & ~held_out[truth.scene], here & held_out[truth.scene]
            if not (bool(one.any()) and bool(other.any())):
                found[attribute] = {"iou": None}
                continue
            threshold = heat_threshold(self._heat[one], truth.masks[one])
            inside, union = _overlap(self._heat[other] > threshold, truth.masks[other])
            found[attribute] = {
                "iou": float((inside / union).mean()),
                "iou_pooled": float(inside.sum() / union.sum()),
                "iou_everywhere": float(truth.masks[other].double().mean()),
                "heat_threshold": threshold,
                "n_masks": int(other.sum()),
            }
        return found


def heat_threshold(heat: Float[Tensor, "n patches"], masks: Bool[Tensor, "n patches"]) -> float:
    """Return the threshold with the highest mean IoU: 0, or one of 64 quantiles of the rest."""
    values = heat[heat != 0]
    if not len(values):
        return 0.0
    steps = torch.linspace(0, 1, HEAT_THRESHOLDS)
    ordered = values.sort().values
    picked = ordered[(steps * (len(ordered) - 1)).round().long()]
    candidates = torch.cat([picked.new_zeros(1), picked]).unique()
    ious = []
    for threshold in candidates.tolist():
        inside, union = _overlap(heat > threshold, masks)
        ious.append(float((inside / union).mean()))
    return float(candidates[int(np.argmax(ious))])


def _overlap(
    called: Bool[Tensor, "n patches"], masks: Bool[Tensor, "n patches"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Count the patches of each scene in both masks, and in either."""
    return (called & masks).sum(dim=1).double(), (called | masks).sum(dim=1).double()
