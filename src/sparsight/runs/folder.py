"""A folder that one process at a time works in."""

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
        folder: made if it is missing.
        doing: what another process would be doing, for the message: "training into", say.

    Raises:
        UserError: another process works in the folder.
        SparsightError: the folder cannot be made or written.
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
        """Folder of the checkpoints."""
        return self.out / "checkpoints"

    @abstractmethod
    def written(self) -> Iterable[tuple[Path, Collection[str]]]:
        """Folders that the run writes into, each with the names (or patterns) of what it writes."""

    def claimed(self) -> AbstractContextManager[None]:
        """While it lasts no other process may train into the folder.

        Raises:
            UserError: another process does.
            SparsightError: the folder cannot be made or written.
        """
        return claimed(self.out, self.doing)

    def has_leftovers(self) -> bool:
        """Whether a process was killed while it wrote here, or is writing now."""
        return (self.out / LOCK).exists() or any(
            temporaries(folder, names) for folder, names in self.written()
        )

    def clear(self) -> None:
        """Remove what a killed process left. The folder must be claimed."""
        for folder, names in self.written():
            remove_temporaries(folder, names)

    def clear_leftovers(self) -> None:
        """Remove what a process left that was killed in the moment when the run was finished."""
        if self.has_leftovers():
            # Whoever holds the lock still clears up behind itself.
            with suppress(UserError), self.claimed():
                self.clear()
