"""Tests marked `alone` have the machine for themselves, though others run in several processes.

They time something or count threads. Workers of pytest-xdist share a lock while they run a test;
one that is alone holds it by itself. What it waits at is closed to others meanwhile, or they would
go on sharing the lock for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

GATE, ROOM = "Makefile", "pyproject.toml"
"""Files that are there anyway; locks leave no trace on them."""


@contextmanager
def held(path: Path, exclusively: bool) -> Iterator[None]:
    with path.open("rb") as file:  # closing it lets go
        fcntl.flock(file, fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Run a test, with all its fixtures, beside others or alone."""
    # A pytest that a test starts is no worker, and must not wait for that test to end.
    if fcntl is None or not hasattr(item.config, "workerinput"):
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    root = item.config.rootpath
    with ExitStack() as stack:
        with held(root / GATE, exclusively=True):
            stack.enter_context(held(root / ROOM, exclusively=alone))
        return (yield)
