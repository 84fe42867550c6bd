"""The two ways that Sparsight fails: the user's mistake, and a fault.

The command line prints the message alone, without a traceback, and exits with `exit_code`.
"""

from __future__ import annotations


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
