"""How often to save work: little is ever at stake, and saving costs little."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from sparsight.errors import UserError

SECONDS = 60.0
"""Seconds of work at stake, by default."""

LARGEST_SHARE = 0.02
"""The largest share of the time that writing may take."""


class Pace:
    """Says when to write the next checkpoint.

    Args:
        seconds: largest loss of work, in seconds; None never asks for a checkpoint.

    Attributes:
        interval: seconds between checkpoints; more than `seconds` if writing one takes more than a
            fiftieth of that.

    Raises:
        UserError: `seconds` is not positive.
    """

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not seconds > 0:
            raise UserError(f"checkpoint_seconds is {seconds}; it must be positive, or none.")
        self.seconds = seconds
        self.interval = seconds
        self._last = time.monotonic()
        self._took = 0.0
        self._told = False

    def due(self) -> bool:
        """Return whether the next checkpoint is due."""
        return self.interval is not None and time.monotonic() - self._last >= self.interval

    def affordable(self) -> bool:
        """Return whether another checkpoint now would take at most a fiftieth of the time."""
        return time.monotonic() - self._last >= self._took / LARGEST_SHARE

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Time the block, which writes a checkpoint, and count from its end."""
        begun = time.monotonic()
        yield
        self._last = time.monotonic()
        self._took = self._last - begun
        if self.seconds is not None:
            self.interval = max(self.seconds, self._took / LARGEST_SHARE)

    def stretched(self) -> str | None:
        """Return, once, a message about an interval longer than was asked for; else None."""
        if self._told or self.interval is None or self.interval == self.seconds:
            return None
        self._told = True
        return (
            f"A checkpoint takes {self._took:.1f} s to write, so one is written every "
            f"{self.interval:,.0f} s rather than every {self.seconds:g} s."
        )
