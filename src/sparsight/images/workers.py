"""What a worker process that loads images does about signals, and when its parent is gone.

Ctrl-C in a terminal goes to every process of the group, as SIGTERM from a job scheduler may: what
to keep, and when to stop, is for the parent to decide. So workers are born with both blocked, heed
SIGTERM from their parent alone, and end by themselves within a moment once it is gone: torch's own
watchdog looks every five seconds only.
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
"""Seconds that a worker has to end by itself where no one waits for its images any more."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MASKS = hasattr(signal, "pthread_sigmask") and hasattr(signal, "sigtimedwait")


@contextmanager
def deaf_children() -> Iterator[None]:
    """Let processes that the calling thread starts meanwhile be born with the signals blocked."""
    if not _MASKS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def watch_parent(_: int) -> None:
    """Start, in a worker, the thread that ends it with its parent; torch gives its number."""
    if _MASKS:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _told_unless_parent_has_gone
    threading.Thread(target=_watch, name="sparsight-watch-parent", daemon=True).start()


def end_workers(batches: Any) -> None:
    """End a loader's workers where the rest of their images is not wanted any more.

    Args:
        batches: torch's iterator over the batches of several workers.
    """
    workers = list(getattr(batches, "_workers", ()))

    def kill() -> None:
        for worker in workers:
            if worker.is_alive():
                worker.kill()

    if sys.is_finalizing():  # no thread starts any more
        kill()
        return
    timer = threading.Timer(PATIENCE, kill)
    timer.daemon = True
    timer.start()
    try:
        batches._shutdown_workers()
    except BaseException:  # another Ctrl-C, say: nothing is waited for any more
        kill()
        raise
    finally:
        timer.cancel()


def _told_unless_parent_has_gone(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Say nothing where a stopped parent no longer takes what a worker hands over."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _watch() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:  # this is no worker
        return
    # Not where a server forks workers for the parent.
    is_child = os.getppid() == parent.pid
    while parent.is_alive() and (not is_child or os.getppid() == parent.pid):
        if not _MASKS:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            continue
        found = signal.sigtimedwait([signal.SIGTERM], SECONDS_BETWEEN_LOOKS)
        if found is not None and found.si_pid == parent.pid:
            break
    os._exit(1)
