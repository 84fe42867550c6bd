"""TopK and BatchTopK: the k strongest latents of each vector, or on average over a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.config import check_types
from sparsight.kernels import backend
from sparsight.sae.code import SparseCode
from sparsight.sae.sparsity.base import (
    Sparsity,
    Weights,
    check_at_least,
    largest,
    largest_of_batch,
)


@dataclass(frozen=True)
class TopK(Sparsity):
    """Keep the positive ones among the k largest pre-activations of a vector.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3.
    """

    several_k: ClassVar[bool] = True

    k: int = 32
    """Largest number of active latents per vector."""

    rectify: bool = True
    """Drop negative values; False keeps them, as in Makhzani & Frey 2013, "k-sparse
    autoencoders"."""

    def __post_init__(self) -> None:
        check_types(self, "sparsity.")
        check_at_least(self.k, 1, "sparsity.k")

    @property
    def fusable(self) -> bool:
        """See `Sparsity.fusable`."""
        return self.rectify

    def encode(
        self, weights: Weights, z: Float[Tensor, "batch d_in"], *, training: bool = False
    ) -> SparseCode:
        """See `Sparsity.encode`."""
        values, indices = backend().encode_topk(
            z, weights.W_enc, weights.b_enc, weights.centre, self.k, rectify=self.rectify
        )
        return SparseCode.from_padded(values, indices, len(weights.W_enc), signed=not self.rectify)

    def activate(
        self,
        weights: Weights,
        scores: Float[Tensor, "batch n_latents"],
        *,
        training: bool = False,
    ) -> Float[Tensor, "batch n_latents"]:
        """See `Sparsity.activate`."""
        kept = torch.where(largest(scores, self.k), scores, 0)
        return kept.relu() if self.rectify else kept


@dataclass(frozen=True)
class BatchTopK(Sparsity):
    """Keep the positive ones among the k · batch largest pre-activations of a whole batch.

    A vector may then use more or fewer than k latents. Outside training, without a batch to compare
    with, a latent is active if it reaches a threshold, which training estimates as the mean of the
    batches' smallest activations (Bussmann et al. 2024, "BatchTopK sparse autoencoders").
    """

    buffers: ClassVar[frozenset[str]] = frozenset({"threshold"})
    per_batch: ClassVar[bool] = True

    k: int = 32
    """Average number of active latents per vector."""

    def __post_init__(self) -> None:
        check_types(self, "sparsity.")
        check_at_least(self.k, 1, "sparsity.k")

    @property
    def fusable(self) -> bool:
        """See `Sparsity.fusable`."""
        return True

    @property
    def separable(self) -> bool:
        """See `Sparsity.separable`."""
        return False

    def start(self, n_latents: int) -> dict[str, Tensor]:
        """See `Sparsity.start`; returns the threshold, one number."""
        return {"threshold": torch.zeros(())}

    def encode(
        self, weights: Weights, z: Float[Tensor, "batch d_in"], *, training: bool = False
    ) -> SparseCode:
        """See `Sparsity.encode`."""
        parts = (weights.W_enc, weights.b_enc, weights.centre)
        if training:
            code = backend().encode_batch_topk(z, *parts, self.k)
        else:
            code = backend().encode_above(z, *parts, float(weights.extra["threshold"]))
        return SparseCode.from_ragged(*code, len(weights.W_enc))

    def activate(
        self,
        weights: Weights,
        scores: Float[Tensor, "batch n_latents"],
        *,
        training: bool = False,
    ) -> Float[Tensor, "batch n_latents"]:
        """See `Sparsity.activate`."""
        if training:
            kept = largest_of_batch(scores, self.k)
        else:
            kept = scores >= weights.extra["threshold"]
        return torch.where(kept, scores, 0).relu()
