"""The interface that every source of images implements, and a view of some of a source's images."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from sparsight.errors import UserError
from sparsight.images.decoding import ImageError
from sparsight.images.selection import (
    Sample,
    format_selection,
    sample_places,
    stratified_places,
)
from sparsight.notebooks import data_frame
from sparsight.text import without_surrogates

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class ImageInfo:
    """What a source knows about an image without decoding it; all text can be written as UTF-8."""

    id: str
    """Unique within its source and stable: `sub/photo.jpg`, `shard-000.tar/0012`, `7/00012`."""
    uri: str
    """Where the image came from, in full: a path, or a path and a place inside it."""
    label: str | None = None
    """The name of its class."""
    caption: str | None = None
    """The first of `captions`."""
    captions: tuple[str, ...] = ()
    """All captions, in the order of the source."""

    def __post_init__(self) -> None:
        for name in ("id", "uri", "label", "caption"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, without_surrogates(value))
        object.__setattr__(self, "captions", tuple(map(without_surrogates, self.captions)))
        if self.captions and self.caption is None:
            object.__setattr__(self, "caption", self.captions[0])
        elif self.caption is not None and not self.captions:
            object.__setattr__(self, "captions", (self.caption,))
        elif self.captions and self.captions[0] != self.caption:
            raise ValueError(f"{self.id}: caption {self.caption!r} is not the first of captions")


class ImageSource(ABC):
    """A list of images with stable order and ids.

    Sources are picklable and open their files lazily, once in every process, so that worker
    processes can hold them, however they were started (forked or spawned).
    """

    spec: str
    """The text that makes `open_images` open the same list again, from any working folder."""

    notes: tuple[str, ...] = ()
    """Sentences for the user about what was left out or could not be matched on opening."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def info(self, index: int) -> ImageInfo:
        """Return what is known about image `index` (0 … len − 1), without decoding it.

        Raises:
            ImageError: the source's description of the image cannot be read; see `.reason`.
        """

    @abstractmethod
    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        """Return image `index` as upright 8-bit RGB.

        Args:
            index: 0 … len − 1.
            min_side: the shortest side, in pixels, down to which a JPEG may be scaled while it is
                decoded (see `decode_image`); None decodes it in full.

        Raises:
            ImageError: the image is broken or too large; the reason is in `.reason`.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hex SHA-256 that changes when the list of images (ids, sizes, times) changes."""

    def known(self, index: int) -> ImageInfo:
        """Return `info(index)`, or only the image's place if its description cannot be read."""
        try:
            return self.info(index)
        except ImageError:
            place = f"{self.spec}[{index}]"
            return ImageInfo(id=place, uri=place)

    def labels(self) -> list[str]:
        """Return the distinct labels, sorted; empty if there are none."""
        found = {self.known(index).label for index in range(len(self))}
        return sorted(label for label in found if label is not None)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per image in a data frame of pandas: `id`, `uri`, `label`, `captions`.

        Raises:
            MissingExtra: pandas is not installed.
        """
        known = [self.known(index) for index in range(len(self))]
        names = ("id", "uri", "label", "captions")
        return data_frame({name: [getattr(each, name) for each in known] for name in names})

    def subset(self, start: int, stop: int) -> ImageSource:
        """Return images `start` … `stop − 1`, under the ids that they have here.

        As in a slice, `stop` may lie beyond the end.
        """
        if not 0 <= start <= stop:
            raise UserError(f"subset({start}, {stop}): expected 0 <= start <= stop.")
        return self.select(range(min(start, len(self)), min(stop, len(self))))

    def select(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> ImageSource:
        """Return the images at `indices`, in that order, under the ids that they have here."""
        return SelectedImages(self, self._checked(indices))

    def sample(self, n: int, seed: int = 0, *, by_label: bool = False) -> ImageSource:
        """Draw a random sample, in the order of the source, under the ids that the images have
        here.

        The sample is the same on every machine. With the same seed, a smaller sample is a subset of
        a larger one. Its spec opens it again (`photos?sample=1000&seed=0`).

        Args:
            n: number of images; all of them if the source has no more.
            seed: seed of the draw.
            by_label: draw a stratified sample, in which each label keeps its share of the images.

        Raises:
            UserError: a number is out of range.
        """
        asked = Sample(n, seed, by_label)
        if n >= len(self):
            return self
        if by_label:
            labels = [self.known(index).label for index in range(len(self))]
            places = stratified_places(labels, n, seed)
        else:
            places = sample_places(len(self), n, seed)
        # A written source has options of its own, so a sample of it always begins with "?".
        mark = "&" if "?table=" in self.spec and not self.spec.startswith("written:") else "?"
        return self._view(places, f"{self.spec}{mark}{asked}")

    def _view(self, places: npt.NDArray[np.int64], spec: str) -> ImageSource:
        """Return the images at `places`; `spec` opens them again."""
        return SelectedImages(self, places, View.whole(spec, len(places)))

    def _checked(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        array = np.fromiter((int(index) for index in indices), dtype=np.int64)
        bad = array[(array < 0) | (array >= len(self))]
        if bad.size:
            raise UserError(f"{self.spec}: no image {bad[0]}; it has {len(self):,} (0 based).")
        return array

    def _check_index(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.spec}: no image {index}; it has {len(self):,} (0 based)")
        return index

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r}, {len(self):,} images)"


@dataclass(frozen=True)
class View:
    """How the spec of a view names its images: by their places in the nearest list with a spec.

    Attributes:
        base: the spec of that list.
        places: where the view's images are in it; None for all of them, in order.
        size: number of images in the view.
    """

    base: str
    places: npt.NDArray[np.int64] | None
    size: int

    @classmethod
    def of(cls, base: str, places: npt.NDArray[np.int64]) -> View:
        """Return a view of the images at `places` in the list that `base` opens."""
        return cls(base, places, len(places))

    @classmethod
    def whole(cls, base: str, size: int) -> View:
        """Return a view of the whole list that `base` opens, e.g. a sample."""
        return cls(base, None, size)

    @property
    def spec(self) -> str:
        """The text that opens the view."""
        return self.base + ("" if self.places is None else format_selection(self.places))

    def select(self, chosen: npt.NDArray[np.int64]) -> View:
        """Return a view of the images at `chosen` in this view."""
        return View.of(self.base, chosen if self.places is None else self.places[chosen])


class SelectedImages(ImageSource):
    """Some images of another source, in a given order, under the ids that they have there.

    Args:
        whole: the other source.
        indices: places in it.
        view: the same places as the spec expresses them; by default a selection from `whole`.
    """

    def __init__(
        self, whole: ImageSource, indices: npt.NDArray[np.int64], view: View | None = None
    ) -> None:
        self.whole = whole
        self.indices = indices
        self.view = view or View.of(whole.spec, indices)
        self.spec = self.view.spec
        self.notes = whole.notes

    def __len__(self) -> int:
        return len(self.indices)

    def info(self, index: int) -> ImageInfo:
        """See `ImageSource.info`."""
        return self.whole.info(int(self.indices[self._check_index(index)]))

    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        """See `ImageSource.load`."""
        place = int(self.indices[self._check_index(index)])
        return self.whole.load(place) if min_side is None else self.whole.load(place, min_side)

    def fingerprint(self) -> str:
        """Return the whole source's fingerprint, combined with the selection."""
        digest = hashlib.sha256(self.whole.fingerprint().encode())
        digest.update(np.ascontiguousarray(self.indices, dtype="<i8").tobytes())
        return digest.hexdigest()

    def select(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> ImageSource:
        """See `ImageSource.select`; a selection of a selection is one selection of the whole."""
        chosen = self._checked(indices)
        return type(self)(self.whole, self.indices[chosen], self.view.select(chosen))

    def _view(self, places: npt.NDArray[np.int64], spec: str) -> ImageSource:
        return type(self)(self.whole, self.indices[places], View.whole(spec, len(places)))
