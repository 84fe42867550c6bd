"""A folder in which one process at a time works."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sparsight.errors import UserError
from sparsight.leftovers import remove_temporaries, temporaries
from sparsight.locks import lock

LOCK = ".lock"
"""Held by the process that works in the folder."""


def claimed(folder: Path, doing: str) -> AbstractContextManager[None]:
    """Keep other processes out of a folder while the context lasts.

    Args:
        folder: created if it does not exist.
        doing: what another process would be doing, for the message: "training into", say.

    Raises:
        UserError: another process is working in the folder.
        SparsightError: the folder cannot be created or written.
    """
    return lock(folder / LOCK, f"{folder}: another process is {doing} it.")


@dataclass(frozen=True)
class RunFolder(ABC):
    """The folder of a run, finished or not.

    Attributes:
        out: the folder.
    """

    out: Path

    doing: ClassVar[str] = "training into"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.out / "checkpoints"

    @abstractmethod
    def written(self) -> Iterable[tuple[Path, Collection[str]]]:
        """The folders into which the run writes, each with the names (or patterns) of its files."""

    def claimed(self) -> AbstractContextManager[None]:
        """Keep other processes from training into the folder while the context lasts.

        Raises:
            UserError: another process is training into it.
            SparsightError: the folder cannot be created or written.
        """
        return claimed(self.out, self.doing)

    def has_leftovers(self) -> bool:
        """Return whether a process was killed while it wrote here, or is writing now."""
        return (self.out / LOCK).exists() or any(
            temporaries(folder, names) for folder, names in self.written()
        )

    def clear(self) -> None:
        """Remove what a killed process left; the folder must be claimed."""
        for folder, names in self.written():
            remove_temporaries(folder, names)

    def clear_leftovers(self) -> None:
        """Remove what a process left that was killed just as the run was finished."""
        if self.has_leftovers():
            # A process that still holds the lock cleans up after itself.
            with suppress(UserError), self.claimed():
                self.clear()
