"""Writing files so that no interruption, at any byte, leaves half a file under its final name."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError, UserError
from sparsight.leftovers import machine, remove_leftovers
from sparsight.text import LONE_SURROGATE, without_surrogates


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it to disk and rename it.

    On an exception the temporary file is removed and `path` is untouched. Files that killed
    processes left in the folder are removed, too.

    Raises:
        UserError: the path is not UTF-8, which the libraries that write cannot handle; or it is a
            folder or a device.
        SparsightError: the disk is full or the folder cannot be written.
    """
    path = checked_name(path)
    if path.exists() and not path.is_file():  # renaming would replace a device
        raise _no_file(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        prefix = f".{path.name}.{machine()}-{os.getpid()}-"
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        finish(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise unwritten(path, of_system(error)) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def check_folder(path: Path) -> Path:
    """Check, before work begins, that a folder can be written to or created.

    Returns:
        The path.

    Raises:
        UserError: it or a folder above it is a file, or may not be written to; or its name is not
            UTF-8.
    """
    path = checked_name(path)
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise UserError(f"{path}: cannot create the folder: {there} is a file.")
    if not os.access(there, os.W_OK):
        raise UserError(f"{path}: cannot create the folder: {there} may not be written to.")
    return path


def check_file(path: Path) -> Path:
    """Check, before work begins, that a file can be written.

    Returns:
        The path.

    Raises:
        UserError: it is a folder or a device; or its folder cannot be created or written, see
            `check_folder`.
    """
    check_folder(path.parent)
    if path.exists() and not path.is_file():
        raise _no_file(path)
    return checked_name(path)


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
    """Return `value` as indented JSON with a final newline; lone surrogates are escaped."""
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
    """Check that a JSON file that describes its folder may be replaced.

    Args:
        path: the file; it need not exist, and may be damaged.
        format: the value of its field `format` if the folder holds what is to be written.
        what: the same in words, for the message.

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
            f"{path}: belongs to something other than {what}, which would be lost. Choose another "
            "folder."
        )


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Mapping[str, Any]) -> str:
    """Return the hex SHA-256 of a mapping, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checksum_of(values: Mapping[str, Any]) -> str:
    """Return the hex SHA-256 of a mapping, the same before writing it as JSON and after reading."""
    return sha256_json(json.loads(json.dumps(values)))


def of_system(error: OSError | RuntimeError) -> OSError:
    """Return the system's own error; for a full disk, torch reports an unexpected position."""
    if isinstance(error, OSError):
        return error
    if isinstance(error.__context__, OSError):
        return error.__context__
    raise error


def unwritten(path: Path, error: OSError) -> SparsightError:
    """Return the error for a path that could not be written."""
    return SparsightError(f"{path}: could not be written ({error.strerror or error}).")


def finish(path: Path) -> None:
    """Make a file, or all files in a folder, as open as the umask allows, and flush it to disk."""
    umask = _umask()
    if not path.is_dir():
        return _finish_file(path, umask)
    for place, _, names in os.walk(path, topdown=False):
        for name in names:
            _finish_file(Path(place, name), umask)
        folder = Path(place)
        # Bits beyond the nine (setgid) are inherited from the folder above.
        folder.chmod(folder.stat().st_mode & 0o7000 | 0o777 & ~umask)
        sync_folder(folder)


def _finish_file(path: Path, umask: int) -> None:
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        return
    if about.st_nlink == 1:  # otherwise somebody else uses it, too
        # Some writers make their files readable only by the owner.
        path.chmod(0o666 & ~umask)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _no_file(path: Path) -> UserError:
    what = "folder" if path.is_dir() else "device or pipe"
    return UserError(f"{path}: is a {what}, where a file is to be written.")


def checked_name(path: Path) -> Path:
    """Return the path, if the libraries that write (Arrow, safetensors) can handle its name.

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


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK_AT_START = _read_umask()
"""Read once: reading changes it for a moment, also for the files of other threads."""


def _umask() -> int:
    """Return the umask now if the system reveals it, otherwise as it was at the start."""
    with suppress(OSError, ValueError), Path("/proc/self/status").open() as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return _UMASK_AT_START


def sync_folder(folder: Path) -> None:
    """Make a rename durable; not every platform can open a folder for that."""
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
