"""Names by label: the label that goes along with a latent, chosen and scored on separate images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int64

from sparsight.errors import UserError
from sparsight.naming.scores import N_CANDIDATES, Candidates, LatentActivations, Method

MIN_PRECISION = 0.8
"""Share of the images above a latent's threshold that must have the label."""

MIN_SUPPORT = 4
"""Images with the label that a latent must find in each half."""

FIGURES = ("precision", "recall", "lift", "n", "activation")


class LabelMethod(Method):
    """The label with the highest F1, and the activation from which the latent stands for it.

    The images with labels are split at random. On one half, label and threshold are chosen: those
    with the highest F1 among those with enough precision. On the other half they are scored: the
    share of images above the threshold that have the label (precision), the share of the label's
    images that are above it (recall), lift (precision over the label's share of all images), and
    F1, which is the score. `activation` is the threshold, and `n` counts the held-out images above
    it. A candidate whose precision is too low on either half is dropped.

    Args:
        labels: label of each image that was read, or None.
        places: place of each of these images in the source, rising.
        n_places: number of images in the source.
        min_precision: lowest precision, on either half.
        seed: seed of the split.

    Raises:
        UserError: the images have no labels, or only one.
    """

    name: ClassVar[str] = "labels"

    def __init__(
        self,
        labels: Sequence[str | None],
        places: Int64[np.ndarray, " images"],
        n_places: int,
        min_precision: float = MIN_PRECISION,
        seed: int = 0,
    ) -> None:
        self.words = sorted({label for label in labels if label is not None})
        if len(self.words) < 2:
            what = "no labels" if not self.words else f"only the label {self.words[0]!r}"
            raise UserError(
                f"The images of the index have {what}, so latents cannot be named by labels. Use "
                "images in one folder per label, or name by text (`--by text`)."
            )
        self.min_precision = min_precision
        number = {label: i for i, label in enumerate(self.words)}
        self._label = np.full(n_places, -1, dtype=np.int32)
        self._label[places] = [-1 if label is None else number[label] for label in labels]
        # Half of the images of each label, so that rare labels are in both halves.
        self._held_out = np.zeros(n_places, dtype=bool)
        shuffled = np.random.default_rng(seed).permutation(n_places)
        order = shuffled[np.argsort(self._label[shuffled], kind="stable")]
        self._held_out[order[1::2]] = True
        known = self._label >= 0
        self._totals = [
            np.bincount(self._label[known & half], minlength=len(self.words))
            for half in (~self._held_out, self._held_out)
        ]

    def candidates(self, activations: LatentActivations, n: int = N_CANDIDATES) -> Candidates:
        """Return the labels with the highest F1 on held-out images."""
        shape = (len(activations), min(n, len(self.words)))
        word = np.full(shape, -1, dtype=np.int64)
        score = np.full(shape, -np.inf)
        figures = {name: np.full(shape, np.nan) for name in FIGURES}
        for block in activations.blocks():
            found = self._block(activations, block, shape[1])
            if found is None:
                continue
            latent, label, threshold = found
            measured = self._measure(activations, block, latent, label, threshold)
            f1, precision = measured.pop("f1"), measured["precision"]
            measured["activation"] = threshold.astype(np.float64)
            right = (precision >= self.min_precision) & (measured["hits"] >= MIN_SUPPORT)
            measured.pop("hits")
            keep = np.nonzero(right)[0]
            keep = keep[np.lexsort((-f1[keep], latent[keep]))]
            rank = _rank(latent[keep])
            rows = block.start + latent[keep]
            word[rows, rank] = label[keep]
            score[rows, rank] = f1[keep]
            for name in FIGURES:
                figures[name][rows, rank] = measured[name][keep]
        return Candidates(word, score, figures)

    def _entries(
        self, activations: LatentActivations, block: range, held_out: bool
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Return latent (from the block's first), label and activation of the entries in a half."""
        bounds = activations.rows.offsets[block.start : block.stop + 1]
        here = slice(int(bounds[0]), int(bounds[-1]))
        latent = np.repeat(np.arange(len(block)), np.diff(bounds))
        places = activations.rows.columns[here]
        label = self._label[places].astype(np.int64)
        own = (label >= 0) & (self._held_out[places] == held_out)
        return latent[own], label[own], np.asarray(activations.rows.values[here])[own]

    def _block(
        self, activations: LatentActivations, block: range, n: int
    ) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"], Float[np.ndarray, " m"]] | None:
        """Choose the `n` best labels, with thresholds, of each latent of a block, on one half."""
        latent, label, value = self._entries(activations, block, held_out=False)
        if not len(latent):
            return None
        order = np.lexsort((-value, latent))
        latent, label, value = latent[order], label[order], value[order]
        # Images at least as active, equally active ones included.
        above = _rank(latent) + 1
        last = _last_of_ties(latent, value)
        above = above[last]
        pair = latent * len(self.words) + label
        hits = _rank_within(pair) + 1
        totals = self._totals[0][label]
        precision, f1 = hits / above, 2 * hits / (above + totals)
        good = np.nonzero((precision >= self.min_precision) & (hits >= MIN_SUPPORT))[0]
        if not len(good):
            return None
        best = good[np.lexsort((-f1[good], pair[good]))]
        best = best[_rank(pair[best]) == 0]  # the best threshold of each latent and label
        best = best[np.lexsort((-f1[best], latent[best]))]
        best = best[_rank(latent[best]) < n]
        return latent[best], label[best], value[best]

    def _measure(
        self,
        activations: LatentActivations,
        block: range,
        latent: Int64[np.ndarray, " m"],
        label: Int64[np.ndarray, " m"],
        threshold: Float[np.ndarray, " m"],
    ) -> dict[str, Float[np.ndarray, " m"]]:
        """Measure chosen labels and thresholds on the held-out half."""
        of_entry, label_of_entry, value = self._entries(activations, block, held_out=True)
        starts = np.searchsorted(of_entry, np.arange(len(block) + 1))
        above, hits = np.zeros(len(latent)), np.zeros(len(latent))
        for i, (row, wanted, least) in enumerate(zip(latent, label, threshold, strict=True)):
            here = slice(starts[row], starts[row + 1])
            active = value[here] >= least
            above[i] = np.count_nonzero(active)
            hits[i] = np.count_nonzero(active & (label_of_entry[here] == wanted))
        totals = self._totals[1][label]
        share = totals / max(1, self._totals[1].sum())
        precision = hits / np.maximum(above, 1)
        return {
            "precision": precision,
            "recall": hits / np.maximum(totals, 1),
            "lift": precision / np.maximum(share, 1e-12),
            "n": above,
            "f1": 2 * hits / np.maximum(above + totals, 1),
            "hits": hits,
        }


def _rank(group: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Return each entry's number within its group, from 0; equal groups stand together."""
    if not len(group):
        return np.zeros(0, dtype=np.int64)
    starts: Bool[np.ndarray, " n"] = np.ones(len(group), dtype=bool)
    starts[1:] = group[1:] != group[:-1]
    first = np.maximum.accumulate(np.where(starts, np.arange(len(group)), 0))
    rank: Int64[np.ndarray, " n"] = np.arange(len(group)) - first
    return rank


def _rank_within(group: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Return each entry's number within its group, in the order in which they stand."""
    order = np.argsort(group, kind="stable")
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = _rank(group[order])
    return rank


def _last_of_ties(
    latent: Int64[np.ndarray, " n"], value: Float[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """Return, for each entry, the place of the last one with the same latent and value."""
    n = len(latent)
    ends = np.ones(n, dtype=bool)
    ends[:-1] = (latent[1:] != latent[:-1]) | (value[1:] != value[:-1])
    places = np.where(ends, np.arange(n), n)
    last: Int64[np.ndarray, " n"] = np.minimum.accumulate(places[::-1])[::-1]
    return last
