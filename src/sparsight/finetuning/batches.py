"""Loaded batches of pairs: pixels, captions, and which of them are attacks."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, tensor

from sparsight.errors import SparsightError
from sparsight.finetuning.sampling import Pair
from sparsight.images import ImageInfo, ImageSource
from sparsight.vision import ImagePass, PassSettings, VisionModel


class JoinedImages(ImageSource):
    """Several sources in sequence, so that one loader prepares the images of all."""

    def __init__(self, parts: Sequence[ImageSource]) -> None:
        self.parts = tuple(parts)
        self.starts = list(itertools.accumulate(map(len, parts), initial=0))
        self.spec = " + ".join(part.spec for part in parts)
        self.notes = tuple(note for part in parts for note in part.notes)

    def __len__(self) -> int:
        return self.starts[-1]

    def _find(self, index: int) -> tuple[ImageSource, int]:
        part = bisect.bisect_right(self.starts, self._check_index(index)) - 1
        return self.parts[part], index - self.starts[part]

    def info(self, index: int) -> ImageInfo:
        """See `ImageSource.info`."""
        part, place = self._find(index)
        return part.info(place)

    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        """See `ImageSource.load`."""
        part, place = self._find(index)
        return part.load(place) if min_side is None else part.load(place, min_side)

    def fingerprint(self) -> str:
        """Return a fingerprint over those of the parts."""
        together = " ".join(part.fingerprint() for part in self.parts)
        return hashlib.sha256(together.encode()).hexdigest()


@dataclass(frozen=True)
class PairBatch:
    """The inputs of one forward pass.

    Attributes:
        pixels: pixels of the images.
        captions: one caption per image.
        attack: which images are attacks; they come last.
        clean: the attacked images without words, if known.
    """

    pixels: Float[Tensor, "batch 3 height width"]
    captions: list[str]
    attack: Bool[Tensor, " batch"]
    clean: Float[Tensor, "attacked 3 height width"] | None


class BatchLoader:
    """Loads planned batches; a broken image is left out of its batch and counted.

    Args:
        model: the model, for its preprocessing.
        data: source of clean pairs.
        attack: source of attacked pairs.
        clean: the same images as `attack` without words, in the same order.
        max_failed: share of all images that may be broken.
        workers: processes; see `load_batches`.

    Attributes:
        failures: reason by place, for every image that was broken so far.
    """

    def __init__(
        self,
        model: VisionModel,
        data: ImageSource,
        attack: ImageSource | None,
        clean: ImageSource | None,
        *,
        max_failed: float,
        workers: int | None,
    ) -> None:
        self.model = model
        parts = [data, *([attack] if attack is not None else ())]
        self.n_pictures = sum(map(len, parts))
        self.paired = clean is not None
        self.images = JoinedImages([*parts, *([clean] if clean is not None else ())])
        self.max_failed = max_failed
        self.workers = workers
        self.failures: dict[int, str] = {}

    def load(self, planned: Sequence[Sequence[Pair]]) -> Generator[PairBatch]:
        """Yield the batches, in order.

        Raises:
            SparsightError: too many images are broken, or a batch has fewer than two intact ones.
        """
        if not planned:
            return
        rows = [self._places(batch) for batch in planned]
        settings = PassSettings(len(rows[0]), self.workers)
        wanted = list(itertools.chain.from_iterable(rows))
        with ImagePass(self.model, self.images, settings=settings, indices=wanted) as seen:
            for pairs, places, batch in zip(planned, rows, seen.batches(), strict=True):
                self.failures.update(batch.failures)
                self._check()
                failed = {place for place, _ in batch.failures}
                yield self._assemble(pairs, places, failed, batch.pixels)

    def _places(self, pairs: Sequence[Pair]) -> list[int]:
        """Return the places of a batch in `images`: all its images, then the attacked ones without
        words.
        """
        starts = self.images.starts
        places = [starts[int(pair.attack)] + pair.place for pair in pairs]
        if self.paired:
            places += [starts[2] + pair.place for pair in pairs if pair.attack]
        return places

    def _assemble(
        self, pairs: Sequence[Pair], places: list[int], failed: set[int], pixels: Tensor
    ) -> PairBatch:
        # For this batch alone: an image that failed before may have loaded now.
        whole = [place not in failed for place in places]
        row = list(itertools.accumulate(whole, initial=0))
        behind = itertools.count(len(pairs))
        kept: list[tuple[Pair, int, int | None]] = []
        for number, pair in enumerate(pairs):
            other = next(behind) if self.paired and pair.attack else None
            if whole[number] and (other is None or whole[other]):
                kept.append((pair, row[number], None if other is None else row[other]))
        if len(kept) < 2:
            raise SparsightError(
                "A batch has fewer than two intact images; fix the broken ones, or use larger "
                "batches."
            )
        clean = [other for *_, other in kept if other is not None]
        return PairBatch(
            pixels[[number for _, number, _ in kept]],
            [pair.caption for pair, *_ in kept],
            tensor([pair.attack for pair, *_ in kept]),
            pixels[clean] if self.paired else None,
        )

    def _check(self) -> None:
        if len(self.failures) > self.max_failed * self.n_pictures:
            place, reason = next(iter(self.failures.items()))
            raise SparsightError(
                f"{len(self.failures):,} of {self.n_pictures:,} images are broken, more than "
                f"max_failed ({self.max_failed:.1%}) allows; the first is "
                f"{self.images.known(place).id}: {reason}."
            )
