"""Writing files so that no cut, at any byte, leaves half a file under its final name."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError, UserError
from sparsight.redaction import without_folders as without_folders
from sparsight.text import LONE_SURROGATE, without_surrogates

_TEMPORARY = re.compile(
    r"\..+\.(?:(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-)?\w{8}\.tmp", re.ASCII
)
_SECONDS_OF_STRANGERS = 86_400
"""Age from which a temporary file of another machine, whose processes we cannot see, is left."""
_STAGED, _COMMITTED, _GONE = ".new.tmp", ".new", ".gone"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it to disk and rename it.

    On an exception the temporary file is removed and `path` is untouched. What killed processes
    left in the folder is removed, too.

    Raises:
        UserError: the path is not UTF-8, which the libraries that write cannot take; or is that of
            a folder or device.
        SparsightError: the disk is full or the folder cannot be written.
    """
    path = _checked_name(path)
    if path.exists() and not path.is_file():  # renaming would put a file in a device's place
        raise _no_file(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        prefix = f".{path.name}.{_machine()}-{os.getpid()}-"
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        _finish(temporary)
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise _unwritten(path, _of_system(error)) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on success flush its files to disk and rename it.

    On an exception the temporary folder is removed and `path` is untouched. A process that was
    killed right after the renaming is made up for: its folder counts as not there.

    Raises:
        UserError: `path` is there already, and no empty folder; or another process is writing it.
        SparsightError: the disk is full or the folder cannot be written.
    """
    with _new(_checked_name(path)) as partial:
        yield partial


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a path of the same name in a temporary folder; on success the file is moved to `path`.

    Otherwise as `new_folder`.

    Raises:
        UserError: `path` is there already, or another process is writing it.
        SparsightError: the disk is full or the folder cannot be written.
    """
    path = _checked_name(path)
    with _new(path, path.name) as partial:
        yield partial / path.name


@contextmanager
def replaced(path: Path, own: Collection[str], *, wait: float = 60.0) -> Iterator[Path]:
    """Give an empty folder, whose files take the place of those in the folder `path` together.

    Killed at any point, all files of `path` are the old ones or all are the new ones for whoever
    calls `settled(path)` before reading. A folder that holds nothing else is exchanged as a whole,
    so that no one ever sees a mixture.

    Args:
        path: the folder; need not be there.
        own: names of all files that may be written. Those in `path` that are not written this time
            go; files of other names stay.
        wait: seconds to wait for another process that writes into the same folder.

    Raises:
        UserError: another process is still writing into the folder.
        SparsightError: the disk is full or the folder cannot be written.
    """
    path = _checked_name(path).resolve()  # a link stays a link
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, where a folder is to be written.")
    with folder_lock(path, wait=wait):
        whole = _may_be_exchanged(path, own)
        staged = _beside(path, "tmp") if whole else path / _STAGED
        with _partial(path, staged):
            yield staged
            _finish(staged)
            if whole:
                _put(staged, path)
            else:
                _commit(staged, path, own)


def settled(path: Path) -> Path:
    """Finish what a killed `replaced(path, …)` had begun to put in place.

    Returns:
        The path.

    Raises:
        SparsightError: that is not possible, as the folder may not be written to.
    """
    path = Path(path)
    if _is_in_order(path):
        return path
    # A process that is at it now holds the lock, and is done when we have it.
    with folder_lock(path):
        return path


@contextmanager
def folder_lock(path: Path, *, wait: float = 60.0) -> Iterator[None]:
    """Keep other processes from replacing a folder; what a killed one left half done is done.

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
def lock(path: Path, message: str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock that ends with the process, whatever ends it, and that workers do not share.

    Args:
        path: of the lock's file, which is there while the lock is held; its folder is made.
        message: what to tell if another process holds it.
        wait: seconds to wait for that process.

    Raises:
        UserError: another process holds it; or the path is not UTF-8.
        SparsightError: the folder cannot be made or written.
    """
    with _held(_checked_name(path), message, wait):
        yield


def check_folder(path: Path) -> Path:
    """Make sure, before work begins, that a folder is there to write to or can be made.

    Returns:
        The path.

    Raises:
        UserError: it or a folder above it is a file, or may not be written to; or its name is not
            UTF-8.
    """
    path = _checked_name(path)
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise UserError(f"{path}: cannot create the folder: {there} is a file.")
    if not os.access(there, os.W_OK):
        raise UserError(f"{path}: cannot create the folder: {there} may not be written to.")
    return path


def check_file(path: Path) -> Path:
    """Make sure, before work begins, that a file can be written.

    Returns:
        The path.

    Raises:
        UserError: it is a folder or device; or its folder cannot be made or written, see
            `check_folder`.
    """
    check_folder(path.parent)
    if path.exists() and not path.is_file():
        raise _no_file(path)
    return _checked_name(path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all; see `without_surrogates`."""
    write_bytes(path, without_surrogates(text).encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, whole or not at all."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON with a final newline; a lone surrogate as JSON escapes it."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return (LONE_SURROGATE.sub(lambda one: f"\\u{ord(one[0]):04x}", text) + "\n").encode()


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


def check_replaceable(path: Path, format: str, what: str) -> None:
    """Make sure that a JSON file that says what its folder holds may be replaced.

    Args:
        path: the file; need not be there, and may be damaged.
        format: what its field `format` says where the folder holds what is to be written.
        what: that in words, for the message.

    Raises:
        UserError: the folder holds something else.
    """
    if not path.is_file():
        return
    try:
        found = read_json(path).get("format")
    except UserError:
        return
    if found != format:
        raise UserError(
            f"{path}: belongs to something else than {what}, which would be lost. Choose another "
            "folder."
        )


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


def temporaries(folder: Path, names: Iterable[str]) -> list[Path]:
    """What killed processes left in a folder of some files or folders, or may be writing now.

    Args:
        folder: where they were to write.
        names: of the files or folders, or patterns of names.
    """
    patterns = (f".{name}{random}.tmp" for name in names for random in ("", ".*"))
    return sorted({path for pattern in patterns for path in Path(folder).glob(pattern)})


def remove_temporaries(folder: Path, names: Iterable[str] | None = None) -> None:
    """Remove every temporary file in a folder that no other process may be writing into now.

    Args:
        folder: where they lie.
        names: remove those of these files and folders alone, see `temporaries`.
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


def _is_left_over(entry: os.DirEntry[str]) -> bool:
    found = _TEMPORARY.fullmatch(entry.name)
    if found is None or not entry.is_file(follow_symlinks=False):
        return False
    if found["machine"] == _machine() and os.name != "nt":
        return not _is_running(int(found["process"]))
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > _SECONDS_OF_STRANGERS


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # tests, and sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, which may be over as well
    except (OSError, OverflowError):
        return True
    with suppress(OSError, IndexError):
        # Killed, and its parent has not asked for its end yet.
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in ("Z", "X")
    return True


@cache
def _machine() -> str:
    """What tells apart machines, and containers on one, whose numbers of processes differ."""
    try:
        numbers = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        numbers = ""
    return hashlib.sha256(f"{platform.node()} {numbers}".encode()).hexdigest()[:8]


@contextmanager
def _new(path: Path, file: str | None = None) -> Iterator[Path]:
    """Stage what is to be at `path`: the folder itself, or a file in it."""
    held = _beside(path, "lock")
    # Without a lock's file nobody was killed, and nothing need be touched.
    if _is_taken(path) and not held.exists():
        raise _taken(path)
    with _held(held, _busy(path)) as handle:
        _put_in_order(path)
        if _is_taken(path) and _mark_of(path) != _read_mark(held, handle):
            raise _taken(path)
        staged = _beside(path, "tmp")
        with _partial(path, staged):
            yield staged
            _finish(staged)
            made = staged if file is None else staged / file
            # So that the next run knows what is there for this one's work.
            _write_mark(held, handle, _mark_of(made))
            _put(made, path)


def _is_taken(path: Path) -> bool:
    """Whether something is at `path` that is not an empty folder."""
    return os.path.lexists(path) and (not path.is_dir() or any(path.iterdir()))


def _taken(path: Path) -> UserError:
    if path.is_dir():
        return UserError(f"{path}: is there already, and is not empty. Choose another folder.")
    return UserError(f"{path}: is there already. Choose another name.")


@contextmanager
def _partial(path: Path, staged: Path) -> Iterator[None]:
    """Make the folder `staged`, and remove it whatever happens; tell what fails of `path`."""
    try:
        _remove(_beside(path, "old.tmp"))  # what a killed process left
        _remove(staged)
        staged.mkdir(parents=True)
        yield
    except (OSError, RuntimeError) as error:
        told = _of_system(error)
        if _is_elsewhere(told, path, staged):  # what was read, not what was written
            raise
        raise _unwritten(path, told) from error
    except SparsightError as error:
        # Where a file was to lie, not where it was on its way.
        error.args = tuple(str(each).replace(str(staged), str(path)) for each in error.args)
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _is_elsewhere(error: OSError, *places: Path) -> bool:
    """Whether an error is about a file that is none of these, nor in them, nor above them."""
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
    """Whether a folder holds nothing else, and its name can be given to another."""
    if not path.exists():
        return True
    if not _has_neighbours(path) or path in (here := Path.cwd(), *here.parents):
        return False
    return all(
        each.name in {*own, _STAGED, _COMMITTED} or _TEMPORARY.fullmatch(each.name)
        for each in path.iterdir()
    )


def _has_neighbours(path: Path) -> bool:
    """Whether files can be made beside a folder and be given its name."""
    return not path.exists() or (os.access(path.parent, os.W_OK) and not path.is_mount())


def _lock_of(path: Path) -> Path:
    path = path.resolve()
    return _beside(path, "lock") if _has_neighbours(path) else path / f"{_COMMITTED}.lock"


def _busy(path: Path) -> str:
    return f"{path}: another process is writing it. Wait for that, or choose another place."


def _put(made: Path, path: Path) -> None:
    """Give `made` the name `path`; a folder that was there is then at `made`."""
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
    _sync_folder(path.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    try:
        rename: Any = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _commit(staged: Path, path: Path, own: Collection[str]) -> None:
    """From the renaming on the new files count; then they are moved to where the old ones are."""
    written = _files_in(staged)
    gone = sorted(set(own) - set(written))
    if not written and not gone:
        return
    (staged / _GONE).write_text(json.dumps(gone), encoding="utf-8")
    _finish(staged / _GONE)
    staged.rename(path / _COMMITTED)
    _sync_folder(path)
    _settle(path / _COMMITTED, path)


def _files_in(folder: Path) -> list[str]:
    """Files in a folder and in those inside it, by their place in it, in order."""
    files = (each for each in folder.rglob("*") if not each.is_dir())
    return sorted(each.relative_to(folder).as_posix() for each in files)


def _is_in_order(path: Path) -> bool:
    if (path / _COMMITTED).is_dir():
        return False
    return path.exists() or not _beside(path, "old.tmp").exists()


def _put_in_order(path: Path) -> None:
    """Go on where a process was killed while it put new files in place; the lock is held."""
    aside = _beside(path, "old.tmp")
    if aside.exists() and not path.exists():
        # Where folders cannot be exchanged in one step, nothing is there for a moment.
        aside.rename(path)
    if (path / _COMMITTED).is_dir():
        _settle(path / _COMMITTED, path)


def _settle(committed: Path, path: Path) -> None:
    """Move the files of a commit to their place."""
    gone = committed / _GONE
    if gone.exists():
        for name in json.loads(gone.read_text(encoding="utf-8")):
            (path / name).unlink(missing_ok=True)
    for name in _files_in(committed):
        if name != _GONE:
            (path / name).parent.mkdir(exist_ok=True)
            (committed / name).replace(path / name)
    shutil.rmtree(committed)
    _sync_folder(path)


def _mark_of(path: Path) -> str:
    about = path.lstat()
    return f"{about.st_dev} {about.st_ino} {about.st_mtime_ns}"


def _read_mark(path: Path, handle: int | None) -> str:
    # Closing another handle of the file would give up the lock.
    return path.read_text() if handle is None else os.pread(handle, 200, 0).decode()


def _write_mark(path: Path, handle: int | None, mark: str) -> None:
    if handle is None:
        path.write_text(mark)
        return
    os.ftruncate(handle, 0)
    os.pwrite(handle, mark.encode(), 0)
    os.fsync(handle)


def _beside(path: Path, kind: str) -> Path:
    """The hidden neighbour of a path that serves to write it."""
    path = path.absolute()
    return path.with_name(f".{path.name}.{kind}")


def _of_system(error: OSError | RuntimeError) -> OSError:
    """What the system said; of a full disk, torch says that it is at an unexpected position."""
    if isinstance(error, OSError):
        return error
    if isinstance(error.__context__, OSError):
        return error.__context__
    raise error


def _unwritten(path: Path, error: OSError) -> SparsightError:
    return SparsightError(f"{path}: could not be written ({error.strerror or error}).")


def _finish(path: Path) -> None:
    """Make a file, or all in a folder, as open as the umask allows, and bring it to the disk."""
    umask = _umask()
    if not path.is_dir():
        return _finish_file(path, umask)
    for place, _, names in os.walk(path, topdown=False):
        for name in names:
            _finish_file(Path(place, name), umask)
        folder = Path(place)
        # Bits beyond the nine (setgid) come from the folder above.
        folder.chmod(folder.stat().st_mode & 0o7000 | 0o777 & ~umask)
        _sync_folder(folder)


def _finish_file(path: Path, umask: int) -> None:
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        return
    if about.st_nlink == 1:  # else it is also someone else's
        # Some writers give their files to the owner alone.
        path.chmod(0o666 & ~umask)
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _held(path: Path, message: str, wait: float = 0.0) -> Iterator[int | None]:
    """Hold a lock and give its file's handle; None where there are no locks."""
    handle = _locked(path, message, time.monotonic() + wait)
    try:
        yield handle
    finally:
        # While it is held: whoever opened this file finds, once locked, that it is not `path`.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _no_file(path: Path) -> UserError:
    what = "folder" if path.is_dir() else "device or pipe"
    return UserError(f"{path}: is a {what}, where a file is to be written.")


def _checked_name(path: Path) -> Path:
    """The path, if the libraries that write (Arrow, safetensors) can take its name.

    Raises:
        UserError: it is not UTF-8.
    """
    name = str(path)
    if name != without_surrogates(name):
        raise UserError(
            f"{without_surrogates(name)}: the name is not UTF-8, so nothing can be written there. "
            "Choose another."
        )
    return Path(path)


def _locked(path: Path, message: str, deadline: float) -> int | None:
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
    """Whether an open file is the one that `path` names now."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK_AT_START = _read_umask()
"""Read once: reading sets it for a moment, also for the files of other threads."""


def _umask() -> int:
    """The umask now where the system tells it, else as it was at the start."""
    with suppress(OSError, ValueError), Path("/proc/self/status").open() as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return _UMASK_AT_START


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
