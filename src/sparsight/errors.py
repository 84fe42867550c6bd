"""The two ways in which Sparsight fails: a mistake of the user, and a fault.

The command line prints only the message, without a traceback, and exits with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class SparsightError(Exception):
    """A fault: a full disk, a damaged file, numbers that are not finite. Exit code 1."""

    exit_code = 1


class UserError(SparsightError, ValueError):
    """A mistake that the caller can put right: the message says what was found and what to do.

    Exit code 2.
    """

    exit_code = 2


class MissingExtra(UserError):
    """An optional library is not installed; the message names what to install.

    Args:
        library: which.
        extra: the extra that installs it; None where the library itself is to be installed.
    """

    def __init__(self, library: str, extra: str | None = None) -> None:
        wanted = library if extra is None else f"'sparsight[{extra}]'"
        super().__init__(
            f"This needs {library}, which is not installed. Install it with: pip install {wanted}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; for the CPU, only torch's wording says so."""
    if isinstance(error, MemoryError):
        return True
    phrases = ("out of memory", "allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)


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
    """Return the error that reports that memory ran out."""
    reason = str(error).strip().partition("\n")[0].rstrip(".") or "the system gave no reason"
    return SparsightError(f"Memory ran out ({reason}). {advice}")
