"""One pass over the images of pairs, kind after kind."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from sparsight.attacks.pairs import AttackPairs
from sparsight.images import ImageBatch
from sparsight.progress import ProgressLine, progress
from sparsight.vision import ImagePass, PassSettings, VisionModel

REASONS_KEPT = 3


class PairPass:
    """Put the images of pairs through a model, one kind after another, under one progress line.

        with PairPass(model, pairs, ("clean", "attacked"), "attack") as seen:
            for kind, batch in seen:
                ...

    Args:
        model: its transform and decoded size are used.
        pairs: the images.
        kinds: which kinds, in this order.
        title: title of the progress line.
        settings: settings of the pass.

    Attributes:
        loaded: by place in the pairs, whether an image has loaded in every kind so far.
        failed: number of images that did not load, by kind; kinds without failures are left out.
        reasons: reasons for the first three failures.
    """

    def __init__(
        self,
        model: VisionModel,
        pairs: AttackPairs,
        kinds: Sequence[str],
        title: str,
        settings: PassSettings | None = None,
    ) -> None:
        self.model, self.pairs, self.kinds, self.title = model, pairs, kinds, title
        self.settings = settings or PassSettings()
        self.loaded: npt.NDArray[np.bool_] = np.ones(len(pairs), bool)
        self.failed: dict[str, int] = {}
        self.reasons: list[str] = []
        self._stack = ExitStack()
        self._line: ProgressLine | None = None
        self._kind: ExitStack | None = None

    def __enter__(self) -> Self:
        total = len(self.pairs) * len(self.kinds)
        self._line = self._stack.enter_context(
            progress(self.title, total, "images", quiet=self.settings.quiet)
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._kind is not None:
            self._kind.close()
        self._stack.__exit__(kind, error, trace)

    def __iter__(self) -> Generator[tuple[str, ImageBatch], None, None]:
        """Yield kind and batch, for batches in which an image loaded."""
        for kind in self.kinds:
            source = self.pairs.source(kind)
            # `__exit__` closes this, too, if something stops the loop midway.
            with ExitStack() as self._kind:
                seen = self._kind.enter_context(
                    ImagePass(self.model, source, settings=self.settings, line=self._line)
                )
                for batch in seen.batches():
                    self._count(kind, batch)
                    if batch.indices:
                        yield kind, batch

    def _count(self, kind: str, batch: ImageBatch) -> None:
        for index, reason in batch.failures:
            self.loaded[index] = False
            self.failed[kind] = self.failed.get(kind, 0) + 1
            if len(self.reasons) < REASONS_KEPT:
                name = self.pairs.source(kind).known(index).id
                self.reasons.append(f"{name} ({kind}): {reason}")
