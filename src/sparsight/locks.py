"""Locks that end with the process that holds them, whatever ends it."""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsight.errors import SparsightError, UserError
from sparsight.files import checked_name


@contextmanager
def lock(path: Path, message: str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock that ends with the process, whatever ends it, and that workers do not share.

    Args:
        path: the lock's file, which exists while the lock is held; its folder is created.
        message: the message if another process holds it.
        wait: seconds to wait for that process.

    Raises:
        UserError: another process holds it; or the path is not UTF-8.
        SparsightError: the folder cannot be created or written.
    """
    with holding(checked_name(path), message, wait):
        yield


@contextmanager
def holding(path: Path, message: str, wait: float = 0.0) -> Iterator[int | None]:
    """Hold a lock and give the handle of its file; None if the system has no locks."""
    handle = _locked(path, message, time.monotonic() + wait)
    try:
        yield handle
    finally:
        # Still locked: a process that opened this file finds, with the lock, that it is gone.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _locked(path: Path, message: str, deadline: float) -> int | None:
    """Return the handle of the locked file; None if the system has no locks."""
    try:
        import fcntl
    except ImportError:  # on Windows
        return None
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise SparsightError(
                f"{path.parent}: cannot be made or written ({error.strerror or error})."
            ) from error
        held = False
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, the previous holder may have removed the file.
            held = _is_at(handle, path)
            if held:
                return handle
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                raise UserError(message) from error
            warnings.warn(
                f"{path.parent}: this file system has no locks ({error.strerror}). Make sure that "
                "no other process writes into the folder.",
                stacklevel=4,
            )
            return None
        finally:
            if not held:
                os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Return whether an open file is the one that `path` names now."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
