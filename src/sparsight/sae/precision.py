"""The precision in which an SAE computes: at least float32, whatever its weights have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """Return the same numbers in float32; float64 stays, and float32 is not copied."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.float()


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Disable the casts to half precision that `torch.autocast` would make."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(
        device.type
    ):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield
