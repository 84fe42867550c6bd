"""Ctrl-C and SIGTERM during long work: finish the step under way, keep what is done, then stop.

A loop wraps itself in `postponed()` and calls `stop.check()` where its state is complete. Until
then the first signal is only remembered, so that no buffer is left half filled; a second one stops
at once. Where the loop only waits, for the next batch say, `with stop.at_once():` lets the first
one through. `keeping` then keeps what is in memory, and `noted` puts a note on the exception that
says how much that was, which the command line prints.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from sparsight.errors import SparsightError


class Terminated(SystemExit):
    """SIGTERM arrived. If not caught, the process ends with exit code 143 and no traceback."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


STOPS = (KeyboardInterrupt, Terminated)
"""The exceptions that Ctrl-C and SIGTERM raise."""


class Stop:
    """The signal that has arrived, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._waiting = False

    def check(self) -> None:
        """Raise the exception of the signal that has arrived, if any.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            Terminated: after SIGTERM.
        """
        if self.signal is not None:
            raise _exception(self.signal)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal stop this block immediately; the block leaves the loop's state as it is.

        Raises:
            KeyboardInterrupt: after Ctrl-C, including one that came before.
            Terminated: after SIGTERM, including one that came before.
        """
        self._waiting = True
        try:
            self.check()
            yield
        finally:
            self._waiting = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: remember the first; raise at the second, or where that is allowed."""
        first = self.signal is None
        if first:
            self.signal = number
        if self._waiting or not first:
            raise _exception(number)


@contextmanager
def postponed() -> Iterator[Stop]:
    """Hold back Ctrl-C and SIGTERM until `check` is called or the block ends.

    A signal that arrives within a block that then ends normally is raised at its end. Outside the
    main thread, where Python allows no handlers, nothing is held back.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {}
    number: int
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        # A signal that is ignored, or has another handler, is left alone.
        if handler in (signal.default_int_handler, signal.SIG_DFL, raise_terminated) or isinstance(
            getattr(handler, "__self__", None), Stop
        ):
            before[number] = signal.signal(number, stop.note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    stop.check()


@contextmanager
def noted(message: Callable[[], str]) -> Iterator[None]:
    """Add a note to the exception if Ctrl-C or SIGTERM ends the block.

    Args:
        message: returns what to say, once that is certain.
    """
    try:
        yield
    except STOPS as stop:
        stop.add_note(message())
        raise


@contextmanager
def keeping(keep: Callable[[], None]) -> Iterator[None]:
    """Keep what is in memory, whatever ends the block early.

    Args:
        keep: writes it. If that fails after a stop, a note on the stop says so; after an error,
            the first error is the one that is reported.
    """
    try:
        yield
    except STOPS as stop:
        try:
            keep()
        except SparsightError as failed:
            stop.add_note(f"Not everything could be kept: {failed}")
        raise
    except Exception:
        with suppress(SparsightError):  # report the first error
            keep()
        raise


def kept(
    done: int,
    total: int,
    unit: str,
    *,
    where: os.PathLike[str] | None = None,
    complete: bool = False,
) -> str:
    """Say how much of the work of a run that was stopped is on disk.

    Args:
        done: number of units that are on disk.
        total: number of units of the whole run.
        unit: what is counted, e.g. "vectors".
        where: the folder, if the sentence is to name it.
        complete: whether nothing is missing any more.
    """
    if not done:
        return "Nothing is kept yet; the same command begins again."
    place = "" if where is None else f" in {where}"
    then = "nothing is missing" if complete else "the same command goes on"
    return f"Kept {done:,} of {total:,} {unit}{place}; {then}."


def raise_terminated(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM in programs that want it to unwind the stack as Ctrl-C does."""
    raise Terminated


def _exception(number: int) -> KeyboardInterrupt | Terminated:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
