"""Matching pursuit: latents one after another, each for the residual of those before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sparsight.config import check_types
from sparsight.errors import UserError
from sparsight.sae.code import SparseCode
from sparsight.sae.sparsity.base import Dense, Sparsity, Weights, check_at_least

TILE = 1024
"""Number of vectors to encode at a time; the correlations of a tile are dense."""


@dataclass(frozen=True)
class MatchingPursuit(Sparsity):
    """Choose k times the decoder row that best matches the residual, and subtract its part.

    r ← z − centre; k times: i = argmax_j W_dec[j] · r, a = ReLU(W_dec[i] · r), f_i += a,
    r ← r − a W_dec[i] (Mallat & Zhang 1993; as an SAE: Costa et al. 2025, "From flat to
    hierarchical: extracting sparse representations with matching pursuit"). There is no encoder:
    `W_enc` and `b_enc` are not used. Meant for decoder rows of norm 1.
    """

    has_encoder: ClassVar[bool] = False

    k: int = 32
    """Number of choices per vector, and so the largest number of active latents."""

    tolerance: float = 0.0
    """Stop encoding a vector once the norm of its residual is below this."""

    stop_on_repeat: bool = False
    """Stop encoding a vector when a latent is chosen again; that choice still counts, as in
    SAELens."""

    def __post_init__(self) -> None:
        check_types(self, "sparsity.")
        check_at_least(self.k, 1, "sparsity.k")
        check_at_least(self.tolerance, 0, "sparsity.tolerance")

    def encode(
        self, weights: Weights, z: Float[Tensor, "batch d_in"], *, training: bool = False
    ) -> SparseCode:
        """See `Sparsity.encode`."""
        indices, values, counts = [], [], []
        for tile in z.split(TILE):
            code = self._pursue(weights, tile)
            kept = code > 0
            indices.append(kept.nonzero()[:, 1])
            values.append(code[kept])
            counts.append(kept.sum(dim=1))
        if not counts:
            empty = torch.zeros(0, dtype=torch.int64, device=z.device)
            indices, values, counts = [empty], [z.new_zeros(0)], [empty]
        starts = functional.pad(torch.cat(counts).cumsum(0), (1, 0))
        return SparseCode(torch.cat(indices), torch.cat(values), starts, len(weights.W_dec))

    def activate(
        self,
        weights: Weights,
        scores: Float[Tensor, "batch n_latents"],
        *,
        training: bool = False,
    ) -> Float[Tensor, "batch n_latents"]:
        """Raise an error: scores alone do not determine the code.

        Raises:
            UserError: always.
        """
        raise UserError(
            "MatchingPursuit cannot compute a code with another k, or from pre-activations alone."
        )

    def scores(
        self, weights: Weights, z: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch n_latents"]:
        """See `Sparsity.scores`; these are the first correlations."""
        return (z - weights.centre) @ weights.W_dec.T

    def dense(
        self, weights: Weights, z: Float[Tensor, "batch d_in"], *, training: bool = False
    ) -> Dense:
        """See `Sparsity.dense`."""
        return Dense(self.scores(weights, z), self._pursue(weights, z))

    def _pursue(
        self, weights: Weights, z: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch n_latents"]:
        W = weights.W_dec
        residual = z - weights.centre
        chosen: list[Tensor] = []
        amounts: list[Tensor] = []
        going = torch.ones(len(z), dtype=torch.bool, device=z.device)
        for _ in range(self.k):
            with torch.no_grad():
                best = (residual @ W.T).argmax(dim=1)
                going = going & (residual.norm(dim=1) >= self.tolerance)
            rows = W[best]
            amount = (residual * rows).sum(dim=1).relu() * going
            if self.stop_on_repeat and chosen:
                going = going & (torch.stack(chosen) != best).all(dim=0)
            residual = residual - amount[:, None] * rows
            chosen.append(best)
            amounts.append(amount)
        code = z.new_zeros(len(z), len(W))
        return code.scatter_add(1, torch.stack(chosen, dim=1), torch.stack(amounts, dim=1))
