"""Sets of images from posting lists: what a query asks for, found in milliseconds.

The rarest condition of an `and` gives the candidates; the others are looked up for these alone, by
binary search of the shorter list in the longer one, so that a long list is not read as a whole. If
both lists are long, a table over all images is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Int32, Int64

from sparsight.latents.expressions import COMPARISONS
from sparsight.latents.postings import Postings

Places = Int32[np.ndarray, " images"]
Mask = Bool[np.ndarray, " images"]

LONG = 32
"""A list is long if it has more than one of this many images."""


@dataclass(frozen=True)
class Collection:
    """The images of an index, as queries see them.

    Attributes:
        postings: the images in which each latent fires, by their places in the source.
        read: places of the images that were read, rising.
        labels: their labels, or null.
    """

    postings: Postings
    read: Int64[np.ndarray, " images"]
    labels: pa.ChunkedArray

    @cached_property
    def label_names(self) -> list[str]:
        """Every label of an image that was read, in order of appearance."""
        names: list[str] = self._encoded.dictionary.to_pylist()
        return names

    @cached_property
    def label_numbers(self) -> Int32[np.ndarray, " places"]:
        """Place in `label_names` of each image of the source; −1 without a label."""
        numbers = np.full(self.postings.n_columns, -1, dtype=np.int32)
        numbers[self.read] = pc.fill_null(self._encoded.indices, -1).to_numpy(zero_copy_only=False)
        return numbers

    @cached_property
    def label_totals(self) -> Int64[np.ndarray, " labels"]:
        """Number of images that were read of each label."""
        return counted(self.label_numbers, len(self.label_names))

    @cached_property
    def _encoded(self) -> Any:
        return self.labels.cast(pa.string()).combine_chunks().dictionary_encode()

    def values_at(self, latent: int, places: Places) -> Float32[np.ndarray, " images"]:
        """Return a latent's activations in images (places, rising); 0 where it does not fire."""
        columns, values = self.postings.row(latent)
        found = np.zeros(len(places), dtype=np.float32)
        if not len(columns) or not len(places):
            return found
        if min(len(columns), len(places)) * LONG > self.postings.n_columns:
            table = np.zeros(self.postings.n_columns, dtype=np.float32)
            table[columns] = values
            taken: Float32[np.ndarray, " images"] = table[places]
            return taken
        short, long = (places, columns) if len(places) <= len(columns) else (columns, places)
        at = np.searchsorted(long, short)
        at[at == len(long)] = 0
        there = long[at] == short
        if len(places) <= len(columns):
            found[there] = values[at[there]]
        else:
            found[at[there]] = values[there]
        return found


def counted(numbers: Int32[np.ndarray, " n"], n_labels: int) -> Int64[np.ndarray, " labels"]:
    """Return how often each label occurs; −1 (no label) does not count."""
    counts: Int64[np.ndarray, " labels"] = np.bincount(numbers[numbers >= 0], minlength=n_labels)
    return counts


@dataclass(frozen=True)
class ImageSet:
    """Images by their places, rising; or, with `rest`, all images of the collection but these."""

    places: Places
    rest: bool = False

    def within(self, collection: Collection) -> Int64[np.ndarray, " images"]:
        """Return the places of the images, among those that were read."""
        if not self.rest:
            return self.places.astype(np.int64)
        kept = np.ones(collection.postings.n_columns, dtype=bool)
        kept[self.places] = False
        found: Int64[np.ndarray, " images"] = collection.read[kept[collection.read]]
        return found


