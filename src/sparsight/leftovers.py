"""Temporary files that killed processes left: how to recognise and remove them."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

TEMPORARY = re.compile(r"\..+\.(?:(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-)?\w{8}\.tmp", re.ASCII)
_SECONDS_OF_STRANGERS = 86_400
"""Seconds after which a temporary file of another machine, whose processes are invisible, goes."""


def temporaries(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return what processes left in a folder for some files or folders, or may be writing now.

    Args:
        folder: where they were writing.
        names: names of the files or folders, or patterns.
    """
    patterns = (f".{name}{random}.tmp" for name in names for random in ("", ".*"))
    return sorted({path for pattern in patterns for path in Path(folder).glob(pattern)})


def remove_temporaries(folder: Path, names: Iterable[str] | None = None) -> None:
    """Remove every temporary file in a folder into which no other process can be writing now.

    Args:
        folder: where they lie.
        names: remove only those for these files and folders; see `temporaries`.
    """
    found = Path(folder).glob(".*.tmp") if names is None else temporaries(folder, names)
    for leftover in found:
        if not leftover.is_dir():
            leftover.unlink(missing_ok=True)
        elif names is not None:
            shutil.rmtree(leftover, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in a folder whose processes have ended."""
    with suppress(OSError), os.scandir(folder) as entries:
        over = [entry.path for entry in entries if _is_left_over(entry)]
        for path in over:
            with suppress(OSError):
                Path(path).unlink()


@cache
def machine() -> str:
    """Return what distinguishes machines, and containers with process numbers of their own."""
    try:
        numbers = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        numbers = ""
    return hashlib.sha256(f"{platform.node()} {numbers}".encode()).hexdigest()[:8]


def _is_left_over(entry: os.DirEntry[str]) -> bool:
    found = TEMPORARY.fullmatch(entry.name)
    if found is None or not entry.is_file(follow_symlinks=False):
        return False
    if found["machine"] == machine() and os.name != "nt":
        return not _is_running(int(found["process"]))
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > _SECONDS_OF_STRANGERS


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # tests, and sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, which may have ended as well
    except (OSError, OverflowError):
        return True
    with suppress(OSError, IndexError):
        # Killed, but its parent has not yet asked for its exit status.
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in ("Z", "X")
    return True
