"""What writing a format of another project takes: the same function, with the parts that it has."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from sparsight.errors import UserError
from sparsight.files import atomic_path
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.config import TopK as Gated


def plain(
    sae: SparseAutoencoder,
    title: str,
    *,
    subtract_b_dec: bool,
    normalisers: Collection[str] = ("none",),
    skip: bool = False,
) -> SparseAutoencoder:
    """The same function of x in the parts that a format knows.

    On the CPU in float32. The normaliser is folded into the weights unless the format has it, and the encoder's bias is
    that of an encoder which does, or does not, subtract `b_dec`: the pre-activations
    W_enc (z − b_dec) + b and W_enc z + (b − W_enc b_dec) are the same.

    Args:
        sae: the SAE.
        title: of the format, for messages.
        subtract_b_dec: whether the format's encoder does.
        normalisers: the kinds that it has.
        skip: whether it has transcoders.

    Raises:
        UserError: the format has no equal of a part.
    """
    if sae.config.soft_cap is not None:
        raise UserError(f"{title}: its format has no soft cap of latents.")
    transcoder = sae.d_out is not None
    if transcoder and not skip:
        raise UserError(f"{title}: its format holds no transcoders.")
    if sae.config.normaliser not in normalisers:
        sae = sae.fold()
    found = copy.deepcopy(sae).to("cpu", torch.float32)
    if sae.config.subtract_b_dec == subtract_b_dec or transcoder:
        return found
    found.config = dataclasses.replace(sae.config, subtract_b_dec=subtract_b_dec)
    with torch.no_grad():
        shift = found.W_enc @ found.b_dec * (1 if subtract_b_dec else -1)
        found.b_enc.add_(shift)
        if isinstance(sae.config.sparsity, Gated):
            found.b_mag.add_(found.r_mag.exp() * shift)
    return found


def write_torch(payload: Any, path: Path, header: bytes = b"") -> None:
    """Write with `torch.save`, whole or not at all.

    Args:
        payload: what to write.
        path: the file.
        header: bytes that come before.

    Raises:
        SparsightError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        torch.save(payload, file)
