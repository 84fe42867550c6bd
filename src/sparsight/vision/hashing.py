"""A fingerprint of a vision tower's weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def weights_hash(groups: Mapping[str, Iterable[Tensor]]) -> str:
    """Hex SHA-256 over groups of tensors: their shapes, dtypes and bytes.

    Within a group (one block, say) tensors count as a set: their names are left out, since
    libraries rename parameters between versions and the same weights must keep their hash.
    Tensors are hashed on several threads; about 1 s for ViT-L on two cores.

    Args:
        groups: the tensors of each group, by its label (`blocks.3`).
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = {label: pool.map(_digest, tensors) for label, tensors in sorted(groups.items())}
        table = {label: sorted(found) for label, found in digests.items()}
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    head = f"{list(tensor.shape)} {tensor.dtype} ".encode()
    digest = hashlib.sha256(head)
    digest.update(data.data)
    return digest.hexdigest()
