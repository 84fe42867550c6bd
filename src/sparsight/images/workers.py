"""How a worker process that loads images handles signals and the end of its parent.

Ctrl-C in a terminal reaches every process of the group, and so may SIGTERM from a job scheduler;
but only the parent should decide what to keep and when to stop. So workers start with both signals
blocked, obey SIGTERM only from their parent, and end by themselves within a moment of its end:
torch's own watchdog only looks every five seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

SECONDS_BETWEEN_LOOKS = 0.25
PATIENCE = 0.5
"""Seconds that a worker has to end by itself once nobody waits for its images any more."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MASKS = hasattr(signal, "pthread_sigmask") and hasattr(signal, "sigtimedwait")


@contextmanager
def deaf_children() -> Iterator[None]:
    """Block the signals in all processes that the calling thread starts in this context."""
    if not _MASKS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def watch_parent(_: int) -> None:
    """Start, in a worker, the thread that ends it with its parent; torch passes a number."""
    if _MASKS:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _report_unless_parent_has_gone
    threading.Thread(target=_watch, name="sparsight-watch-parent", daemon=True).start()


def end_workers(batches: Any) -> None:
    """End a loader's workers when the rest of their images is no longer wanted.

    Args:
        batches: torch's iterator over the batches of several workers.
    """
    workers = list(getattr(batches, "_workers", ()))

    def kill() -> None:
        for worker in workers:
            if worker.is_alive():
                worker.kill()

    if sys.is_finalizing():  # no new thread can start
        kill()
        return
    timer = threading.Timer(PATIENCE, kill)
    timer.daemon = True
    timer.start()
    try:
        batches._shutdown_workers()
    except BaseException:  # another Ctrl-C, say: wait for nothing any more
        kill()
        raise
    finally:
        timer.cancel()


def _report_unless_parent_has_gone(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print nothing when a stopped parent no longer takes what a worker hands over."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _watch() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:  # this process is not a worker
        return
    # It is not, where a fork server forks workers on the parent's behalf.
    is_child = os.getppid() == parent.pid
    while parent.is_alive() and (not is_child or os.getppid() == parent.pid):
        if not _MASKS:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            continue
        received = signal.sigtimedwait([signal.SIGTERM], SECONDS_BETWEEN_LOOKS)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(1)
