"""Ends a process as a kill would, before any chosen one of its changes to files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "ctypes.dlsym"}
"""What Python tells its audit hooks of; `dlsym` stands for functions of the C library."""
KILLED = 9


def cut(work: Callable[[], object], place: int, within: Path) -> bool:
    """Do some work in a child process that ends before its change number `place`.

    Args:
        work: what the child does.
        place: from 0; counted are changes to files under `within`.
        within: a folder.

    Returns:
        Whether it was cut off; False once there are fewer changes.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _arm(place, str(within))
            work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), f"the child failed before change {place}"
    return code == KILLED


def _arm(place: int, within: str) -> None:
    left = place

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event not in CHANGES and not (event == "open" and _writes(arguments)):
            return
        if event != "ctypes.dlsym" and not str(arguments[0]).startswith(within):
            return
        if left == 0:
            os._exit(KILLED)
        left -= 1

    sys.addaudithook(hook)


def _writes(arguments: tuple[object, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
