"""Reading untrusted files: no code is run, and no stated size is believed.

`read_torch` (zip archives and the format before them), `read_gzipped_pickle`, `read_config` (JSON,
YAML); `sparsight.tensor_files` reads safetensors. Whatever is wrong with a file is raised as a
`SparsightError` that names it.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from sparsight.pickles import (
    PickleError,
    Reader,
    Storage,
    budget_of,
    fill,
    read_legacy,
    storage_dtype,
)
from sparsight.tensor_files import damaged

LONGEST_CONFIG = 16 * 2**20
"""Longest configuration that is read, ours or another project's, in bytes."""

LONGEST_YAML = 2**18
"""Longest YAML file that is read, in bytes: reading YAML is a thousand times slower than JSON."""

LARGEST_UNZIPPED = 8 * 2**30
"""Largest size, in bytes, to which a gzipped pickle may unfold."""


def begins_with_json(path: Path) -> bool:
    """Return whether a file begins like a JSON object; no file of `torch.save` or gzip does.

    Raises:
        SparsightError: the file does not exist.
    """
    try:
        with path.open("rb") as file:
            return file.read(1) == b"{"
    except OSError as error:
        raise damaged(path, error) from error


def read_torch(path: Path) -> Any:
    """Read what `torch.save` wrote, as plain data: tensors, containers, numbers and text.

    An object of any other class becomes a dictionary of its state, with the name of the class under
    `"__class__"`; see `sparsight.pickles`.

    Raises:
        SparsightError: the file is missing, damaged, cut off, or not written by `torch.save`.
    """
    try:
        with path.open("rb") as file:
            return read_torch_stream(file, path.stat().st_size, path)
    except OSError as error:
        raise damaged(path, error) from error


def read_torch_stream(file: io.BufferedIOBase, size: int, path: Path) -> Any:
    """Read what `torch.save` wrote from an open file's position on; see `read_torch`.

    Args:
        file: seekable; everything before its position is ignored.
        size: number of bytes from there to the end.
        path: the file, for messages.

    Raises:
        SparsightError: it is damaged or cut off, or `torch.save` did not write it.
    """
    start = file.tell()
    zipped = file.read(4) == b"PK\x03\x04"
    file.seek(start)
    try:
        if zipped:
            return _read_zip(file, size)
        return read_legacy(_Clamped(file, size), size)
    except Exception as error:
        # zipfile and torch raise many kinds of errors on malformed archives.
        raise damaged(path, error) from error


def read_gzipped_pickle(path: Path, limit: int = LARGEST_UNZIPPED) -> Any:
    """Read a gzipped pickle, as plain data.

    Args:
        path: the file.
        limit: largest size, in bytes, to which it may unfold.

    Raises:
        SparsightError: it is missing, damaged, cut off, or unfolds to more than the limit.
    """
    content = bytearray()
    try:
        with gzip.open(path, "rb") as file:
            while block := file.read(2**24):
                content += block
                if len(content) > limit:
                    raise damaged(path, f"it unfolds to more than {limit:,} bytes")
        budget = budget_of(len(content))
        return Reader(budget=budget).load(io.BytesIO(content))
    except (PickleError, zlib.error, EOFError, OSError, MemoryError) as error:
        raise damaged(path, error) from error


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file that holds an object.

    Raises:
        SparsightError: the file is missing, too long, cut off, or holds something else.
    """
    try:
        size = path.stat().st_size
        yaml = path.suffix in (".yaml", ".yml")
        if size > (LONGEST_YAML if yaml else LONGEST_CONFIG):
            raise damaged(path, f"a configuration of {size:,} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, error) from error
    config = parse_yaml(text, path) if yaml else parse_json(text, path)
    if not isinstance(config, dict):
        raise damaged(path, f"it holds a {type(config).__name__}, not an object")
    return config


def parse_json(text: str, path: Path) -> Any:
    """Parse a JSON value.

    Raises:
        SparsightError: the text is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def parse_yaml(text: str, path: Path) -> Any:
    """Parse a YAML value of plain data; aliases, which can unfold without end, are refused.

    Raises:
        SparsightError: the text is not YAML of that kind.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise damaged(path, "YAML with aliases is not supported")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def _read_zip(file: io.BufferedIOBase, size: int) -> Any:
    # torch stores without compressing, so the parts are no larger than the whole; a zip bomb's are.
    part = _Part(file, size)
    with zipfile.ZipFile(io.BufferedReader(part)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise PickleError("its entries are compressed, which torch.save does not do")
        total = sum(entry.file_size for entry in entries.values())
        if total > size:
            raise PickleError(f"its entries take {total:,} bytes, but the file has only {size:,}")
        roots = [name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise PickleError("it is not an archive of torch.save: it has no data.pkl")
        root = roots[0]
        if f"{root}constants.pkl" in entries:
            raise PickleError("it is a TorchScript program, not a checkpoint")
        order = f"{root}byteorder"
        if order in entries and archive.read(order).strip() != b"little":
            raise PickleError("it was written on a machine with another byte order")
        storages: dict[str, Storage] = {}

        def storage(identity: Any) -> Storage:
            if not isinstance(identity, tuple) or len(identity) != 5:
                raise PickleError("a storage has no name")
            _, kind, key, _, elements = identity
            if not isinstance(key, str):
                raise PickleError("a storage's name is not a text")
            if key not in storages:
                entry = entries.get(f"{root}data/{key}")
                dtype = storage_dtype(kind)
                if entry is None or entry.file_size != elements * dtype.itemsize:
                    raise PickleError(f"the storage {key!r} is missing or has another size")
                data = torch.zeros(elements, dtype=dtype)
                with archive.open(entry) as source:
                    fill(source, data)  # type: ignore[arg-type]
                    source.read(1)  # reaching the end makes zipfile compare the checksum
                storages[key] = Storage(data)
            return storages[key]

        program = archive.read(f"{root}data.pkl")
        budget = budget_of(len(program))
        return Reader(storage, budget).load(io.BytesIO(program))


class _Part(io.RawIOBase):
    """The rest of a file from its position on, as a file of its own."""

    def __init__(self, file: io.BufferedIOBase, size: int) -> None:
        self.file, self.start, self.size, self.place = file, file.tell(), size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError("a position before the beginning")
        self.place = base + offset
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, into: Any) -> int:
        count = max(0, min(len(into), self.size - self.place))
        self.file.seek(self.start + self.place)
        data = self.file.read(count)
        into[: len(data)] = data
        self.place += len(data)
        return len(data)


class _Clamped(io.BufferedReader):
    """A file that is never asked for more than it has, whatever lengths a pickle states."""

    def __init__(self, file: io.BufferedIOBase, size: int) -> None:
        super().__init__(_Part(file, size))
        self.length = size

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size > 2**16:
            size = min(self.length if size is None else size, self.length - self.tell())
        return super().read(size)
