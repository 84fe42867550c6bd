"""The files of a store: safetensors, hashed while they are written, memory-mapped to be read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparsight.errors import SparsightError
from sparsight.files import atomic_path, sha256_file
from sparsight.progress import logger

ACTIVATIONS = "activations"
"""The only key of a shard."""

AGAIN = "Remove the store and extract again."
_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.int64: "I64",
}
_PIECE = 1 << 20
_LONGEST_HEADER = 1 << 20
_HASHING_THREADS = min(4, os.cpu_count() or 1)
_TOLD_FROM = 4 << 30
"""Comparing more bytes than this with their checksums takes seconds, so it is announced."""

_CHECKED: set[tuple[str, str, int, int, int, int]] = set()
"""Files that this process has compared with their checksums, in the state they were in then."""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], cancelled: threading.Event | None = None
) -> str:
    """Write a safetensors file, whole or not at all, without a second copy in memory.

    Args:
        path: the file.
        tensors: the tensors by key.
        cancelled: once it is set, the file is abandoned.

    Returns:
        The file's SHA-256, in hex.

    Raises:
        SparsightError: writing failed, e.g. because the disk is full, or was abandoned.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of 8
    digest = hashlib.sha256()
    parts = [memoryview(len(text).to_bytes(8, "little") + text), *map(_bytes, tensors.values())]
    with atomic_path(path) as temporary, temporary.open("wb", buffering=0) as file:
        for part in parts:
            for at in range(0, len(part), _PIECE):
                if cancelled is not None and cancelled.is_set():
                    raise SparsightError(
                        f"{path}: writing was cancelled before the file was complete."
                    )
                piece = part[at : at + _PIECE]
                digest.update(piece)
                while piece:  # an unbuffered file may accept only a part of it
                    piece = piece[file.write(piece) or 0 :]
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a small safetensors file into memory.

    Raises:
        SparsightError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SparsightError(f"{path}: is missing or damaged ({error}).") from error


def check_size(path: Path, n_bytes: int, again: str = AGAIN) -> None:
    """Check that a file has the size with which it was written.

    Args:
        path: the file.
        n_bytes: number of bytes that were written.
        again: what to do if the file has another size, as a sentence.

    Raises:
        SparsightError: the file is missing, or has another size.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise SparsightError(f"{path}: is missing ({error.strerror}).") from error
    if size != n_bytes:
        raise SparsightError(
            f"{path}: has {size:,} bytes, {n_bytes:,} were written: it is cut off or altered. "
            f"{again}"
        )


def check_sums(
    expected: Iterable[tuple[Path, str]],
    again: str = AGAIN,
    cancelled: threading.Event | None = None,
) -> None:
    """Compare files with their checksums: each once per process, unless it changes.

    Args:
        expected: the files, with the SHA-256 of each, in hex.
        again: what to do if one is damaged, as a sentence.
        cancelled: once it is set, the remaining files are skipped.

    Raises:
        SparsightError: a file is missing or altered; the message names it.
    """
    left = [(path, sha256) for path, sha256 in expected if _key(path, sha256) not in _CHECKED]
    if not left:
        return
    n_bytes = sum(path.stat().st_size for path, _ in left if path.exists())
    if n_bytes >= _TOLD_FROM:
        logger().info(
            f"{left[0][0].parent}: {n_bytes / 1e9:,.0f} GB are compared with their checksums, once."
        )

    def check(entry: tuple[Path, str]) -> None:
        if cancelled is None or not cancelled.is_set():
            check_sum(*entry, again)

    if len(left) == 1:
        check(left[0])
        return
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        list(threads.map(check, left))


def check_sum(path: Path, sha256: str, again: str = AGAIN) -> None:
    """Compare a file with its checksum, even if that was done before.

    Raises:
        SparsightError: the file is missing or altered.
    """
    key = _key(path, sha256)
    try:
        actual = sha256_file(path)
    except OSError as error:
        raise SparsightError(f"{path}: is missing or cannot be read ({error.strerror}).") from error
    if actual != sha256:
        raise SparsightError(
            f"{path}: is missing or damaged: it has been altered (its checksum differs). {again}"
        )
    if key is not None:
        _CHECKED.add(key)


def _key(path: Path, sha256: str) -> tuple[str, str, int, int, int, int] | None:
    """Return the key of a file that was compared, which changes whenever the file is written to."""
    try:
        status = path.stat()
    except OSError:
        return None
    times = status.st_mtime_ns, status.st_ctime_ns
    return (os.fspath(path.absolute()), sha256, status.st_ino, status.st_size, *times)


def map_shard(
    path: Path, shape: Sequence[int], dtype: torch.dtype, n_bytes: int
) -> Float[Tensor, "images tokens d_in"]:
    """Memory-map a shard of activations; see `map_tensors`."""
    return map_tensors(path, {ACTIVATIONS: (tuple(shape), dtype)}, n_bytes)[ACTIVATIONS]


def map_tensors(
    path: Path,
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    n_bytes: int,
    again: str = AGAIN,
) -> dict[str, Tensor]:
    """Memory-map a safetensors file; its data are read only when they are accessed.

    Args:
        path: the file.
        layout: shape and dtype of each tensor, in the order in which they were written; dtypes with
            more bytes come before those with fewer.
        n_bytes: size of the file.
        again: what to do if the file is damaged, as a sentence.

    Raises:
        SparsightError: the file is missing or cut off, or its header is not the one written.
    """
    check_size(path, n_bytes, again)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _LONGEST_HEADER)))
        header.pop("__metadata__", None)
        actual = {
            name: (entry["dtype"], entry["shape"], entry["data_offsets"])
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SparsightError(f"{path}: its header is damaged ({error}).") from error
    expected, end = {}, 0
    for name, (shape, dtype) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        expected[name] = (_NAMES[dtype], list(shape), [start, end])
    if actual != expected or 8 + length + end != n_bytes:
        raise SparsightError(
            f"{path}: its header says {actual}, expected {expected}: it has been altered. {again}"
        )
    whole = torch.from_file(str(path), shared=False, size=n_bytes, dtype=torch.uint8)
    data = whole[8 + length :]
    return {
        name: data[slice(*expected[name][2])].view(dtype).view(*shape)
        if math.prod(shape)
        else torch.zeros(*shape, dtype=dtype)
        for name, (shape, dtype) in layout.items()
    }


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")
