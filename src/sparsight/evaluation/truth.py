"""The truth table: for each known attribute, the one feature that detects it best.

The calibration world knows what every scene shows and where. The score of a feature on a scene is
its activation over the patches: the maximum for local attributes (symbols, their colours, words),
the mean for global ones (background, pattern). Scenes are split into two halves at random. On the
first we choose the feature (by AUC), the threshold on its scores (by F1) and the threshold on its
heatmap (by IoU); on the second we score the choice. A feature is a latent or, for baselines, a
neuron or a component with either sign.
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
"""More scenes than this no longer improve an estimate noticeably."""

MIN_SCENES = 4 * MIN_POSITIVES

SCORES = ("auc", "f1", "iou")

FeatureMap = Callable[[Tensor], Features]
"""A function from `[vectors, d_in]` to a sparse code, or to `[vectors, n]` signed features."""


def truth_entries(
    question: Question, choice: Choice, places: Mapping[int, Mapping[str, Any]], n_signed: int
) -> dict[str, dict[str, Any]]:
    """Return `attribute → latent, auc, f1, iou, …`, as in `metrics.json`.

    Args:
        question: the scenes and their attributes.
        choice: the chosen features.
        places: result of `HeatCollector.result`; empty without heatmaps.
        n_signed: number of features if each has two signs, else 0.
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
    """Summarise each kind: number of values; mean, its interval and median of AUC, F1 and IoU.

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
    """The truth table of one decomposition: the SAE or a baseline.

    Attributes:
        entries: attribute → `latent`, `auc`, `f1`, `iou`, ….
        summary: mean scores by kind of attribute.
        skipped: attributes that were not scored, each with the reason.
        names: latent → the attribute that it detects best.
        n_scenes: number of scenes, both halves together.
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
    """Make the truth table of any features, in two passes over the activations.

    Args:
        features: a function to features, e.g. `sae.encode`.
        passes: activations of the images.
        images: calibration images.
        seed: seed of the halves and intervals.

    Raises:
        UserError: there are too few scenes to split into halves.
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
    """Find what the first `MAX_SCENES` images show, and which attributes can be scored."""
    if len(indices) < MIN_SCENES:
        raise UserError(
            f"The truth table needs {MIN_SCENES} scenes or more, but there are {len(indices)}."
        )
    return Question.about(SceneTruth.of(images, indices[:MAX_SCENES], layout.grid), seed)


def scenes_of(passes: Iterable[Batch], n_scenes: int) -> Iterable[Batch]:
    """Yield the batches with the first `n_scenes` images."""
    for batch in passes:
        yield batch
        n_scenes -= len(batch.images)
        if n_scenes <= 0:
            return


def finish(
    question: Question, pooled: PooledFeatures, choice: Choice, heats: HeatCollector, seed: int
) -> TruthTable:
    """Join choices and heatmaps into a truth table."""
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
