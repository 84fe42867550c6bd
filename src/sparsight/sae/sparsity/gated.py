"""Gated: one linear map chooses the latents, another determines how strong they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.config import check_types
from sparsight.kernels import backend
from sparsight.sae.code import SparseCode
from sparsight.sae.sparsity.base import Dense, Sparsity, Weights, check_at_least


@dataclass(frozen=True)
class Gated(Sparsity):
    """Choose by a gate, so that the penalty on the gate does not shrink the activations.

    With c = z − centre: the gate is π = W_enc c + b_enc, the magnitude
    m = exp(r_mag) ⊙ W_enc c + b_mag, the code f = [π > 0] ReLU(m). Training adds l1 · Σ ReLU(π)_i
    and the error of the reconstruction from ReLU(π) with a frozen decoder (Rajamanoharan et al.
    2024, "Improving dictionary learning with gated sparse autoencoders", section 3).
    """

    of_training: ClassVar[frozenset[str]] = frozenset({"l1"})

    l1: float = 5.0
    """Weight of the gates' sum; the error of a vector z is ‖z − ẑ‖² in normalised space."""

    def __post_init__(self) -> None:
        check_types(self, "sparsity.")
        check_at_least(self.l1, 0, "sparsity.l1")

    def start(self, n_latents: int) -> dict[str, Tensor]:
        """See `Sparsity.start`; `r_mag` and `b_mag` make gate and magnitude start equal."""
        return {"r_mag": torch.zeros(n_latents), "b_mag": torch.zeros(n_latents)}

    def shifted(
        self, extra: Mapping[str, Tensor], shift: Float[Tensor, " n_latents"]
    ) -> dict[str, Tensor]:
        """See `Sparsity.shifted`; the magnitude uses the same product."""
        return {"b_mag": extra["b_mag"] - extra["r_mag"].exp() * shift}

    def encode(
        self, weights: Weights, z: Float[Tensor, "batch d_in"], *, training: bool = False
    ) -> SparseCode:
        """See `Sparsity.encode`."""
        gate, indices, starts = backend().encode_above(
            z, weights.W_enc, weights.b_enc, weights.centre, 0.0
        )
        linear = gate - weights.b_enc[indices]
        extra = weights.extra
        magnitude = extra["r_mag"].exp()[indices] * linear + extra["b_mag"][indices]
        values = torch.where(gate > 0, magnitude.relu(), 0)
        return SparseCode.from_ragged(values, indices, starts, len(weights.W_enc))

    def activate(
        self,
        weights: Weights,
        scores: Float[Tensor, "batch n_latents"],
        *,
        training: bool = False,
    ) -> Float[Tensor, "batch n_latents"]:
        """See `Sparsity.activate`; the scores are those of the gate."""
        extra = weights.extra
        magnitude = extra["r_mag"].exp() * (scores - weights.b_enc) + extra["b_mag"]
        return torch.where(scores > 0, magnitude.relu(), 0)

    def penalty(
        self,
        weights: Weights,
        found: Dense,
        target: Float[Tensor, "batch d_out"],
        share: float = 1.0,
    ) -> Float[Tensor, ""]:
        """See `Sparsity.penalty`."""
        gate = found.scores.relu()
        x_hat = gate @ weights.W_dec.detach() + weights.b_dec.detach()
        error = (x_hat - target).square().sum(dim=1)
        # The gate learns from the error, which therefore does not rise with the price.
        return (share * self.l1 * gate.sum(dim=1) + error).mean()
