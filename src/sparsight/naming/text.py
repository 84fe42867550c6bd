"""Names by text: how a latent's activation goes along with the similarity of images and words."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from sparsight.naming.image_space import ImageSpace
from sparsight.naming.scores import WORDS_AT_ONCE, LatentActivations, ScoreBlock, WordScores

TOP_IMAGES = 16
"""Images whose mean is a latent's centroid."""

_NOTHING = 1e-12


class TextMethod(WordScores):
    """A method that compares one vector per latent with one vector per word.

    Args:
        space: the collection, in the model's joint space.
        words: the words.
        vectors: one unit vector per word, in the same space.
    """

    def __init__(
        self, space: ImageSpace, words: Sequence[str], vectors: Float[Tensor, "words d"]
    ) -> None:
        self.space = space
        self.words = tuple(words)
        self.vectors = self.prepared(vectors.float().cpu())

    def prepared(self, vectors: Float[Tensor, "words d"]) -> Float[Tensor, "words d"]:
        """Return what each latent's vector is multiplied with, per word: the word's, without the
        mean of all words and of length 1.
        """
        return normalize(centred(vectors), dim=1)

    @abstractmethod
    def directions(self, activations: LatentActivations, block: range) -> Float[Tensor, "some d"]:
        """Return the vectors of a block of latents."""

    def blocks(self, activations: LatentActivations) -> Iterator[ScoreBlock]:
        """Yield the scores, block by block."""
        for latents in activations.blocks():
            directions = self.directions(activations, latents)
            for start in range(0, len(self.words), WORDS_AT_ONCE):
                words = range(start, min(start + WORDS_AT_ONCE, len(self.words)))
                yield ScoreBlock(latents, words, directions @ self.vectors[start : words.stop].T)


class TextCorrelation(TextMethod):
    """Pearson's correlation, over all images, of activation and image–text similarity.

    The similarity of an image e and a word t is s = (e − ē)ᵀ (C + λI)⁻¹ (t − t̄): both are centred,
    and whitened by the covariance C of the images, so that what all images or all words have in
    common (that there is a word at all, say) counts little. λ is the mean eigenvalue of C.

    s is linear in e, so no image is ever compared with a word: with w = (C + λI)⁻¹ (t − t̄),
    cov(a, s) = (1/n Σ aᵢ (eᵢ − ē))·w and var(s) = wᵀ C w. The cost is one sum per latent and a
    product of two matrices, latents × d and d × words.
    """

    name: ClassVar[str] = "text"
    plain_name: ClassVar[str] = "correlation"

    def prepared(self, vectors: Float[Tensor, "words d"]) -> Float[Tensor, "words d"]:
        """Return w of each word, divided by the standard deviation of its similarity."""
        return self.whitened(centred(vectors))

    def whitened(self, differences: Float[Tensor, "words d"]) -> Float[Tensor, "words d"]:
        """Return the same for words from which their mean is already subtracted."""
        covariance = self.space.covariance
        ridge = covariance.diagonal().mean().clamp(min=_NOTHING)
        whitening = covariance + ridge * torch.eye(len(covariance), dtype=torch.float64)
        wide = torch.linalg.solve(whitening, differences.double().T).T
        variance = ((wide @ covariance) * wide).sum(dim=1).clamp(min=_NOTHING)
        scaled: Tensor = wide / variance.sqrt()[:, None]
        return scaled.float()

    def directions(self, activations: LatentActivations, block: range) -> Float[Tensor, "some d"]:
        """Return 1/n Σ aᵢ (eᵢ − ē) / σ(a) of each latent; 0 for one that never varies."""
        latent, row, value = self.space.entries(activations, block)
        n, m = len(self.space), len(block)
        sums = self.space.weighted_sums(latent, row, value, m)
        wide = value.astype(np.float64)
        mean = np.bincount(latent, wide, minlength=m) / n
        squares = np.bincount(latent, wide**2, minlength=m) / n
        deviation = torch.from_numpy(np.sqrt(np.maximum(squares - mean**2, 0)))
        scale = torch.where(deviation > _NOTHING, 1 / (n * deviation), 0.0).nan_to_num()
        return sums * scale.float()[:, None]


class Centroid(TextMethod):
    """Cosine of the mean of the strongest images with the word, both modalities centred."""

    name: ClassVar[str] = "centroid"
    plain_name: ClassVar[str] = "cosine"

    def directions(self, activations: LatentActivations, block: range) -> Float[Tensor, "some d"]:
        """Return the centred mean embedding of each latent's strongest images, of length 1."""
        latent, row, value = self.space.entries(activations, block)
        kept = strongest(latent, value, TOP_IMAGES)
        ones = np.ones(len(kept), dtype=np.float32)
        sums = self.space.weighted_sums(latent[kept], row[kept], ones, len(block))
        return normalize(sums, dim=1)


def centred(vectors: Float[Tensor, "words d"]) -> Float[Tensor, "words d"]:
    """Subtract the mean of all words; a single word stays as it is."""
    return vectors - vectors.mean(dim=0) if len(vectors) > 1 else vectors


def strongest(
    latent: Int64[np.ndarray, " n"], value: Float[np.ndarray, " n"], top: int
) -> Int64[np.ndarray, " kept"]:
    """Return the places of each latent's `top` largest values, rising.

    Args:
        latent: latent of each entry, not falling.
        value: its activation.
        top: entries per latent.
    """
    order = np.lexsort((-value, latent))
    counts = np.bincount(latent) if len(latent) else np.zeros(0, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
    rank = np.arange(len(latent)) - np.repeat(starts, counts)
    kept: Int64[np.ndarray, " kept"] = np.sort(order[rank < top])
    return kept
