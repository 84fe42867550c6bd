"""What a naming method is: from latents' activations over images to candidates with scores.

A method sees the trained latents and those of an untrained SAE alike, so the scores of one can be
judged by those of the other (`null.py`).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sparsight.latents import Postings
from sparsight.latents.postings import row_blocks
from sparsight.sae import SparseAutoencoder

N_CANDIDATES = 5
"""Candidates per latent: the best one, and the runners-up."""

LATENTS_AT_ONCE = 2048
WORDS_AT_ONCE = 4096
_SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True)
class LatentActivations:
    """Latents of one SAE, trained or not, with their activations over the same images.

    Attributes:
        sae: the SAE.
        latents: number of the latent of each row of `rows`; of an untrained SAE perhaps not all.
        rows: activations over the images.
        given_decoder: decoder row of each latent, if `sae` does not have it.
    """

    sae: SparseAutoencoder
    latents: Int64[np.ndarray, " rows"]
    rows: Postings
    given_decoder: Float[Tensor, "rows d_out"] | None = None

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def n_images(self) -> Int64[np.ndarray, " rows"]:
        """Number of images in which each latent fires."""
        return self.rows.counts

    @property
    def decoder(self) -> Float[Tensor, "rows d_out"]:
        """Decoder row of each latent, in the units of the SAE's normalised space."""
        if self.given_decoder is not None:
            return self.given_decoder
        return self.sae.W_dec.detach()[torch.from_numpy(self.latents).to(self.sae.W_dec.device)]

    def select(self, rows: Int64[np.ndarray, " some"]) -> LatentActivations:
        """Return some of the rows, as a copy in memory."""
        offsets = self.rows.offsets
        parts = [slice(int(offsets[row]), int(offsets[row + 1])) for row in rows]
        columns, values = (
            np.concatenate([array[:0], *(array[part] for part in parts)])
            for array in (self.rows.columns, self.rows.values)
        )
        bounds = np.concatenate([[0], np.cumsum(self.n_images[rows])]).astype(np.int64)
        own = Postings(bounds, columns, values, None, self.rows.n_columns)
        return LatentActivations(self.sae, self.latents[rows], own, self.decoder[rows])

    @classmethod
    def joined(cls, parts: Sequence[LatentActivations]) -> LatentActivations:
        """Join latents of several SAEs with the same normaliser; `sae` is that of the first."""
        first = parts[0]
        bounds = [part.n_images for part in parts]
        rows = Postings(
            np.concatenate([[0], np.cumsum(np.concatenate(bounds))]).astype(np.int64),
            np.concatenate([part.rows.columns for part in parts]),
            np.concatenate([part.rows.values for part in parts]),
            None,
            first.rows.n_columns,
        )
        latents = np.concatenate([part.latents for part in parts])
        return cls(first.sae, latents, rows, torch.cat([part.decoder for part in parts]))

    def blocks(self, latents: int = LATENTS_AT_ONCE, entries: int = 1 << 22) -> Iterator[range]:
        """Divide the rows into ranges of few enough latents and entries, or of one row."""
        for block in row_blocks(self.rows.offsets, entries):
            for start in range(block.start, block.stop, latents):
                yield range(start, min(start + latents, block.stop))


@dataclass(frozen=True)
class Candidates:
    """The best words for each latent, best first.

    Attributes:
        word: places in the method's `words`; −1 where there is none.
        score: their scores, larger is better; −inf where there is none.
        figures: further figures of each candidate, by name; NaN where there is none.
    """

    word: Int64[np.ndarray, "latents n"]
    score: Float[np.ndarray, "latents n"]
    figures: dict[str, Float[np.ndarray, "latents n"]] = dataclasses.field(default_factory=dict)


class Method(ABC):
    """A way to find names for latents.

    Attributes:
        name: its name, as in `names.parquet` and on the command line.
        words: everything that it may name a latent.
    """

    name: ClassVar[str]
    words: Sequence[str]

    def calibrated(self, untrained: LatentActivations) -> Self:
        """Return the method with its parameters fitted to latents of an untrained SAE, if it has
        any; these latents are then used for nothing else.
        """
        return self

    @abstractmethod
    def candidates(self, activations: LatentActivations, n: int = N_CANDIDATES) -> Candidates:
        """Return the `n` best words of every latent; memory must not grow with latents × words or
        images × words.
        """


class ScoreBlock(NamedTuple):
    """The scores of a range of latents for a range of words."""

    latents: range
    words: range
    score: Float[Tensor, "latents words"]


class WordScores(Method):
    """A method that scores every word for every latent.

    Each word is standardised: from a score, the mean of the same word over untrained latents is
    subtracted, and the difference divided by their standard deviation. So a word that suits
    everything gets no advantage.
    """

    mean: Float[Tensor, " words"] | None = None
    spread: Float[Tensor, " words"] | None = None

    @abstractmethod
    def blocks(self, activations: LatentActivations) -> Iterator[ScoreBlock]:
        """Yield the plain scores of all latents for all words, block by block."""

    def calibrated(self, untrained: LatentActivations) -> Self:
        """Return the method with mean and standard deviation of every word's score."""
        total = torch.zeros(len(self.words), dtype=torch.float64)
        squares = torch.zeros_like(total)
        for block in self.blocks(untrained):
            score = block.score.cpu().double()
            words = slice(block.words.start, block.words.stop)
            total[words] += score.sum(dim=0)
            squares[words] += score.square().sum(dim=0)
        n = max(len(untrained), 1)
        mean = total / n
        spread = (squares / n - mean.square()).clamp(min=0).sqrt()
        return self._with(mean.float(), spread.float().clamp(min=_SMALLEST_SPREAD))

    def candidates(self, activations: LatentActivations, n: int = N_CANDIDATES) -> Candidates:
        """Return the words with the highest standardised scores, and their plain scores."""
        n = min(n, len(self.words))
        word = np.full((len(activations), n), -1, dtype=np.int64)
        score = np.full((len(activations), n), -np.inf)
        plain = np.full((len(activations), n), np.nan)
        for block in self.blocks(activations):
            rows = slice(block.latents.start, block.latents.stop)
            z = self._standardised(block)
            best = z.topk(min(n, z.shape[1]), dim=1)
            columns = best.indices.cpu().numpy()
            found = block.score.gather(1, best.indices).cpu().numpy()
            # A stable sort: among equals, the word that comes first stays first.
            all_scores = np.concatenate([score[rows], best.values.cpu().numpy()], axis=1)
            order = np.argsort(-all_scores, axis=1, kind="stable")[:, :n]
            for kept, new in (
                (word, block.words.start + columns),
                (score, all_scores[:, n:]),
                (plain, found),
            ):
                joined = np.concatenate([kept[rows], new], axis=1)
                kept[rows] = np.take_along_axis(joined, order, axis=1)
        return Candidates(word, score, {self.plain_name: plain})

    plain_name: ClassVar[str] = "plain"
    """What the score is before it is standardised, as a key of `Candidates.figures`."""

    def _standardised(self, block: ScoreBlock) -> Float[Tensor, "latents words"]:
        if self.mean is None or self.spread is None:
            return block.score
        words = slice(block.words.start, block.words.stop)
        device = block.score.device
        return (block.score - self.mean[words].to(device)) / self.spread[words].to(device)

    def _with(self, mean: Tensor, spread: Tensor) -> Self:
        other: Self = object.__new__(type(self))
        other.__dict__.update(self.__dict__, mean=mean, spread=spread)
        return other
