"""The one pass over images: every loop that puts images through a model goes through it.

It loads images as the model wants them (its transform, and JPEGs decoded at the size that
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
    """How a pass loads images and whether it shows progress; its figures do not depend on it.

    Attributes:
        batch_size: images at a time, failed ones included.
        workers: processes that decode; default see `load_batches`.
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

    The `with` block shows the progress line and ends the workers, also when something stops the
    loop. Without it a pass loads the same batches and shows no progress.

    Args:
        model: decides transform and decoded size.
        source: the images.
        title: of the progress line; default no line.
        settings: batch size, workers and quiet.
        indices: places in `source`, in the order wanted; default those of `classes`, else all.
        classes: class number by place, for `classes_of`.
        max_failed: share of the images that may fail, from 0 to 1.
        line: count on this progress line, which several passes share, instead of an own one.
        done: images that an earlier pass of the same title put through.
        stop: lets Ctrl-C and SIGTERM through while the pass waits for images.

    Attributes:
        failures: place and reason of each image that failed so far.
        n_loaded: images that loaded so far.
        note: shown at the end of the progress line.
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
        """The batches in which an image loaded.

        Raises:
            UserError: at the end, if not one image loaded.
            SparsightError: more images fail than `max_failed` allows.
        """
        return self._start(self._loaded())

    def batches(self) -> Generator[ImageBatch, None, None]:
        """All batches, those without an image that loaded as well.

        Raises:
            SparsightError: more images fail than `max_failed` allows.
        """
        return self._start(self._all())

    def classes_of(self, batch: ImageBatch) -> Int[Tensor, " batch"]:
        """The classes of a batch's images."""
        return torch.tensor([self.classes[i] for i in batch.indices])

    def _start(
        self, batches: Generator[ImageBatch, None, None]
    ) -> Generator[ImageBatch, None, None]:
        # Outside a `with` block nobody else holds them: they end with whoever dropped them.
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
                f"first: {self.source.known(place).id}: {reason}."
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
        """Show a batch as done: once the loop asks for the next one, or ends."""
        if self._line is not None and self._unshown:
            self._line.advance(self._unshown, self.note)
        self._unshown = 0