@dataclass(frozen=True)
class Fires:
    """A latent fires (`comparison` is None), or its activation compares with a value.

    The activation is 0 in images in which the latent does not fire.
    """

    latent: int
    comparison: str | None = None
    value: float = 0.0

    def test(self, values: Float32[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Return which activations fulfil the condition."""
        if self.comparison is None:
            active: Bool[np.ndarray, " n"] = values != 0
            return active
        # In float32, as the activations are: so `12 >= .1` holds for the activation 0.1.
        fulfilled: Bool[np.ndarray, " n"] = COMPARISONS[self.comparison](
            values, np.float32(self.value)
        )
        return fulfilled

    @property
    def without(self) -> bool:
        """Whether the condition holds where the latent does not fire."""
        return bool(self.test(np.zeros(1, dtype=np.float32))[0])

    def size(self, collection: Collection) -> int:
        """Return the largest number of images for which it may hold."""
        if self.without:
            return len(collection.read)
        return int(np.diff(collection.postings.offsets[self.latent : self.latent + 2])[0])

    def images(self, collection: Collection) -> ImageSet:
        """Return the images for which it holds."""
        columns, values = collection.postings.row(self.latent)
        if self.comparison is None:
            return ImageSet(columns)
        mask = self.test(values)
        return ImageSet(columns[~mask], True) if self.without else ImageSet(columns[mask])

    def holds(self, collection: Collection, places: Places) -> Mask:
        """Return for which of some images (places, rising) it holds."""
        return self.test(collection.values_at(self.latent, places))


@dataclass(frozen=True)
class Labelled:
    """The image has one of these labels, by their places in `label_names`."""

    labels: tuple[int, ...]

    def size(self, collection: Collection) -> int:
        """Return the number of images for which it holds."""
        return int(collection.label_totals[list(self.labels)].sum())

    def images(self, collection: Collection) -> ImageSet:
        """Return the images for which it holds."""
        mask = self._mask(collection, collection.label_numbers)
        return ImageSet(np.flatnonzero(mask).astype(np.int32))

    def holds(self, collection: Collection, places: Places) -> Mask:
        """Return for which of some images (places, rising) it holds."""
        return self._mask(collection, collection.label_numbers[places])

    def _mask(self, collection: Collection, numbers: Int32[np.ndarray, " n"]) -> Mask:
        wanted = np.zeros(len(collection.label_names) + 1, dtype=bool)  # the last one is "none"
        wanted[list(self.labels)] = True
        mask: Mask = wanted[numbers]
        return mask


@dataclass(frozen=True)
class Without:
    """The opposite of a condition."""

    term: Asked

    def size(self, collection: Collection) -> int:
        """Return the largest number of images for which it may hold."""
        return len(collection.read)

    def images(self, collection: Collection) -> ImageSet:
        """Return the images for which it holds."""
        found = self.term.images(collection)
        return ImageSet(found.places, not found.rest)

    def holds(self, collection: Collection, places: Places) -> Mask:
        """Return for which of some images (places, rising) it holds."""
        return ~self.term.holds(collection, places)


@dataclass(frozen=True)
class AllOf:
    """All of several conditions."""

    terms: tuple[Asked, ...]

    def size(self, collection: Collection) -> int:
        """Return the largest number of images for which it may hold."""
        return min(term.size(collection) for term in self.terms)

    def images(self, collection: Collection) -> ImageSet:
        """Return the images for which it holds."""
        first, *others = sorted(self.terms, key=lambda term: term.size(collection))
        found = first.images(collection)
        if found.rest:  # then the others, too, are rests or as large
            rests = [found, *(term.images(collection) for term in others)]
            if all(each.rest for each in rests):
                return ImageSet(_union([each.places for each in rests], collection), True)
            found = ImageSet(found.within(collection).astype(np.int32))
        places = found.places
        for term in others:
            if not len(places):
                break
            places = places[term.holds(collection, places)]
        return ImageSet(places)

    def holds(self, collection: Collection, places: Places) -> Mask:
        """Return for which of some images (places, rising) it holds."""
        mask = np.ones(len(places), dtype=bool)
        for term in self.terms:
            mask &= term.holds(collection, places)
        return mask


@dataclass(frozen=True)
class AnyOf:
    """At least one of several conditions."""

    terms: tuple[Asked, ...]

    def size(self, collection: Collection) -> int:
        """Return the largest number of images for which it may hold."""
        total = sum(term.size(collection) for term in self.terms)
        return min(total, len(collection.read))

    def images(self, collection: Collection) -> ImageSet:
        """Return the images for which it holds."""
        found = [term.images(collection) for term in self.terms]
        rests = [each.places for each in found if each.rest]
        listed = _union([each.places for each in found if not each.rest], collection)
        if not rests:
            return ImageSet(listed)
        missing = rests[0]  # what no rest holds, and what the lists do not bring back
        for places in rests[1:]:
            missing = np.intersect1d(missing, places, assume_unique=True)
        return ImageSet(np.setdiff1d(missing, listed, assume_unique=True), True)

    def holds(self, collection: Collection, places: Places) -> Mask:
        """Return for which of some images (places, rising) it holds."""
        mask = np.zeros(len(places), dtype=bool)
        for term in self.terms:
            mask |= term.holds(collection, places)
        return mask


Asked = Fires | Labelled | Without | AllOf | AnyOf


def _union(
    lists: Sequence[Int32[np.ndarray, " _"]], collection: Collection
) -> Int32[np.ndarray, " found"]:
    if len(lists) == 1:
        return lists[0]
    if sum(map(len, lists)) * LONG > collection.postings.n_columns:
        table = np.zeros(collection.postings.n_columns, dtype=bool)
        for places in lists:
            table[places] = True
        return np.flatnonzero(table).astype(np.int32)
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int32), *lists]))
