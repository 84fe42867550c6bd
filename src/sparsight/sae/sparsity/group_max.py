"""GroupMax: one latent per group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.config import check_types
from sparsight.errors import UserError
from sparsight.sae.code import SparseCode
from sparsight.sae.sparsity.base import Sparsity, Weights, check_at_least


@dataclass(frozen=True)
class GroupMax(Sparsity):
    """Keep the largest pre-activation of each of k groups of neighbouring latents, if positive.

    A cheaper relative of TopK, from EleutherAI's sparsify.
    """

    k: int = 32
    """Number of groups, and so the largest number of active latents per vector; it must divide
    n_latents."""

    def __post_init__(self) -> None:
        check_types(self, "sparsity.")
        check_at_least(self.k, 1, "sparsity.k")

    def check_width(self, n_latents: int) -> None:
        """See `Sparsity.check_width`."""
        super().check_width(n_latents)
        if n_latents % self.k:
            raise UserError(
                f"sparsity.k is {self.k}, which does not divide the {n_latents} latents into "
                "groups of equal size."
            )

    def encode(
        self, weights: Weights, z: Float[Tensor, "batch d_in"], *, training: bool = False
    ) -> SparseCode:
        """See `Sparsity.encode`; the scores are dense."""
        values, indices = self._maxima(weights.scores(z))
        return SparseCode.from_padded(values.relu(), indices, len(weights.W_enc))

    def activate(
        self,
        weights: Weights,
        scores: Float[Tensor, "batch n_latents"],
        *,
        training: bool = False,
    ) -> Float[Tensor, "batch n_latents"]:
        """See `Sparsity.activate`."""
        values, indices = self._maxima(scores)
        return torch.zeros_like(scores).scatter(1, indices, values.relu())

    def _maxima(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        grouped = scores.unflatten(1, (self.k, -1))
        values, places = grouped.max(dim=2)
        firsts = torch.arange(self.k, device=scores.device) * grouped.shape[2]
        return values, places + firsts
