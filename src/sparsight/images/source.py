"""The one interface behind which all pictures stand, and a view of some of them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from sparsight.errors import UserError
from sparsight.images.selection import format_selection


@dataclass(frozen=True)
class ImageInfo:
    """What is known about a picture without decoding it."""

    id: str
    """Unique within its source and stable: `sub/photo.jpg`, `shard-000.tar/0012`, `7/00012`."""
    uri: str
    """Where the picture came from, in full: a path, or a path and a place inside it."""
    label: str | None = None
    """Name of its class."""
    caption: str | None = None
    """The first of `captions`."""
    captions: tuple[str, ...] = ()
    """All captions, in the order of the source."""

    def __post_init__(self) -> None:
        if self.captions and self.caption is None:
            object.__setattr__(self, "caption", self.captions[0])
        elif self.caption is not None and not self.captions:
            object.__setattr__(self, "captions", (self.caption,))
        elif self.captions and self.captions[0] != self.caption:
            raise ValueError(f"{self.id}: caption {self.caption!r} is not the first of captions")


class ImageSource(ABC):
    """A list of pictures with stable order and ids.

    Sources are picklable and open their files lazily, once in every process, so that worker
    processes can hold them whether forked or spawned.
    """

    spec: str
    """What `open_images` takes to open the same list again, from any working folder."""

    notes: tuple[str, ...] = ()
    """Sentences for the user about what opening left out or could not match."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def info(self, index: int) -> ImageInfo:
        """What is known about picture `index` (0 … len − 1), without decoding it.

        Raises:
            ImageError: what the source says of it cannot be read; the reason is in `.reason`.
        """

    @abstractmethod
    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        """Picture `index` as upright 8-bit RGB.

        Args:
            index: 0 … len − 1.
            min_side: the picture may be smaller than it is, see `decode_image`, as long as its
                shorter side keeps so many pixels.

        Raises:
            ImageError: the picture is broken or too large; the reason is in `.reason`.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex SHA-256 that changes when the list of pictures (ids, sizes, times) does."""

    def labels(self) -> list[str]:
        """The distinct labels, sorted; empty where there are none."""
        found = {self.info(index).label for index in range(len(self))}
        return sorted(label for label in found if label is not None)

    def subset(self, start: int, stop: int) -> ImageSource:
        """The pictures `start` … `stop − 1`, under the ids that they have here.

        Like a slice, `stop` may lie beyond the end.
        """
        if not 0 <= start <= stop:
            raise UserError(f"subset({start}, {stop}): expected 0 <= start <= stop.")
        return self.select(range(min(start, len(self)), min(stop, len(self))))

    def select(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> ImageSource:
        """The pictures at `indices`, in that order, under the ids that they have here."""
        return SelectedImages(self, self._checked(indices))

    def _checked(self, indices: Iterable[int]) -> npt.NDArray[np.int64]:
        array = np.fromiter((int(index) for index in indices), dtype=np.int64)
        bad = array[(array < 0) | (array >= len(self))]
        if bad.size:
            raise UserError(f"{self.spec}: no picture {bad[0]}; it has {len(self):,} (0 based).")
        return array

    def _check_index(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.spec}: no picture {index}; it has {len(self):,} (0 based)")
        return index

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r}, {len(self):,} images)"


class SelectedImages(ImageSource):
    """Some pictures of another source, in a given order, under their ids there."""

    def __init__(self, whole: ImageSource, indices: npt.NDArray[np.int64]) -> None:
        self.whole = whole
        self.indices = indices
        self.spec = whole.spec + format_selection(indices)
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
        """The whole source's fingerprint, tied to the selection."""
        digest = hashlib.sha256(self.whole.fingerprint().encode())
        digest.update(np.ascontiguousarray(self.indices, dtype="<i8").tobytes())
        return digest.hexdigest()

    def select(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> ImageSource:
        """See `ImageSource.select`; a selection of a selection is one selection of the whole."""
        return SelectedImages(self.whole, self.indices[self._checked(indices)])
