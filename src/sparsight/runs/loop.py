"""A loop over steps that loses nothing when it is stopped, and little when it is killed."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsight.interruption import STOPS
from sparsight.pace import Pace
from sparsight.runs import checkpoint_files


class CheckpointedLoop(ABC):
    """A loop whose steps are kept in checkpoints: by number, by time, and when it is stopped.

    A kind of loop says what a checkpoint is (`save`) and counts its `step`s.

    Args:
        checkpoints: folder of the checkpoints.
        pace: when to write one by time.

    Attributes:
        step: steps that are done.
        kept_step: steps that are in a checkpoint.
    """

    def __init__(self, checkpoints: Path, pace: Pace) -> None:
        self.checkpoints = checkpoints
        self.pace = pace
        self.step = self.kept_step = 0

    @abstractmethod
    def save(self) -> None:
        """Write a checkpoint of everything that a resumed run needs."""

    @abstractmethod
    def tell(self, text: str) -> None:
        """Tell the user something on the way."""

    def newest_checkpoint(self) -> Path | None:
        """Where the newest checkpoint lies, if there is one."""
        return checkpoint_files.newest(self.checkpoints)

    def what_stays(self) -> str:
        """What an error that ends the loop says of the work on disk."""
        newest = self.newest_checkpoint()
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def is_due(self, every: int, wanted: bool) -> bool:
        """Whether a checkpoint is to be written after this step.

        Args:
            every: steps between checkpoints.
            wanted: the user named that number; else one is written only where it takes no more
                than the share of the time that `Pace` allows.
        """
        by_number = self.step % every == 0 and (wanted or self.pace.affordable())
        return by_number or self.pace.due()

    def keep(self) -> None:
        """Write a checkpoint, and say so where that takes so long that few are written."""
        with self.pace.writing():
            self.save()
        self.kept_step = self.step
        slow = self.pace.stretched()
        if slow is not None:
            self.tell(slow)

    @contextmanager
    def kept_when_stopped(self) -> Iterator[None]:
        """Write a checkpoint if Ctrl-C or SIGTERM ends the block, before which state is whole."""
        try:
            yield
        except STOPS:
            if self.step > self.kept_step:
                self.keep()
            raise


def warn_of_damage(problems: Iterable[str]) -> None:
    """Tell of checkpoints that were passed over for an older one.

    Args:
        problems: what is wrong with each, as `checkpoint_files.read_latest` found.
    """
    for problem in problems:
        warnings.warn(f"Skipped a damaged checkpoint: {problem}", stacklevel=5)
