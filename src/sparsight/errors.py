"""The two ways that Sparsight fails: the user's mistake, and a fault.

The command line prints the message alone, without a traceback, and exits with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class SparsightError(Exception):
    """A fault: a full disk, a damaged file, numbers that are not finite. Exit code 1."""

    exit_code = 1


class UserError(SparsightError, ValueError):
    """Something that the caller can put right: the message says what was found and what to do.

    Exit code 2.
    """

    exit_code = 2


class MissingExtra(UserError):
    """An optional library is not installed; the message names the extra that brings it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(
            f"This needs {library}, which is not installed. Install it with: "
            f"pip install 'sparsight[{extra}]'"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short: torch tells that of a processor's by the words alone."""
    if isinstance(error, MemoryError):
        return True
    words = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in words)


@contextmanager
def memory_told(advice: str) -> Iterator[None]:
    """Turn an error about memory into one that says what to do.

    Raises:
        SparsightError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, advice) from error


def out_of_memory(error: BaseException, advice: str) -> SparsightError:
    """What is said where memory was short."""
    reason = str(error).strip().partition("\n")[0].rstrip(".") or "the system gave no reason"
    return SparsightError(f"Memory ran out ({reason}). {advice}")
