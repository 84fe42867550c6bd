"""Which latents a page shows: those that are easiest to understand, various in kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from sparsight.latents.index import LatentIndex
from sparsight.sae import SparseAutoencoder

Floats = npt.NDArray[np.float64]
Why = Literal["best", "random"]

ENOUGH_IMAGES = 16
"""Latents that fewer images activate come last: too little to judge them by."""

CANDIDATES_PER_PLACE = 60
"""Candidates, by score, per latent to choose."""

MOST_ALIKE = 0.7
"""Two chosen latents whose decoder rows have a larger cosine show the same thing."""

_WORD = re.compile(r"[\w'-]{3,}")


@dataclass(frozen=True)
class Understanding:
    """How well each latent of an index can be understood.

    Attributes:
        score: the sum on which the choice is based.
        kinds: per latent, the names of what it is likely to stand for: words of its name, or the
            label that most of its strongest images share; [] if nothing is known.
        labels: whether labels contributed.
        names: whether names contributed.
        spread: whether the spatial statistics of the index contributed.
    """

    score: Float[np.ndarray, " n_latents"]
    kinds: Sequence[frozenset[str]]
    labels: bool
    names: bool
    spread: bool


def understanding(index: LatentIndex) -> Understanding:
    """Score the latents of an index from its table and its strongest images alone.

    The score adds up: how well a latent is named, or how well the labels of one half of its
    strongest images predict those of the other (the better of both, at most 1); its selectivity, 1
    minus its mean activation divided by that of its strongest images (times 0.4); and, if the
    index has it, Moran's I above its null, which is high if neighbouring patches agree (times 0.4).
    Latents that fire mostly at CLS, of which no image shows a place, lose 1; so do latents with few
    images.
    """
    table = index.table
    names = table["name"].to_pylist()
    sources = table["name_source"].to_pylist()
    named = _name_quality(names, table["name_score"].to_numpy(), sources)
    precision, label = held_out_label(index)
    score = np.maximum(named, precision) + 0.4 * _selectivity(index)
    spread = "moran" in table.column_names
    if spread:
        moran = _numbers(index, "moran") - _numbers(index, "moran_null")
        score += 0.4 * np.clip(moran, 0, 1)
    score -= (_cls_share(index) > 0.5).astype(float)
    score -= (table["n_active_images"].to_numpy() < ENOUGH_IMAGES).astype(float)
    kinds = [
        frozenset(_WORD.findall(name.lower())) if name else frozenset([one] if one else [])
        for name, one in zip(names, label, strict=True)
    ]
    return Understanding(
        score,
        kinds,
        labels=any(one is not None for one in label),
        names=any(name is not None for name in names),
        spread=spread,
    )


def choose_latents(
    index: LatentIndex,
    sae: SparseAutoencoder,
    n: int,
    seed: int,
    *,
    random: int | None = None,
    least_images: int = 1,
) -> tuple[list[tuple[int, Why]], str]:
    """Choose up to `n` latents: most are the best understood, various in kind; some are random.

    Args:
        index: of the SAE.
        sae: the SAE; its decoder says which latents are alike.
        n: number of latents.
        seed: seed of the random choice.
        random: number drawn at random; default: a quarter.
        least_images: number of images that must activate a latent.

    Returns:
        Latents with "best" or "random", and a sentence that says how they were chosen.
    """
    known = understanding(index)
    alive = np.flatnonzero(index.table["n_active_images"].to_numpy() >= least_images)
    random = n // 4 if random is None else random
    per_kind = max(1, round((n - random) / 8))
    best = various(known, alive, sae, n - random, per_kind)
    rest = np.setdiff1d(alive, best)
    drawn = np.random.default_rng(seed).permutation(len(rest))[: n - len(best)]
    others = np.sort(rest[drawn]).tolist()
    return (
        [(latent, "best") for latent in best] + [(latent, "random") for latent in others],
        _how(known, len(best), per_kind, others, seed, len(rest), least_images),
    )


def _how(
    known: Understanding,
    n_best: int,
    per_kind: int,
    others: Sequence[int],
    seed: int,
    n_rest: int,
    least_images: int,
) -> str:
    """Say in sentences how latents were chosen."""
    sentences = []
    if n_best:
        which = ["how well they are named"] if known.names else []
        if known.labels:
            which.append(
                "how well the labels of one half of their strongest images predict those of the "
                "other half"
            )
        which.append("how selective they are")
        if known.spread:
            which.append("how well neighbouring patches agree")
        sentences.append(
            f"{n_best} latent{'s are' if n_best > 1 else ' is'} the easiest to understand, judged "
            f"by {_listed(which)}; to vary them, at most {per_kind} share a label or a word of "
            "their names."
        )
    if others:
        which_rest = f"{n_rest:,} {'other ' if n_best else ''}latents"
        active = (
            "were ever active" if least_images == 1 else f"{least_images} images or more activate"
        )
        sentences.append(
            f"{len(others)} {'were' if len(others) > 1 else 'was'} drawn at random (seed {seed}) "
            f"from the {which_rest} that {active}."
        )
    if not sentences:
        return "No latent was ever active."
    return " ".join([*sentences, "None was picked by hand."])


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def held_out_label(
    index: LatentIndex,
) -> tuple[Float[np.ndarray, " n_latents"], list[str | None]]:
    """Return how well the labels of half of the strongest images predict those of the other half.

    The images of each latent are split by rank, even and odd. The most frequent label of one half
    is tested on the other, and the two precisions are averaged. 0 if no image has a label.

    Returns:
        The precision per latent, and the most frequent label of all its strongest images (None
        without labels).
    """
    labels, numbers = _label_numbers(index)
    n = len(numbers)
    if not labels:
        return np.zeros(n), [None] * n
    halves = (numbers[:, 0::2], numbers[:, 1::2])
    precision = np.zeros(n)
    for one, other in (halves, halves[::-1]):
        hits = (other == _most_frequent(one)[:, None]) & (other >= 0)
        precision += 0.5 * hits.sum(axis=1) / np.maximum((other >= 0).sum(axis=1), 1)
    best = _most_frequent(numbers).tolist()
    return precision, [labels[k] if k >= 0 else None for k in best]


def _label_numbers(
    index: LatentIndex,
) -> tuple[list[str], Int[np.ndarray, "n_latents top"]]:
    """Return all labels, and the number of that of each strongest image; −1: none."""
    labels = index.images["label"].to_pylist()
    known = sorted({label for label in labels if label is not None})
    number = {label: k for k, label in enumerate(known)}
    places = index.images["image"].to_numpy()
    images = index.examples.image.numpy()
    of_row = np.array([number.get(label, -1) for label in labels], dtype=np.int64)
    if not known or not len(places):
        return [], np.full(images.shape, -1)
    order = np.argsort(places, kind="stable")
    row = order[np.clip(np.searchsorted(places[order], images), 0, len(places) - 1)]
    return known, np.where((images >= 0) & (places[row] == images), of_row[row], -1)


def _most_frequent(numbers: Int[np.ndarray, "n_latents some"]) -> Int[np.ndarray, " n_latents"]:
    """Return the most frequent number of each row; among equals, that of the strongest image."""
    if not numbers.shape[1]:
        return np.full(len(numbers), -1)
    times = np.zeros(numbers.shape, dtype=np.int64)
    for column in numbers.T:
        times += numbers == column[:, None]
    best = np.where(numbers >= 0, times, -1).argmax(axis=1)
    return np.take_along_axis(numbers, best[:, None], axis=1)[:, 0]


def _name_quality(
    names: Sequence[str | None], scores: Floats, sources: Sequence[str | None]
) -> Floats:
    """Return 0.75 to 1 for named latents, 0 for the others.

    Names rank by score among those of the same source, because each source has a scale of its own.
    """
    quality = np.zeros(len(names))
    finite = np.nan_to_num(np.asarray(scores, dtype=float))
    for source in set(sources):
        named = np.array(
            [i for i, name in enumerate(names) if name is not None and sources[i] == source],
            dtype=np.int64,
        )
        order = finite[named].argsort(kind="stable")
        quality[named[order]] = 0.75 + 0.25 * np.arange(1, len(named) + 1) / max(len(named), 1)
    return quality


def _selectivity(index: LatentIndex) -> Floats:
    """Return 1 − mean activation / mean activation in the strongest images, from 0 to 1."""
    top = index.examples.activation.numpy().astype(np.float64)
    there = np.maximum((index.examples.image.numpy() >= 0).sum(axis=1), 1)
    strongest = top.sum(axis=1) / there
    mean = np.nan_to_num(_numbers(index, "mean_activation"))
    share: Floats = mean / np.where(strongest > 0, strongest, np.inf)
    selectivity: Floats = np.clip(1 - share, 0, 1) * (strongest > 0)
    return selectivity


def _cls_share(index: LatentIndex) -> Floats:
    """Return the share of strongest images whose strongest token is CLS, if there are patches."""
    n_prefix = int(index.manifest["model"].get("n_prefix") or 0)
    image, token = index.examples.image.numpy(), index.examples.token.numpy()
    if index.tokens != "all" or not n_prefix:
        return np.zeros(len(image))
    there = image >= 0
    share: Floats = (there & (token < n_prefix)).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    return share


def _numbers(index: LatentIndex, column: str) -> Floats:
    values: Floats = index.table[column].to_numpy().astype(np.float64)
    return np.nan_to_num(values)


def various(
    known: Understanding,
    alive: npt.NDArray[np.int64],
    sae: SparseAutoencoder,
    n: int,
    per_kind: int,
) -> list[int]:
    """Take the latent of highest score again and again, less what is like those already taken."""
    order = alive[np.argsort(-known.score[alive], kind="stable")][: n * CANDIDATES_PER_PLACE]
    rows = sae.W_dec.detach()[order].float().cpu().numpy()
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    alike = np.zeros(len(order))
    left = np.ones(len(order), dtype=bool)
    times: dict[str, int] = {}
    chosen: list[int] = []
    while len(chosen) < n and left.any():
        seen = np.array([max((times.get(k, 0) for k in known.kinds[i]), default=0) for i in order])
        allowed = left & (seen < per_kind) & (alike < MOST_ALIKE)
        if not allowed.any():
            break
        value = known.score[order] - 0.35 * seen - 0.5 * np.clip(alike, 0, None)
        place = int(np.where(allowed, value, -np.inf).argmax())
        left[place] = False
        alike = np.maximum(alike, rows @ rows[place])
        for kind in known.kinds[order[place]]:
            times[kind] = times.get(kind, 0) + 1
        chosen.append(int(order[place]))
    more = [int(i) for i in order[left]][: n - len(chosen)]
    return chosen + more
