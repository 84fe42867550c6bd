"""Folders that appear whole or are replaced whole, wherever the process is killed."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError, UserError
from sparsight.files import checked_name, finish, of_system, sync_folder, unwritten
from sparsight.leftovers import TEMPORARY
from sparsight.locks import holding, lock

_STAGED, _COMMITTED, _GONE = ".new.tmp", ".new", ".gone"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on success flush its files to disk and rename it.

    On an exception the temporary folder is removed and `path` is untouched. If a process was killed
    right after the renaming, its folder does not count as existing.

    Raises:
        UserError: `path` exists and is not an empty folder; or another process is writing it.
        SparsightError: the disk is full or the folder cannot be written.
    """
    with _new(checked_name(path)) as partial:
        yield partial


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a path of the same name in a temporary folder; on success, move the file to `path`.

    Everything else is as in `new_folder`.

    Raises:
        UserError: `path` exists, or another process is writing it.
        SparsightError: the disk is full or the folder cannot be written.
    """
    path = checked_name(path)
    with _new(path, path.name) as partial:
        yield partial / path.name


@contextmanager
def replaced(path: Path, own: Collection[str], *, wait: float = 60.0) -> Iterator[Path]:
    """Give an empty folder whose files replace those in the folder `path`, all together.

    Wherever the process is killed, the files of `path` are either all old or all new for a reader
    that calls `settled(path)` first. A folder that holds nothing else is exchanged as a whole, so
    that nobody ever sees a mixture.

    Args:
        path: the folder; it need not exist.
        own: names of all files that may be written. Those in `path` that are not written this time
            are removed; files with other names stay.
        wait: seconds to wait for another process that writes into the same folder.

    Raises:
        UserError: another process is still writing into the folder.
        SparsightError: the disk is full or the folder cannot be written.
    """
    path = checked_name(path).resolve()  # a link stays a link
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, where a folder is to be written.")
    with folder_lock(path, wait=wait):
        whole = _may_be_exchanged(path, own)
        staged = _beside(path, "tmp") if whole else path / _STAGED
        with _partial(path, staged):
            yield staged
            finish(staged)
            if whole:
                _put(staged, path)
            else:
                _commit(staged, path, own)


def settled(path: Path) -> Path:
    """Finish putting in place what a killed `replaced(path, …)` had begun.

    Returns:
        The path.

    Raises:
        SparsightError: that is impossible, because the folder may not be written to.
    """
    path = Path(path)
    if _is_in_order(path):
        return path
    # A process that is doing it now holds the lock, and is done once we have it.
    with folder_lock(path):
        return path


@contextmanager
def folder_lock(path: Path, *, wait: float = 60.0) -> Iterator[None]:
    """Keep other processes from replacing a folder; finish what a killed one left half done.

    Args:
        path: the folder.
        wait: seconds to wait for another process.

    Raises:
        UserError: another process is still writing into the folder.
        SparsightError: the folder cannot be written.
    """
    with lock(_lock_of(path), _busy(path), wait=wait):
        try:
            _put_in_order(path)
        except OSError as error:
            raise SparsightError(
                f"{path}: was left half replaced by a process that was killed, and cannot be put "
                f"in order ({error.strerror or error}). Open it once with the right to write there."
            ) from error
        yield


@contextmanager
def _new(path: Path, file: str | None = None) -> Iterator[Path]:
    """Stage what is to be at `path`: the folder itself, or a file in it."""
    held = _beside(path, "lock")
    # Without a lock file no process was killed, and nothing needs to be touched.
    if _is_taken(path) and not held.exists():
        raise _taken(path)
    with holding(held, _busy(path)) as handle:
        _put_in_order(path)
        if _is_taken(path) and _mark_of(path) != _read_mark(held, handle):
            raise _taken(path)
        staged = _beside(path, "tmp")
        with _partial(path, staged):
            yield staged
            finish(staged)
            made = staged if file is None else staged / file
            # So that the next run recognises what is there as this one's work.
            _write_mark(held, handle, _mark_of(made))
            _put(made, path)


def _is_taken(path: Path) -> bool:
    """Return whether there is anything at `path` but an empty folder."""
    return os.path.lexists(path) and (not path.is_dir() or any(path.iterdir()))


def _taken(path: Path) -> UserError:
    if path.is_dir():
        return UserError(f"{path}: is there already, and is not empty. Choose another folder.")
    return UserError(f"{path}: is there already. Choose another name.")


@contextmanager
def _partial(path: Path, staged: Path) -> Iterator[None]:
    """Make the folder `staged`, and remove it in any case; report errors as those of `path`."""
    try:
        _remove(_beside(path, "old.tmp"))  # what a killed process left
        _remove(staged)
        staged.mkdir(parents=True)
        yield
    except (OSError, RuntimeError) as error:
        told = of_system(error)
        if _is_elsewhere(told, path, staged):  # what was read, not what was written
            raise
        raise unwritten(path, told) from error
    except SparsightError as error:
        # Name the place where the file was to be, not where it was on its way.
        error.args = tuple(str(each).replace(str(staged), str(path)) for each in error.args)
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _is_elsewhere(error: OSError, *places: Path) -> bool:
    """Return whether an error's file is none of these, nor inside or above one of them."""
    if not isinstance(error.filename, str):
        return False
    at = Path(error.filename).absolute()
    return not any(
        at == place or at in place.parents or place in at.parents
        for place in (each.absolute() for each in places)
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _may_be_exchanged(path: Path, own: Collection[str]) -> bool:
    """Return whether a folder holds nothing else, and can swap its name with another."""
    if not path.exists():
        return True
    if not _has_neighbours(path) or path in (here := Path.cwd(), *here.parents):
        return False
    return all(
        each.name in {*own, _STAGED, _COMMITTED} or TEMPORARY.fullmatch(each.name)
        for each in path.iterdir()
    )


def _has_neighbours(path: Path) -> bool:
    """Return whether files can be created beside a folder and be given its name."""
    return not path.exists() or (os.access(path.parent, os.W_OK) and not path.is_mount())


def _lock_of(path: Path) -> Path:
    path = path.resolve()
    return _beside(path, "lock") if _has_neighbours(path) else path / f"{_COMMITTED}.lock"


def _busy(path: Path) -> str:
    return f"{path}: another process is writing it. Wait for that, or choose another place."


def _put(made: Path, path: Path) -> None:
    """Give `made` the name `path`; an existing folder is then at `made`."""
    if made.is_dir() and path.is_dir():
        if not any(path.iterdir()):
            path.rmdir()
            made.rename(path)
        elif not _exchanged(made, path):
            aside = _beside(path, "old.tmp")
            path.rename(aside)
            made.rename(path)
            shutil.rmtree(aside, ignore_errors=True)
    else:
        made.replace(path)
    sync_folder(path.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False if the system cannot do that."""
    try:
        rename: Any = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _commit(staged: Path, path: Path, own: Collection[str]) -> None:
    """Make the new files count by renaming them; then move them to where the old ones are."""
    written = _files_in(staged)
    gone = sorted(set(own) - set(written))
    if not written and not gone:
        return
    (staged / _GONE).write_text(json.dumps(gone), encoding="utf-8")
    finish(staged / _GONE)
    staged.rename(path / _COMMITTED)
    sync_folder(path)
    _settle(path / _COMMITTED, path)


def _files_in(folder: Path) -> list[str]:
    """Return the files in a folder and its sub-folders, as sorted relative paths."""
    files = (each for each in folder.rglob("*") if not each.is_dir())
    return sorted(each.relative_to(folder).as_posix() for each in files)


def _is_in_order(path: Path) -> bool:
    if (path / _COMMITTED).is_dir():
        return False
    return path.exists() or not _beside(path, "old.tmp").exists()


def _put_in_order(path: Path) -> None:
    """Continue where a process was killed while it put new files in place; the lock is held."""
    aside = _beside(path, "old.tmp")
    if aside.exists() and not path.exists():
        # If folders cannot be exchanged in one step, nothing is there for a moment.
        aside.rename(path)
    if (path / _COMMITTED).is_dir():
        _settle(path / _COMMITTED, path)


def _settle(committed: Path, path: Path) -> None:
    """Move the files of a commit to their places."""
    gone = committed / _GONE
    if gone.exists():
        for name in json.loads(gone.read_text(encoding="utf-8")):
            (path / name).unlink(missing_ok=True)
    for name in _files_in(committed):
        if name != _GONE:
            (path / name).parent.mkdir(exist_ok=True)
            (committed / name).replace(path / name)
    shutil.rmtree(committed)
    sync_folder(path)


def _mark_of(path: Path) -> str:
    about = path.lstat()
    return f"{about.st_dev} {about.st_ino} {about.st_mtime_ns}"


def _read_mark(path: Path, handle: int | None) -> str:
    # Closing another handle of the file would release the lock.
    return path.read_text() if handle is None else os.pread(handle, 200, 0).decode()


def _write_mark(path: Path, handle: int | None, mark: str) -> None:
    if handle is None:
        path.write_text(mark)
        return
    os.ftruncate(handle, 0)
    os.pwrite(handle, mark.encode(), 0)
    os.fsync(handle)


def _beside(path: Path, kind: str) -> Path:
    """Return the hidden neighbour of a path that is used to write it."""
    path = path.absolute()
    return path.with_name(f".{path.name}.{kind}")
