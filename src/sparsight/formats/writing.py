"""An SAE as other projects can store it: plain tensors, with the normaliser folded in."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.errors import UserError
from sparsight.files import atomic_path
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.sparsity import Gated, TopK


@dataclass(frozen=True)
class Plain:
    """The parameters of an SAE without a normaliser, on the CPU, float32, contiguous."""

    d_in: int
    d_out: int | None
    sparsity: Any
    subtracts: bool
    """Whether the encoder reads x − b_dec."""

    normaliser: str
    """"none", or a normaliser that works on each vector separately and is left to the format."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None
    r_mag: Tensor | None
    b_mag: Tensor | None
    W_skip: Tensor | None

    def biases(self, *, subtracts: bool) -> tuple[Tensor, Tensor | None]:
        """Return the encoder's biases (and the magnitudes', if gated) for reading x or x − b_dec.

        W (x − b_dec) + b = W x + (b − W b_dec) is computed in float64.
        """
        if subtracts == self.subtracts:
            return self.b_enc, self.b_mag
        sign = 1 if subtracts else -1
        shift = sign * (self.W_enc.double() @ self.b_dec.double())
        b_mag = None
        if self.b_mag is not None and self.r_mag is not None:
            b_mag = (self.b_mag.double() + self.r_mag.double().exp() * shift).float()
        return (self.b_enc.double() + shift).float(), b_mag

    def only(self, *kinds: type, title: str) -> None:
        """Check that the format has this sparsity.

        Raises:
            UserError: it does not.
        """
        if not isinstance(self.sparsity, kinds):
            names = ", ".join(each.__name__ for each in kinds)
            raise UserError(
                f"{title} has no {type(self.sparsity).__name__}; Sparsight writes {names} for it."
            )
        if getattr(self.sparsity, "rectify", True) is False:
            raise UserError(f"{title} has no TopK with negative values (rectify=False).")

    def autoencoder_only(self, title: str) -> None:
        """Check that the SAE reconstructs its own input and has no skip connection.

        Raises:
            UserError: it is a transcoder, or has a skip connection.
        """
        if self.d_out is not None:
            raise UserError(f"{title} has no transcoders.")
        if self.W_skip is not None:
            raise UserError(f"{title} has no skip connections.")


def plain(sae: SparseAutoencoder, title: str, *, per_vector: tuple[str, ...] = ()) -> Plain:
    """Take an SAE apart for a format.

    Args:
        sae: any SAE; it is not changed.
        title: name of the format, for messages.
        per_vector: normalisers that work on each vector separately and that the format has.

    Raises:
        UserError: the SAE has a part that no other format has, or a normaliser that cannot be
            folded.
    """
    config = sae.config
    if config.soft_cap is not None:
        raise UserError(f"{title} has no soft cap of the activations (soft_cap).")
    kind = config.normaliser
    if kind in ("layer_norm", "constant_norm") and kind not in per_vector:
        raise UserError(
            f"{title} has no normaliser {kind!r}, which depends on each vector and so cannot be "
            "folded into the weights."
        )
    if sae.W_enc.dtype not in (torch.float32, torch.float64):
        sae = copy.deepcopy(sae).float()  # so that folding does not round to half precision
    folded = sae if kind in per_vector else sae.fold()
    tensors = {
        name: (each.detach().to("cpu", torch.float32).contiguous().clone())
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "r_mag", "b_mag", "W_skip")
        if (each := getattr(folded, name, None)) is not None
    }
    gated = isinstance(config.sparsity, Gated)
    return Plain(
        d_in=sae.d_in,
        d_out=sae.d_out if sae.is_transcoder else None,
        sparsity=config.sparsity,
        subtracts=config.subtract_b_dec,
        normaliser=kind if kind in per_vector else "none",
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=tensors.get("threshold"),
        r_mag=tensors["r_mag"] if gated else None,
        b_mag=tensors["b_mag"] if gated else None,
        W_skip=tensors.get("W_skip"),
    )


def above(threshold: Tensor) -> Tensor:
    """Return t' such that p ≥ t is p > t', for p > 0; both float32."""
    threshold = threshold.float()
    low = torch.nextafter(threshold, torch.full_like(threshold, -math.inf))
    return torch.where(threshold > 0, low, torch.zeros_like(threshold))


def at_least(threshold: Tensor) -> Tensor:
    """Return t' such that p > t is p ≥ t', for p > 0; both float32."""
    threshold = threshold.float()
    high = torch.nextafter(threshold, torch.full_like(threshold, math.inf))
    return torch.where(threshold >= 0, high, torch.zeros_like(threshold))


def keeps_negatives(sparsity: TopK, title: str) -> None:
    """Check that a TopK has no ReLU, for a format whose TopK has none.

    Raises:
        UserError: it has one.
    """
    if sparsity.rectify:
        raise UserError(
            f"{title} keeps negative values among the {sparsity.k} largest, but this SAE drops "
            "them (rectify=True): a vector with fewer positive latents would have another code. "
            "Train with rectify=False, or use `sparsight convert --approximate`, which measures "
            "the effect."
        )


def write_torch(payload: Any, path: Path, header: bytes = b"") -> None:
    """Write with `torch.save`, whole or not at all.

    Args:
        payload: what to write.
        path: the file.
        header: bytes that precede it.

    Raises:
        SparsightError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        torch.save(payload, file)
