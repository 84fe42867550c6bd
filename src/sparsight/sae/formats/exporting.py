"""What writing a format of another project takes: the same function, with the parts that it has."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from sparsight.errors import UserError
from sparsight.files import atomic_path
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.sparsity import Gated, TopK


def plain(
    sae: SparseAutoencoder,
    title: str,
    *,
    subtract_b_dec: bool,
    normalisers: Collection[str] = ("none",),
    skip: bool = False,
    cap: bool = False,
) -> SparseAutoencoder:
    """The same function of x in the parts that a format knows.

    On the CPU in float32. The normaliser is folded into the weights unless the format has it, and
    the encoder's bias is that of an encoder which does, or does not, subtract `b_dec`: the
    pre-activations W_enc (z − b_dec) + b and W_enc z + (b − W_enc b_dec) are the same.

    Args:
        sae: the SAE.
        title: of the format, for messages.
        subtract_b_dec: whether the format's encoder does.
        normalisers: the kinds that it has.
        skip: whether it has transcoders.
        cap: whether it has the SAE's soft cap.

    Raises:
        UserError: the format has no equal of a part.
    """
    if sae.config.soft_cap is not None and not cap:
        raise UserError(f"{title}: its format has no soft cap of latents.")
    transcoder = sae.is_transcoder
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
            extra = found.weights().extra
            extra["b_mag"].add_(extra["r_mag"].exp() * shift)
    return found


def drops_negatives(sparsity: TopK, title: str) -> None:
    """Warn who writes a TopK with a ReLU into a format whose TopK has none."""
    if sparsity.rectify:
        logging.getLogger("sparsight").warning(
            "%s keeps negative values among the %d greatest, this SAE drops them: vectors with "
            "fewer positive latents than that will have other codes there.",
            title,
            sparsity.k,
        )


def belongs(
    *,
    model: str | None = None,
    site: str | None = None,
    target: str | None = None,
    tokens: str | None = None,
) -> dict[str, Any]:
    """An SAE's metadata, as far as they are known."""
    found: dict[str, Any] = {"model": {"id": model}} if model else {}
    given = {"site": site, "target": target, "tokens": tokens}
    return found | {key: value for key, value in given.items() if value is not None}


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
