"""Which latents fire in the same images, within one SAE or across two, from posting lists.

The score of two latents is Pearson's correlation of their activations over all images that both
indexes have read, with 0 in the images in which a latent does not fire:

    r = (Σ aᵢ bᵢ − N ā b̄) / √((Σ aᵢ² − N ā²) (Σ bᵢ² − N b̄²))

The sums need only the images in which a latent fires.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int32, Int64
from torch import Tensor

from sparsight.errors import UserError
from sparsight.images import sample_places
from sparsight.latents.index import LatentIndex
from sparsight.latents.nearest import NOBODY
from sparsight.latents.neighbour_tables import Neighbour, NeighbourTable
from sparsight.latents.postings import ENTRIES_AT_ONCE, Postings, row_blocks
from sparsight.progress import progress

MOST_PAIRS = 30_000_000_000
"""Pairs of entries that a whole table may multiply, some 6 minutes; see `Coactivation.sampled`."""
CELLS_AT_ONCE = 1 << 24
"""Sums of pairs of latents that are in memory at any moment."""
PAIRS_PER_PRODUCT = 1 / 200
"""Multiplying dense matrices takes this share of the time of as many pairs of entries."""


@runtime_checkable
class HasPostings(Protocol):
    """A latent index of format 2, or its parts that matter here."""

    @property
    def by_latent(self) -> Postings:
        """Rows are latents, columns are places of images."""

    @property
    def by_image(self) -> Postings:
        """Rows are places of images, columns are latents."""

    @property
    def image_places(self) -> Int[np.ndarray, " images"]:
        """Places of the images that were read."""


@dataclass(frozen=True)
class _Moments:
    """Mean and spread (√Σ(a − ā)²) of each latent over the images that count."""

    mean: Float64[np.ndarray, " latents"]
    spread: Float64[np.ndarray, " latents"]

    @classmethod
    def of(cls, by_image: Postings, counts: Bool[np.ndarray, " places"]) -> _Moments:
        n = int(counts.sum())
        total, squares = np.zeros((2, by_image.n_columns))
        for rows in by_image.blocks():
            entries = slice(int(by_image.offsets[rows.start]), int(by_image.offsets[rows.stop]))
            own = counts[by_image.rows_of(rows)]
            column = by_image.columns[entries][own]
            value = by_image.values[entries][own].astype(np.float64)
            total += np.bincount(column, value, by_image.n_columns)
            squares += np.bincount(column, value * value, by_image.n_columns)
        mean = total / max(n, 1)
        around = squares - n * mean * mean
        around[around < 1e-9 * squares] = 0  # as good as constant
        return cls(mean, np.sqrt(around))


def _check_same_images(index: LatentIndex, other: LatentIndex) -> None:
    """Check that two indexes were built from the same images.

    Raises:
        UserError: they were not.
    """
    one, two = index.manifest["images"], other.manifest["images"]
    if one["fingerprint"] != two["fingerprint"]:
        raise UserError(
            f"{index.folder} and {other.folder} were built from different images "
            f"({one['n_images']:,} of {one['source']} and {two['n_images']:,} of {two['source']}), "
            "so their latents cannot be compared by co-activation. Build both from the same images."
        )


class Coactivation:
    """Correlations of the latents of one index with those of another, or with one another.

    Making one reads the lists once; then `of` takes milliseconds.

    Args:
        queries: the index whose latents are asked about.
        others: the index whose latents are neighbours; default: the same one.
        sample: seed of a random sample of the images, where all of them would take long (see
            `MOST_PAIRS`); None: always use all images.

    Raises:
        UserError: two indexes were built from different images.
    """

    def __init__(
        self, queries: HasPostings, others: HasPostings | None = None, *, sample: int | None = None
    ) -> None:
        self.same = others is None
        self.queries = queries
        self.others = queries if others is None else others
        counts = np.zeros(queries.by_image.n_rows, dtype=bool)
        counts[queries.image_places] = True
        if others is not None:
            if isinstance(queries, LatentIndex) and isinstance(others, LatentIndex):
                _check_same_images(queries, others)
            read = np.zeros_like(counts)
            read[others.image_places] = True
            counts &= read
        self.n_read = int(counts.sum())
        if sample is not None:
            counts = self._sampled(counts, sample)
        self.counts = counts
        self.n_images = int(counts.sum())
        self._moments = _Moments.of(self.others.by_image, counts)
        self._own = self._moments if self.same else _Moments.of(self.queries.by_image, counts)

    @property
    def sampled(self) -> bool:
        """Whether only a sample of the images counts."""
        return self.n_images < self.n_read

    def of(self, latent: int, n: int = 16) -> list[Neighbour]:
        """Return the latents that correlate most with one latent; only positive correlations."""
        return NeighbourTable(*self._listed(latent, n)).row(0)

    def table(
        self, latents: Sequence[int] | None = None, n: int = 16, *, quiet: bool = True
    ) -> NeighbourTable:
        """Return the latents that correlate most with each of many latents.

        Args:
            latents: latents of `queries`, one row of the table each; default: all.
            n: neighbours per latent.
            quiet: show no progress line.
        """
        asked = range(self.queries.by_latent.n_rows) if latents is None else latents
        shape = (len(asked), n)
        joint = np.zeros(shape, np.int32)
        table = NeighbourTable(np.full(shape, NOBODY, np.int32), np.zeros(shape, np.float32), joint)
        done = 0
        with progress("co-activation", len(asked), "latents", quiet=quiet) as line:
            blocks = self._dense(asked, n) if self._prefers_dense(asked) else self._sparse(asked, n)
            for latent, score, images in blocks:
                rows = slice(done, done + len(latent))
                table.latent[rows], table.score[rows] = latent, score
                joint[rows] = images
                done += len(latent)
                line.advance(len(latent))
        return table

    def _sampled(
        self, counts: Bool[np.ndarray, " places"], seed: int
    ) -> Bool[np.ndarray, " places"]:
        """Keep so many images that a whole table multiplies `MOST_PAIRS` at most."""
        n_latents = self.queries.by_latent.n_rows
        work = min(self._pairs(counts), self._products(int(counts.sum()), n_latents))
        places = np.flatnonzero(counts)
        if work <= MOST_PAIRS:
            return counts
        n = max(1, int(len(places) * MOST_PAIRS / work))
        chosen = np.zeros_like(counts)
        chosen[places[sample_places(len(places), n, seed)]] = True
        return chosen

    def _pairs(self, counts: Bool[np.ndarray, " places"]) -> int:
        """Return how many pairs of entries share an image."""
        own, other = self.queries.by_image.counts[counts], self.others.by_image.counts[counts]
        return int((own.astype(np.float64) * other).sum())

    def _products(self, n_images: int, n_asked: int) -> int:
        """Return how many pairs take as long as multiplying dense matrices, twice."""
        cells = 2 * n_images * n_asked * self.others.by_image.n_columns
        return int(cells * PAIRS_PER_PRODUCT)

    def _prefers_dense(self, asked: Sequence[int]) -> bool:
        share = len(asked) / max(1, self.queries.by_latent.n_rows)
        return self._products(self.n_images, len(asked)) < share * self._pairs(self.counts)

    def _sparse(self, asked: Sequence[int], n: int) -> Iterator[_Rows]:
        for latent in asked:
            yield self._listed(latent, n)

    def _listed(self, latent: int, n: int) -> _Rows:
        """Return one row of a table, from the lists of the images in which the latent fires."""
        others = self.others.by_image
        places, activations = self.queries.by_latent.row(latent)
        fires = self.counts[places]
        places, activations = places[fires], activations[fires]
        column, sums, joint = _added_up(others, places, activations)
        if self.same:
            joint[column == latent] = 0
        own, other = self._own, self._moments
        above = sums - self.n_images * own.mean[latent] * other.mean[column]
        with np.errstate(divide="ignore", invalid="ignore"):
            score = (above / (own.spread[latent] * other.spread[column])).astype(np.float32)
        kept = np.isfinite(score) & (score > 0) & (joint > 0)
        column, score, joint = column[kept], score[kept], joint[kept]
        if len(score) > n:
            kept = score >= np.partition(score, len(score) - n)[len(score) - n]
            column, score, joint = column[kept], score[kept], joint[kept]
        best = np.lexsort((column, -score))[:n]
        row = _empty_rows(1, n)
        for values, found in zip(row, (column, score, joint), strict=True):
            values[0, : len(best)] = found[best]
        return row

    def _dense(self, asked: Sequence[int], n: int) -> Iterator[_Rows]:
        """Give rows of a table in blocks, from products of dense matrices."""
        most = max(1, CELLS_AT_ONCE // self.others.by_image.n_columns)
        for start in range(0, len(asked), most):
            some = np.asarray(asked[start : start + most])
            sums, joint = self._products_of(some)
            own, other = self._own, self._moments
            means, other_means, spreads, other_spreads = (
                torch.from_numpy(values).float()
                for values in (own.mean[some], other.mean, own.spread[some], other.spread)
            )
            score = sums.addr_(means, other_means, alpha=-self.n_images)
            score.div_(torch.outer(spreads, other_spreads))
            score[~((joint > 0) & score.isfinite() & (score > 0))] = 0
            if self.same:
                score[torch.arange(len(some)), torch.from_numpy(some)] = 0
            rows = _empty_rows(len(some), n)
            best, column = score.topk(min(n, score.shape[1]), dim=1)
            there = (best > 0).numpy()
            here = slice(0, there.shape[1])
            rows[0][:, here] = np.where(there, column.numpy(), NOBODY)
            rows[1][:, here] = best.numpy()
            rows[2][:, here] = np.where(there, joint.gather(1, column).numpy(), 0)
            yield rows

    def _products_of(
        self, asked: Int[np.ndarray, " asked"]
    ) -> tuple[Float[Tensor, "asked others"], Float[Tensor, "asked others"]]:
        """Return sums of products of activations, and numbers of images in which both fire."""
        own, others = self.queries.by_image, self.others.by_image
        number = np.full(own.n_columns, NOBODY)
        number[asked] = np.arange(len(asked))
        sums, joint = torch.zeros(2, len(asked), others.n_columns)
        everything = self.same and np.array_equal(asked, np.arange(own.n_columns))
        places = np.flatnonzero(self.counts)
        most = max(1, CELLS_AT_ONCE // (2 * others.n_columns))
        for start in range(0, len(places), most):
            some = places[start : start + most]
            one = _matrix(own, some, len(asked), number)
            other = one if everything else _matrix(others, some, others.n_columns)
            sums.addmm_(one.T, other)
            joint.addmm_((one != 0).float().T, (other != 0).float())
        return sums, joint


_Rows = tuple[
    Int32[np.ndarray, "rows n"], Float32[np.ndarray, "rows n"], Int32[np.ndarray, "rows n"]
]


def _empty_rows(rows: int, n: int) -> _Rows:
    return (
        np.full((rows, n), NOBODY, np.int32),
        np.zeros((rows, n), np.float32),
        np.zeros((rows, n), np.int32),
    )


def _added_up(
    others: Postings,
    places: Int[np.ndarray, " images"],
    activations: Float32[np.ndarray, " images"],
) -> tuple[
    Int64[np.ndarray, " columns"], Float64[np.ndarray, " columns"], Int64[np.ndarray, " columns"]
]:
    """Add up what fires in some images, each image times an activation.

    Returns:
        Latents that fire, rising; sums of products of activations; numbers of images.
    """
    n = others.n_columns
    lengths = others.offsets[places + 1] - others.offsets[places]
    if int(lengths.sum()) < n // 16:  # sorting a few entries is faster than counting all latents
        latents, products = _products(others, places, activations, lengths)
        found, place = np.unique(latents, return_inverse=True)
        sums = np.bincount(place, products).astype(np.float64)  # whole numbers if there are none
        return found.astype(np.int64), sums, np.bincount(place)
    sums, joint = np.zeros(n), np.zeros(n, np.int64)
    for some in row_blocks(np.concatenate([[0], lengths.cumsum()]), ENTRIES_AT_ONCE):
        part = slice(some.start, some.stop)
        latents, products = _products(others, places[part], activations[part], lengths[part])
        sums += np.bincount(latents, products, n)
        joint += np.bincount(latents, minlength=n)
    found = np.flatnonzero(joint)
    return found, sums[found], joint[found]


def _products(
    others: Postings,
    places: Int[np.ndarray, " images"],
    activations: Float32[np.ndarray, " images"],
    lengths: Int64[np.ndarray, " images"],
) -> tuple[Int32[np.ndarray, " entries"], Float64[np.ndarray, " entries"]]:
    """Return the entries of some images: latents, and their activations times the image's."""
    entries = _entries(others.offsets[places], lengths)
    factor = np.repeat(activations.astype(np.float64), lengths)
    return others.columns[entries], others.values[entries] * factor


def _entries(
    starts: Int64[np.ndarray, " rows"], lengths: Int64[np.ndarray, " rows"]
) -> Int64[np.ndarray, " entries"]:
    """Return the places of the entries of rows that begin at `starts`."""
    ends = lengths.cumsum()
    shift = np.repeat(starts - (ends - lengths), lengths)
    entries: Int64[np.ndarray, " entries"] = shift + np.arange(len(shift))
    return entries


def _matrix(
    lists: Postings,
    rows: Int[np.ndarray, " rows"],
    n_columns: int,
    number: Int[np.ndarray, " columns"] | None = None,
) -> Float[Tensor, "rows chosen"]:
    """Return rows of posting lists as a dense matrix; `number` chooses and numbers columns."""
    lengths = lists.offsets[rows + 1] - lists.offsets[rows]
    entries = _entries(lists.offsets[rows], lengths)
    column, row = lists.columns[entries], np.repeat(np.arange(len(rows)), lengths)
    value = lists.values[entries]
    if number is not None:
        column = number[column]
        own = column != NOBODY
        column, row, value = column[own], row[own], value[own]
    matrix = np.zeros((len(rows), n_columns), np.float32)
    matrix[row, column] = value
    return torch.from_numpy(matrix)
