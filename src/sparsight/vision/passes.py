"""The one pass over images, which every loop that puts images through a model uses.

It loads images as the model needs them (its transform, and JPEGs decoded at the size that
`VisionModel.scale_jpegs` set), in batches that worker processes prepare; it counts the images that
fail, shows progress, and ends its workers whatever stops the loop.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Self, cast

import torch
from jaxtyping import Int
from torch import Tensor

from sparsight.errors import UserError
from sparsight.images import ImageBatch, ImageSource, load_batches
from sparsight.images.failures import FailureTally
from sparsight.interruption import Stop
from sparsight.progress import ProgressLine, progress
from sparsight.vision.model import VisionModel


@dataclass(frozen=True)
class PassSettings:
    """How a pass loads images and whether it shows progress; figures do not depend on it.

    Attributes:
        batch_size: images at a time, failed ones included.
        workers: processes that decode; for the default see `load_batches`.
        quiet: show no progress line.
    """

    batch_size: int = 64
    workers: int | None = None
    quiet: bool = True


class ImagePass:
    """Put the images of a source through a model, in order, batch by batch.

        with ImagePass(model, images, "zero-shot") as seen:
            for batch in seen:
                embeddings = model.embed_images(batch.pixels)
        print(len(seen.failures), "images failed")

    The `with` block shows the progress line and ends the workers, even if something stops the
    loop. Without it, a pass loads the same batches but shows no progress.

    Args:
        model: its transform and decoded size are used.
        source: the images.
        title: title of the progress line; default: no line.
        settings: batch size, workers and quiet.
        indices: places in `source`, in this order; default: those of `classes`, otherwise all.
        classes: class number by place, for `classes_of`.
        max_failed: share of the images that may fail, from 0 to 1.
        line: a progress line that several passes share, used instead of a new one.
        done: images that an earlier pass with the same title put through.
        stop: lets Ctrl-C and SIGTERM through while the pass waits for images.

    Attributes:
        failures: place and reason for each image that has failed so far.
        n_loaded: number of images that have loaded so far.
        note: text at the end of the progress line.
    """

    def __init__(
        self,
        model: VisionModel,
        source: ImageSource,
        title: str | None = None,
        settings: PassSettings | None = None,
        *,
        indices: Sequence[int] | None = None,
        classes: Mapping[int, int] | None = None,
        max_failed: float = 1.0,
        line: ProgressLine | None = None,
        done: int = 0,
        stop: Stop | None = None,
    ) -> None:
        self.model, self.source, self.title = model, source, title
        self.settings = settings or PassSettings()
        self.classes = classes or {}
        if indices is None:
            indices = range(len(source)) if classes is None else sorted(classes)
        self.indices = indices
        self.failures: list[tuple[int, str]] = []
        self.n_loaded = 0
        self.note = ""
        self._tally = FailureTally(len(indices), max_failed)
        self._line, self._done, self._stop = line, done, stop
        self._unshown = 0
        self._running: list[Generator[ImageBatch, None, None]] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._running = []
        if self.title is not None:
            total = self._done + len(self.indices)
            self._line = self._stack.enter_context(
                progress(self.title, total, "images", done=self._done, quiet=self.settings.quiet)
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._show()
        for batches in self._running or ():
            batches.close()
        self._running = None
        self._stack.__exit__(kind, error, trace)

    def __iter__(self) -> Generator[ImageBatch, None, None]:
        """Yield the batches in which an image loaded.

        Raises:
            UserError: at the end, if no image loaded.
            SparsightError: more images fail than `max_failed` allows.
        """
        return self._start(self._loaded())

    def batches(self) -> Generator[ImageBatch, None, None]:
        """Yield all batches, including those in which no image loaded.

        Raises:
            SparsightError: more images fail than `max_failed` allows.
        """
        return self._start(self._all())

    def classes_of(self, batch: ImageBatch) -> Int[Tensor, " batch"]:
        """Return the classes of a batch's images."""
        return torch.tensor([self.classes[i] for i in batch.indices])

    def _start(
        self, batches: Generator[ImageBatch, None, None]
    ) -> Generator[ImageBatch, None, None]:
        # Outside a `with` block only the caller holds them: they end when it drops them.
        if self._running is not None:
            self._running.append(batches)
        return batches

    def _loaded(self) -> Generator[ImageBatch, None, None]:
        with closing(self._all()) as batches:
            for batch in batches:
                if batch.indices:
                    yield batch
        if self.failures and not self.n_loaded:
            place, reason = self.failures[0]
            raise UserError(
                f"{self.source.spec}: none of its {len(self.indices):,} images could be read. The "
                f"first failure: {self.source.known(place).id}: {reason}."
            )

    def _all(self) -> Generator[ImageBatch, None, None]:
        loaded = cast(
            Generator[ImageBatch, None, None],
            load_batches(
                self.source,
                self.model.transform,
                self.settings.batch_size,
                indices=self.indices,
                workers=self.settings.workers,
                min_side=self.model.min_side,
            ),
        )
        with closing(loaded):
            while True:
                with self._waiting():
                    batch = next(loaded, None)
                if batch is None:
                    return
                self._count(batch)
                yield batch
                self._show()

    def _waiting(self) -> AbstractContextManager[None]:
        return nullcontext() if self._stop is None else self._stop.at_once()

    def _count(self, batch: ImageBatch) -> None:
        self._unshown = len(batch.indices) + len(batch.failures)
        self.n_loaded += len(batch.indices)
        for place, reason in batch.failures:
            self.failures.append((place, reason))
            self._tally.add(self.source.known(place).id, reason)
        self._tally.check()

    def _show(self) -> None:
        """Count a batch as done once the loop asks for the next one, or ends."""
        if self._line is not None and self._unshown:
            self._line.advance(self._unshown, self.note)
        self._unshown = 0
