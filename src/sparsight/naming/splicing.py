"""SpLiCE: an image embedding as a sparse, non-negative sum of words (Bhalla et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from sparsight.naming.image_space import ImageSpace
from sparsight.naming.scores import N_CANDIDATES, Candidates, LatentActivations, Method
from sparsight.naming.text import TOP_IMAGES, centred, strongest

PENALTY = 0.2
"""λ. With unit vectors, a word whose cosine with the rest is below λ gets no weight."""

_ROWS_AT_ONCE = 256
_WORDS_ADDED = 32
_MOST_ROUNDS = 50
_MOST_SWEEPS = 500
_TOLERANCE = 1e-6


def splice(
    embeddings: Float[Tensor, "rows d"],
    words: Float[Tensor, "words d"],
    *,
    penalty: float = PENALTY,
    n_words: int = 32,
) -> tuple[Int64[Tensor, "rows n"], Float[Tensor, "rows n"]]:
    """Decompose embeddings into words: w ≥ 0 that minimises ½ ‖x − Σ wᵢ vᵢ‖² + λ Σ wᵢ.

    Both sides should be centred by the mean of their modality and have length 1. Coordinate descent
    runs on the words that may have weight; then words that violate the conditions of the optimum
    (vᵢ · residual > λ) are added, until there are none. So the result is that of all words, but
    memory holds no matrix of words × words.

    Args:
        embeddings: what to decompose.
        words: one vector per word.
        penalty: λ.
        n_words: words to return per row.

    Returns:
        Words with the largest weights, largest first, and their weights; words are −1 and weights 0
        where fewer have weight.

    Raises:
        ValueError: `penalty` is not positive.
    """
    if not penalty > 0:
        raise ValueError(f"penalty is {penalty}, but must be positive")
    parts = [
        _strongest(*_solve(rows.double(), words.double(), penalty), n_words)
        for rows in embeddings.split(_ROWS_AT_ONCE)
    ]
    if not parts:
        shape = (0, n_words)
        return torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    places, weights = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return places, weights.to(embeddings.dtype)


def _solve(
    x: Float[Tensor, "rows d"], words: Float[Tensor, "words d"], penalty: float
) -> tuple[Int64[Tensor, "rows n"], Float[Tensor, "rows n"]]:
    """Return the words that were tried for each row (−1 in empty places), and their weights."""
    n_rows = len(x)
    tried = torch.zeros(n_rows, 0, dtype=torch.int64)
    weight = x.new_zeros(n_rows, 0)
    residual = x
    unused: Bool[Tensor, "rows words"] = torch.ones(n_rows, len(words), dtype=torch.bool)
    for _ in range(_MOST_ROUNDS):
        violation = (residual @ words.T - penalty).masked_fill(~unused, -torch.inf)
        best = violation.topk(min(_WORDS_ADDED, len(words)), dim=1)
        added = torch.where(best.values > _TOLERANCE, best.indices, -1)
        added = added[:, (added >= 0).any(dim=0)]
        if not added.shape[1]:
            break
        row, column = (added >= 0).nonzero(as_tuple=True)
        unused[row, added[row, column]] = False
        tried = torch.cat([tried, added], dim=1)
        weight = torch.cat([weight, x.new_zeros(added.shape)], dim=1)
        vectors = words[tried.clamp(min=0)] * (tried >= 0)[..., None]
        weight = _descend(x, vectors, weight, penalty)
        residual = x - torch.einsum("rn,rnd->rd", weight, vectors)
    return tried, weight


def _descend(
    x: Float[Tensor, "rows d"],
    vectors: Float[Tensor, "rows n d"],
    weight: Float[Tensor, "rows n"],
    penalty: float,
) -> Float[Tensor, "rows n"]:
    """Minimise over the given words by cyclic coordinate descent, all rows at once."""
    gram = vectors @ vectors.transpose(1, 2)
    target = torch.einsum("rnd,rd->rn", vectors, x) - penalty
    norm = gram.diagonal(dim1=1, dim2=2)
    weight = weight.clone()
    for _ in range(_MOST_SWEEPS):
        largest = 0.0
        for word in range(weight.shape[1]):
            own = norm[:, word]
            gradient = target[:, word] - (gram[:, word] * weight).sum(dim=1)
            new = (weight[:, word] + gradient / own.clamp(min=_TOLERANCE)).clamp(min=0)
            new = torch.where(own > 0, new, 0)
            largest = max(largest, float((new - weight[:, word]).abs().max()))
            weight[:, word] = new
        if largest < _TOLERANCE:
            break
    return weight


def _strongest(
    tried: Int64[Tensor, "rows n"], weight: Float[Tensor, "rows n"], n_words: int
) -> tuple[Int64[Tensor, "rows n_words"], Float[Tensor, "rows n_words"]]:
    """Keep the words with the largest weights; fill up with −1 and 0."""
    missing = max(0, n_words - weight.shape[1])
    weight = torch.nn.functional.pad(weight, (0, missing))
    tried = torch.nn.functional.pad(tried, (0, missing), value=-1)
    best = weight.topk(n_words, dim=1)
    places = tried.gather(1, best.indices)
    return places.masked_fill(best.values <= 0, -1), best.values


class Splice(Method):
    """SpLiCE of the activation-weighted mean of each latent's strongest images.

    The score of a word is its weight. Images and words are centred by the means of the collection
    and of the vocabulary.

    Args:
        space: the collection, in the model's joint space.
        words: the words.
        vectors: one unit vector per word, in the same space.
        penalty: λ of `splice`.
    """

    name: ClassVar[str] = "splice"

    def __init__(
        self,
        space: ImageSpace,
        words: Sequence[str],
        vectors: Float[Tensor, "words d"],
        penalty: float = PENALTY,
    ) -> None:
        self.space = space
        self.words = tuple(words)
        self.vectors = normalize(centred(vectors.float().cpu()), dim=1)
        self.penalty = penalty

    def candidates(self, activations: LatentActivations, n: int = N_CANDIDATES) -> Candidates:
        """Return the words with the largest weights."""
        word = np.full((len(activations), n), -1, dtype=np.int64)
        score = np.full((len(activations), n), -np.inf)
        for block in activations.blocks():
            latent, row, value = self.space.entries(activations, block)
            kept = strongest(latent, value, TOP_IMAGES)
            weight = np.maximum(value[kept], 0)
            sums = self.space.weighted_sums(latent[kept], row[kept], weight, len(block))
            places, weights = splice(
                normalize(sums, dim=1), self.vectors, penalty=self.penalty, n_words=n
            )
            here = slice(block.start, block.stop)
            word[here] = places.numpy()
            score[here] = torch.where(places >= 0, weights, -torch.inf).numpy()
        return Candidates(word, score)
