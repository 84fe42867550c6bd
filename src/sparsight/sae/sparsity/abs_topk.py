"""The k strongest latents of either sign."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.config import check_types
from sparsight.kernels import backend
from sparsight.sae.code import SparseCode
from sparsight.sae.sparsity.base import Sparsity, Weights, check_at_least, largest


@dataclass(frozen=True)
class AbsTopK(Sparsity):
    """Keep the k pre-activations of a vector that are largest in absolute value, with their signs.

    A latent then stands for two opposite features (Zhu et al. 2025, "AbsTopK: rethinking sparse
    autoencoders for bidirectional features").
    """

    k: int = 32
    """Largest number of active latents per vector."""

    def __post_init__(self) -> None:
        check_types(self, "sparsity.")
        check_at_least(self.k, 1, "sparsity.k")

    def encode(
        self, weights: Weights, z: Float[Tensor, "batch d_in"], *, training: bool = False
    ) -> SparseCode:
        """See `Sparsity.encode`; takes the k largest and smallest, then the k strongest of them."""
        W, b, centre = weights.W_enc, weights.b_enc, weights.centre
        k = min(self.k, len(W))
        high, of_high = backend().encode_topk(z, W, b, centre, k)
        low, of_low = backend().encode_topk(z, -W, -b, centre, k)
        values, indices = torch.cat([high, -low], dim=1), torch.cat([of_high, of_low], dim=1)
        kept = values.detach().abs().topk(k, dim=1).indices
        values, indices = values.gather(1, kept), indices.gather(1, kept)
        return SparseCode.from_padded(values, indices, len(W), signed=True)

    def activate(
        self,
        weights: Weights,
        scores: Float[Tensor, "batch n_latents"],
        *,
        training: bool = False,
    ) -> Float[Tensor, "batch n_latents"]:
        """See `Sparsity.activate`."""
        return torch.where(largest(scores.abs(), self.k), scores, 0)
