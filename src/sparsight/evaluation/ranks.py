"""How well scores separate positives from negatives: AUC by ranks, F1 by threshold, in bulk."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def average_ranks(scores: Float[Tensor, "items columns"]) -> Float[Tensor, "items columns"]:
    """Return ranks within each column, from 1, in float64; equal scores share their mean rank."""
    columns = scores.T.contiguous()
    ordered = columns.sort(dim=1).values
    below = torch.searchsorted(ordered, columns)
    up_to = torch.searchsorted(ordered, columns, right=True)
    return ((below + up_to + 1).double() / 2).T


def auc_matrix(
    scores: Float[Tensor, "items columns"], labels: Bool[Tensor, "items labels"]
) -> Float[Tensor, "columns labels"]:
    """Return the exact area under the ROC curve of every column for every label; ties count half.

    AUC = (R − P (P + 1) / 2) / (P N), where R is the sum of the positives' ranks, P the number of
    positives, N that of negatives (Mann-Whitney). NaN if a label has no positives or no negatives.
    """
    positive = labels.double().sum(dim=0)
    negative = len(labels) - positive
    rank_sums = average_ranks(scores).T @ labels.double()
    return (rank_sums - positive * (positive + 1) / 2) / (positive * negative)


def auc_of_pairs(
    scores: Float[Tensor, "items pairs"], labels: Bool[Tensor, "items pairs"]
) -> Float[Tensor, " pairs"]:
    """Return the AUC of each column of scores for the same column of labels."""
    positive = labels.double().sum(dim=0)
    negative = len(labels) - positive
    rank_sums = (average_ranks(scores) * labels).sum(dim=0)
    return (rank_sums - positive * (positive + 1) / 2) / (positive * negative)


def best_threshold(
    scores: Float[Tensor, "items pairs"], labels: Bool[Tensor, "items pairs"]
) -> Float[Tensor, " pairs"]:
    """Return the threshold with the highest F1; scores above it are positive.

    It is halfway between two scores of the column; below all of them if F1 is best with everything
    positive. Among thresholds of equal F1, the highest.
    """
    ordered, order = scores.double().sort(dim=0, descending=True)
    hits = labels.gather(0, order).double().cumsum(dim=0)
    taken = torch.arange(1, len(scores) + 1, device=scores.device, dtype=torch.float64)[:, None]
    f1 = 2 * hits / (taken + hits[-1])
    following = torch.cat([ordered[1:], ordered[-1:] - 1])
    f1 = torch.where(ordered > following, f1, -1)
    best = f1.argmax(dim=0, keepdim=True)
    return ((ordered.gather(0, best) + following.gather(0, best)) / 2)[0]


def f1_at(
    scores: Float[Tensor, "items pairs"],
    labels: Bool[Tensor, "items pairs"],
    threshold: Float[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """Return the F1 of each column if scores above the threshold are positive; 0 without hits."""
    called = scores.double() > threshold
    hits = (called & labels).sum(dim=0).double()
    return 2 * hits / (called.sum(dim=0) + labels.sum(dim=0)).clamp(min=1)


def best_f1_on_grid(
    scores: Float[Tensor, "items columns"],
    labels: Bool[Tensor, "items labels"],
    fractions: tuple[float, ...] = (0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75),
) -> Float[Tensor, "columns labels"]:
    """Return the highest F1 of every column for every label, over fractions of the column's
    maximum.

    One matrix product per threshold: coarse and fast, for choosing, not for reporting.
    """
    wanted = labels.float()
    peaks = scores.amax(dim=0)
    best = scores.new_zeros(scores.shape[1], labels.shape[1])
    for fraction in fractions:
        called = (scores > fraction * peaks).float()
        hits = called.T @ wanted
        total = called.sum(dim=0)[:, None] + wanted.sum(dim=0)
        best = torch.maximum(best, 2 * hits / total.clamp(min=1))
    return best
