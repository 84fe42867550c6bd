"""The truth table: for each known attribute, the one feature that tells it best.

The calibration world knows what every scene shows and where. The score of a feature on a scene is
its activation over the patches: the maximum for what stands somewhere (symbols, their colours,
words), the mean for what is everywhere (background, pattern). Scenes are cut into two halves at
random. On the first everything is chosen: the feature (by AUC), the threshold on its scores (by
F1), the threshold on its heatmap (by IoU). On the second it is scored. A feature is a latent, or
for baselines a neuron or a component with either sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsight.errors import UserError
from sparsight.evaluation.baselines import Features
from sparsight.evaluation.choosing import (
    MIN_POSITIVES,
    Choice,
    Question,
    choose_features,
    name_latents,
    pooling_of,
)
from sparsight.evaluation.data import Batch, Layout, Passes
from sparsight.evaluation.localising import HeatCollector
from sparsight.evaluation.pooling import PooledFeatures
from sparsight.evaluation.scenes import SceneTruth, TruthSource
from sparsight.intervals import bootstrap_interval

MAX_SCENES = 10_000
"""More scenes than that make no estimate better that matters."""

MIN_SCENES = 4 * MIN_POSITIVES

SCORES = ("auc", "f1", "iou")

FeatureMap = Callable[[Tensor], Features]
"""From `[vectors, d_in]` to a sparse code, or to `[vectors, n]` features of either sign."""


def truth_entries(
    question: Question, choice: Choice, places: Mapping[int, Mapping[str, Any]], n_signed: int
) -> dict[str, dict[str, Any]]:
    """`attribute → latent, auc, f1, iou, …`, as in `metrics.json`.

    Args:
        question: the scenes.
        choice: the features.
        places: of `HeatCollector.result`; empty where there are no heatmaps.
        n_signed: number of features where each has two signs, else 0.
    """
    truth, halves = question.truth, question.halves
    entries = {}
    for i, attribute in enumerate(choice.attribute.tolist()):
        feature = int(choice.feature[i])
        entry: dict[str, Any] = {"latent": feature}
        if n_signed:
            entry = {"latent": feature % n_signed, "sign": 1 if feature < n_signed else -1}
        entries[truth.attributes[attribute]] = entry | {
            "auc": float(choice.auc[i]),
            "f1": float(choice.f1[i]),
            "iou": None,
            **places.get(attribute, {}),
            "auc_selection": float(choice.auc_selection[i]),
            "threshold": float(choice.threshold[i]),
            "pooling": pooling_of(truth.kind(attribute)),
            "n_positive": int(truth.shows[halves.held_out, attribute].sum()),
            "n": len(halves.held_out),
        }
    return entries


def truth_summary(entries: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Of each kind: number of values, mean, median and interval of the mean of AUC, F1 and IoU.

    The interval is a 95 % bootstrap over the values of the kind.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for attribute, entry in entries.items():
        kinds.setdefault(attribute.split("/")[0], []).append(entry)
    summary: dict[str, Any] = {}
    for kind, rows in kinds.items():
        summary[kind] = {"n": len(rows)}
        for score in (*SCORES, "iou_everywhere"):
            values = [row[score] for row in rows if row.get(score) is not None]
            if values:
                summary[kind][score] = {
                    "mean": float(np.mean(values)),
                    "median": float(np.median(values)),
                    "interval": bootstrap_interval(values, seed),
                }
    return summary


@dataclass(frozen=True)
class TruthTable:
    """The truth table of one way to take activations apart.

    Attributes:
        entries: attribute → `latent`, `auc`, `f1`, `iou`, ….
        summary: by kind.
        skipped: attributes that were not asked for, with the reason.
        names: latent → the attribute that it tells best.
        n_scenes: scenes of both halves.
    """

    entries: dict[str, dict[str, Any]]
    summary: dict[str, Any]
    skipped: dict[str, str]
    names: dict[int, dict[str, Any]]
    n_scenes: int


@torch.no_grad()
def truth_table(
    features: FeatureMap, passes: Passes, images: TruthSource, *, seed: int = 0
) -> TruthTable:
    """The truth table of any features, in two passes over the activations.

    Args:
        features: e.g. `sae.encode`.
        passes: activations of the images.
        images: calibration images.
        seed: of the halves and intervals.

    Raises:
        UserError: there are too few scenes to cut into halves.
    """
    pooled = PooledFeatures(passes.layout, MAX_SCENES)
    indices: list[int] = []
    for batch in passes:
        pooled.add(features(batch.x.flatten(0, 1)))
        indices += batch.images.tolist()
    question = ask(images, indices, passes.layout, seed)
    choice = choose_features(question, pooled)
    heats = HeatCollector(question, choice, passes.layout)
    if passes.layout.grid:
        for batch in scenes_of(passes, pooled.n_scenes):
            heats.add(features(batch.x.flatten(0, 1)))
    return finish(question, pooled, choice, heats, seed)


def ask(images: TruthSource, indices: list[int], layout: Layout, seed: int) -> Question:
    """What the first `MAX_SCENES` of the images show."""
    if len(indices) < MIN_SCENES:
        raise UserError(
            f"The truth table needs at least {MIN_SCENES} scenes, there are {len(indices)}."
        )
    return Question.about(SceneTruth.of(images, indices[:MAX_SCENES], layout.grid), seed)


def scenes_of(passes: Iterable[Batch], n_scenes: int) -> Iterable[Batch]:
    """The batches that the first `n_scenes` images are in."""
    for batch in passes:
        yield batch
        n_scenes -= len(batch.images)
        if n_scenes <= 0:
            return


def finish(
    question: Question, pooled: PooledFeatures, choice: Choice, heats: HeatCollector, seed: int
) -> TruthTable:
    """Bring choices and heatmaps together."""
    places = heats.result() if heats.layout.grid else {}
    n_signed = pooled.n_features // 2 if pooled.signed else 0
    entries = truth_entries(question, choice, places, n_signed)
    return TruthTable(
        entries,
        truth_summary(entries, seed),
        question.skipped,
        {} if pooled.signed else name_latents(question, pooled),
        pooled.n_scenes,
    )
