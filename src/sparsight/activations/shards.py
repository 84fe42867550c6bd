"""The files of a store: safetensors, hashed while they are written and mapped to be read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparsight.errors import SparsightError
from sparsight.files import atomic_path

ACTIVATIONS = "activations"
"""The one key of a shard."""

_AGAIN = "Remove the store and extract again."
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, whole or not at all, without a second copy in memory.

    Returns:
        The file's SHA-256, in hex.

    Raises:
        SparsightError: it could not be written, e.g. because the disk is full.
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
    text += b" " * (-len(text) % 8)  # so that data begin at a multiple of 8
    digest = hashlib.sha256()
    parts = [memoryview(len(text).to_bytes(8, "little") + text), *map(_bytes, tensors.values())]
    with atomic_path(path) as temporary, temporary.open("wb", buffering=0) as file:
        for part in parts:
            for at in range(0, len(part), _PIECE):
                piece = part[at : at + _PIECE]
                digest.update(piece)
                while piece:  # an unbuffered file may take a part of it
                    piece = piece[file.write(piece) or 0 :]
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a small safetensors file into memory.

    Raises:
        SparsightError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SparsightError(f"{path}: is missing or damaged ({error}).") from error


def check_size(path: Path, n_bytes: int, again: str = _AGAIN) -> None:
    """Make sure that a file is as long as it was when it was written.

    Args:
        path: of the file.
        n_bytes: that were written.
        again: what to do if there are not as many.

    Raises:
        SparsightError: it is missing, or of another length.
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


def map_shard(
    path: Path, shape: Sequence[int], dtype: torch.dtype, n_bytes: int
) -> Float[Tensor, "images tokens d_in"]:
    """Map a shard of activations into memory; see `map_tensors`."""
    return map_tensors(path, {ACTIVATIONS: (tuple(shape), dtype)}, n_bytes)[ACTIVATIONS]


def map_tensors(
    path: Path,
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    n_bytes: int,
    again: str = _AGAIN,
) -> dict[str, Tensor]:
    """Map a safetensors file into memory; nothing is read until it is looked at.

    Args:
        path: of the file.
        layout: shape and type of each tensor, in the order in which they were written; types of
            more bytes stand before those of fewer.
        n_bytes: of the file.
        again: what to do if it is damaged.

    Raises:
        SparsightError: it is missing or cut off, or its header is not what was written.
    """
    check_size(path, n_bytes, again)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _LONGEST_HEADER)))
        header.pop("__metadata__", None)
        found = {
            name: (entry["dtype"], entry["shape"], entry["data_offsets"])
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SparsightError(f"{path}: its header is damaged ({error}).") from error
    expected, end = {}, 0
    for name, (shape, dtype) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        expected[name] = (_NAMES[dtype], list(shape), [start, end])
    if found != expected or 8 + length + end != n_bytes:
        raise SparsightError(
            f"{path}: its header says {found}, expected {expected}: it has been altered. {again}"
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
