"""Safetensors files: read without believing a size, written whole or not at all, and checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsight.errors import SparsightError
from sparsight.files import atomic_path
from sparsight.pickles import MOST_AXES, shown

LONGEST_HEADER = 100 * 2**20
"""Bytes of a safetensors header: the limit of the format."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        SparsightError: it is missing, damaged or cut off.
    """
    check_header(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise damaged(path, error) from error
    for name, tensor in tensors.items():
        if tensor.ndim > MOST_AXES:
            raise damaged(path, f"its tensor {shown(name)} has {tensor.ndim:,} axes")
    return tensors


def safetensors_keys(path: Path) -> tuple[str, ...]:
    """The names of a safetensors file's tensors, without reading them.

    Raises:
        SparsightError: it is missing, damaged or cut off.
    """
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.keys())
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise damaged(path, error) from error


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The free texts in a safetensors header, by their keys.

    Raises:
        SparsightError: the file is missing, damaged or cut off.
    """
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise damaged(path, error) from error


def sha256_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over the names, dtypes, shapes and bytes of tensors, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def check_header(path: Path) -> None:
    """Make sure that a safetensors header ends within the file before it is read.

    Raises:
        SparsightError: it does not, or there is no such file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise damaged(path, error) from error
    if size < 8 or length > min(LONGEST_HEADER, size - 8):
        raise damaged(path, f"its header says {length:,} bytes, the file has {size:,}")


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        tensors: by name.
        path: of the file.
        about: one text for its metadata, by its key. Of several, safetensors would write the order
            at random, and equal tensors would not give equal bytes.

    Raises:
        SparsightError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(about or {"format": "pt"}))
        except SafetensorError as error:
            raise SparsightError(f"{path}: could not be written ({error}).") from error


def damaged(path: Path, error: object) -> SparsightError:
    """The error of a file that cannot be read."""
    return SparsightError(f"{path}: is missing, damaged or cut off ({error}).")
