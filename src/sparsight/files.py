"""Writing files so that no cut, at any byte, leaves half a file under its final name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError, UserError

_SLASH, _NAME = r"[\\/]+", r"""[^\\/"'\n]+"""
_TABLE = re.compile(r"""[\\/]*\?table=[^"'\n\[\]]*""")
_ABSOLUTE_PATH = re.compile(
    rf"(?<![^\s\"':(\[=,<`])(?:[A-Za-z]:)?{_SLASH}(?:{_NAME}{_SLASH})+({_NAME})"
)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it to disk and rename it.

    On an exception the temporary file is removed and `path` is untouched.

    Raises:
        SparsightError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_UMASK)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise SparsightError(
            f"{path}: could not be written ({error.strerror or error})."
        ) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on success flush its files to disk and rename it.

    On an exception the temporary folder is removed and `path` is untouched.

    Raises:
        UserError: `path` is there already, and no empty folder.
        SparsightError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: is there already and not empty. Choose another folder.")
    partial = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                # Some writers give their files to the owner alone.
                file.chmod(0o666 & ~_UMASK)
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        if path.exists():
            path.rmdir()
        partial.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise SparsightError(
            f"{path}: could not be written ({error.strerror or error})."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def lock(path: Path, message: str) -> Iterator[None]:
    """Hold a lock that ends with the process, whatever ends it, and that workers do not share.

    Args:
        path: of the lock's file, which is there while the lock is held; its folder is made.
        message: what to tell if another process holds it.

    Raises:
        UserError: another process holds it.
        SparsightError: the folder cannot be made or written.
    """
    handle = _locked(Path(path), message)
    try:
        yield
    finally:
        # While it is held: whoever opened this file finds, once locked, that it is not `path`.
        with suppress(OSError):
            Path(path).unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def check_folder(path: Path) -> Path:
    """Make sure, before work begins, that a folder is there to write to or can be made.

    Returns:
        The path.

    Raises:
        UserError: it or a folder above it is a file, or may not be written to.
    """
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise UserError(f"{path}: no folder can be made here, for {there} is a file.")
    if not os.access(there, os.W_OK):
        raise UserError(f"{path}: no folder can be made here, for {there} may not be written to.")
    return path


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}, expected an object.")
    return value


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a mapping, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checksum_of(values: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a mapping, the same before it is written as JSON and after it is read."""
    return sha256_json(json.loads(json.dumps(values)))


def without_folders(text: str) -> str:
    """Absolute paths by their last part alone: pages are mailed, and paths name people.

    Of images, the file with their labels is left out, too.
    """
    return _ABSOLUTE_PATH.sub(r"\1", _TABLE.sub("", text))


def temporaries(folder: Path, names: Iterable[str] = ("*",)) -> list[Path]:
    """What a killed `atomic_path` or `new_folder` left in a folder.

    Args:
        folder: where they were to write.
        names: of the files or folders; name them where others may be writing, too.
    """
    patterns = (f".{name}{random}.tmp" for name in names for random in ("", ".*"))
    return sorted({path for pattern in patterns for path in Path(folder).glob(pattern)})


def remove_temporaries(folder: Path, names: Iterable[str] = ("*",)) -> None:
    """Remove the `temporaries`."""
    for leftover in temporaries(folder, names):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _locked(path: Path, message: str) -> int | None:
    """The handle of the locked file; None where there are no locks."""
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
            # Between opening and locking, the one who held it may have removed the file.
            held = _is_at(handle, path)
            if held:
                return handle
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
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
    """Whether an open file is the one that `path` names now."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _read_umask()
"""Read once: reading sets it for a moment, also for the files of other threads."""


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; not every platform lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
