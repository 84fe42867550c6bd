"""Safetensors files: no stated size is believed; written whole or not at all; with checksums."""

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
"""Longest header of a safetensors file, in bytes, according to the format."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        SparsightError: the file is missing, damaged or cut off.
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
    """Return the names of a safetensors file's tensors, without reading them.

    Raises:
        SparsightError: the file is missing, damaged or cut off.
    """
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.keys())
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise damaged(path, error) from error


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Return the free texts in a safetensors header, by key.

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
    """Hash names, dtypes, shapes and bytes of tensors, in any order, to a hex SHA-256."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def check_header(path: Path) -> None:
    """Check, before reading it, that a safetensors header ends within the file.

    Raises:
        SparsightError: it does not, or the file does not exist.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise damaged(path, error) from error
    if size < 8 or length > min(LONGEST_HEADER, size - 8):
        raise damaged(path, f"its header says {length:,} bytes, but the file has {size:,}")


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        tensors: the tensors by name.
        path: the file.
        about: one text for its metadata, by its key. safetensors would write several in random
            order, and equal tensors would not give equal bytes.

    Raises:
        SparsightError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(about or {"format": "pt"}))
        except SafetensorError as error:
            raise SparsightError(f"{path}: could not be written ({error}).") from error


def damaged(path: Path, error: object) -> SparsightError:
    """Return the error for a file that cannot be read."""
    return SparsightError(f"{path}: is missing, damaged or cut off ({error}).")
