"""ReLU: every positive latent, with a penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sparsight.config import check_types
from sparsight.kernels import backend
from sparsight.sae.code import SparseCode
from sparsight.sae.sparsity.base import Dense, Sparsity, Weights, check_at_least


@dataclass(frozen=True)
class ReLU(Sparsity):
    """Keep what is positive; training adds l1 · Σ f_i.

    Bricken et al. 2023, "Towards monosemanticity", with the decoder's bias subtracted first and
    decoder rows of norm 1. With `weighted`, the penalty is l1 · Σ f_i ‖W_dec[i]‖, and the decoder's
    norms are free (Conerly et al. 2024, "Update on how we train SAEs", Anthropic's circuits update
    of April); then also set `unit_norm_decoder` and `subtract_b_dec` to False.
    """

    of_training: ClassVar[frozenset[str]] = frozenset({"l1", "weighted"})

    l1: float = 2.0
    """Weight of the activations' sum; the error of a vector z is ‖z − ẑ‖² in normalised space."""

    weighted: bool = False
    """Weight each latent by the norm of its decoder row."""

    def __post_init__(self) -> None:
        check_types(self, "sparsity.")
        check_at_least(self.l1, 0, "sparsity.l1")

    def encode(
        self, weights: Weights, z: Float[Tensor, "batch d_in"], *, training: bool = False
    ) -> SparseCode:
        """See `Sparsity.encode`."""
        parts = (weights.W_enc, weights.b_enc, weights.centre)
        return SparseCode.from_ragged(*backend().encode_above(z, *parts, 0.0), len(weights.W_enc))

    def activate(
        self,
        weights: Weights,
        scores: Float[Tensor, "batch n_latents"],
        *,
        training: bool = False,
    ) -> Float[Tensor, "batch n_latents"]:
        """See `Sparsity.activate`."""
        return scores.relu()

    def penalty(
        self,
        weights: Weights,
        found: Dense,
        target: Float[Tensor, "batch d_out"],
        share: float = 1.0,
    ) -> Float[Tensor, ""]:
        """See `Sparsity.penalty`."""
        price = found.code @ weights.W_dec.norm(dim=1) if self.weighted else found.code.sum(dim=1)
        return share * self.l1 * price.mean()
