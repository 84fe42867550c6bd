"""Ctrl-C and SIGTERM during long work: finish the step under way, keep what is done, then stop.

A loop wraps itself in `postponed()` and asks `stop.check()` where its state is whole. The first
signal is only noted until then, so that no buffer is left half filled; a second one stops at once.
Where the loop only waits, for the next batch say, `with stop.at_once():` lets the first through.
What is in memory then is kept with `keeping`, and `noted` puts on the exception how much that was:
the command line prints the notes.
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
    """SIGTERM arrived. Uncaught, the process ends with exit code 143 and no traceback."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


STOPS = (KeyboardInterrupt, Terminated)
"""What Ctrl-C and SIGTERM raise."""


class Stop:
    """The signal that has arrived, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._waiting = False

    def check(self) -> None:
        """Raise what the signal stands for, if one has arrived.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            Terminated: after SIGTERM.
        """
        if self.signal is not None:
            raise _exception(self.signal)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal stop the block, which leaves the loop's state as it is, where it stands.

        Raises:
            KeyboardInterrupt: after Ctrl-C, also one that came before.
            Terminated: after SIGTERM, also one that came before.
        """
        self._waiting = True
        try:
            self.check()
            yield
        finally:
            self._waiting = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: remember the first signal; raise at the second, or where one may."""
        first = self.signal is None
        if first:
            self.signal = number
        if self._waiting or not first:
            raise _exception(number)


@contextmanager
def postponed() -> Iterator[Stop]:
    """Hold back Ctrl-C and SIGTERM until `check` is called or the block ends.

    A signal that came within a block that then ends by itself is raised at its end. Outside the
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
        # Who ignores a signal, or has a handler of their own, keeps it.
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
def noted(told: Callable[[], str]) -> Iterator[None]:
    """Put a note on the stop that ends the block, if one does.

    Args:
        told: says what is kept, once that is certain.
    """
    try:
        yield
    except STOPS as stop:
        stop.add_note(told())
        raise


@contextmanager
def keeping(keep: Callable[[], None]) -> Iterator[None]:
    """Keep what is in memory, whatever ends the block before its end.

    Args:
        keep: writes it. Where that fails after a stop, a note on the stop says so; after an error,
            the error is what is told.
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
        with suppress(SparsightError):  # the first error is the one to tell
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
    """What a run that was stopped says of the work that lies on disk.

    Args:
        done: units that are on disk.
        total: units of the whole run.
        unit: what is counted, e.g. "vectors".
        where: the folder, if it is to be named.
        complete: whether nothing is missing any more.
    """
    if not done:
        return "Nothing is kept yet; the same command begins again."
    place = "" if where is None else f" in {where}"
    then = "nothing is missing" if complete else "the same command goes on"
    return f"Kept {done:,} of {total:,} {unit}{place}; {then}."


def raise_terminated(number: int, frame: FrameType | None) -> None:
    """Signal handler for SIGTERM of programs that want it to unwind the stack as Ctrl-C does."""
    raise Terminated


def _exception(number: int) -> KeyboardInterrupt | Terminated:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
