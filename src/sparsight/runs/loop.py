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

    A subclass says what a checkpoint is (`save`) and counts its `step`s.

    Args:
        checkpoints: folder of the checkpoints.
        pace: says when to write one by time.

    Attributes:
        step: number of steps that are done.
        kept_step: number of steps that are in a checkpoint.
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
        """Print a message to the user in between."""

    def newest_checkpoint(self) -> Path | None:
        """Return the path of the newest checkpoint, if there is one."""
        return checkpoint_files.newest(self.checkpoints)

    def what_stays(self) -> str:
        """Return what an error that ends the loop says about the work on disk."""
        newest = self.newest_checkpoint()
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def is_due(self, every: int, wanted: bool) -> bool:
        """Return whether to write a checkpoint after this step.

        Args:
            every: number of steps between checkpoints.
            wanted: whether the user chose that number; otherwise a checkpoint is written only if
                that takes no more than the share of the time that `Pace` allows.
        """
        by_number = self.step % every == 0 and (wanted or self.pace.affordable())
        return by_number or self.pace.due()

    def keep(self) -> None:
        """Write a checkpoint, and say so if that takes so long that few are written."""
        with self.pace.writing():
            self.save()
        self.kept_step = self.step
        slow = self.pace.stretched()
        if slow is not None:
            self.tell(slow)

    @contextmanager
    def kept_when_stopped(self) -> Iterator[None]:
        """Write a checkpoint if Ctrl-C or SIGTERM ends the block; state must be complete then."""
        try:
            yield
        except STOPS:
            if self.step > self.kept_step:
                self.keep()
            raise


def warn_of_damage(problems: Iterable[str]) -> None:
    """Warn about checkpoints that were passed over for an older one.

    Args:
        problems: what is wrong with each, as `checkpoint_files.read_latest` found.
    """
    for problem in problems:
        warnings.warn(f"Skipped a damaged checkpoint: {problem}", stacklevel=5)
