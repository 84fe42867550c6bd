"""AuxK: dead latents model the residual of the live ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.config import check_types
from sparsight.errors import UserError
from sparsight.sae.remedies.base import LeftOver, Remedy, Residuals
from sparsight.sae.sparsity.base import largest


@dataclass(frozen=True)
class AuxK(Remedy):
    """Let dead latents model the residual of the live ones (Gao et al. 2024, appendix A.2).

    It helps latents whose pre-activations are positive but too small to be among the k largest, not
    those that a penalty has pushed below 0 for every vector.
    """

    word: ClassVar[str] = "auxk"
    label: ClassVar[str] = "AuxK"
    fusable: ClassVar[bool] = True

    alpha: float = 1 / 32
    """Weight of the auxiliary loss."""

    k: int | None = None
    """Number of dead latents to use per vector; default: the power of two nearest to d_in / 2."""

    dead_after: int | None = None
    """A latent counts as dead after this many vectors without an activation; default: 10,000,000 or
    a tenth of the run, whichever is smaller."""

    def __post_init__(self) -> None:
        check_types(self, "remedy.")
        if self.alpha <= 0:
            raise UserError(
                f"remedy.alpha is {self.alpha}; it must be positive. To train without a remedy, "
                "set remedy to None."
            )
        if self.k is not None and self.k < 1:
            raise UserError(f"remedy.k is {self.k}; it must be at least 1.")
        if self.dead_after is not None and self.dead_after < 1:
            raise UserError(f"remedy.dead_after is {self.dead_after}; it must be at least 1.")

    @property
    def weight(self) -> float:
        """See `Remedy.weight`."""
        return self.alpha

    @property
    def aux_k(self) -> int:
        """See `Remedy.aux_k`."""
        return self.k or 0

    @property
    def window(self) -> int | None:
        """See `Remedy.window`."""
        return self.dead_after

    def for_width(self, d_in: int) -> Self:
        """See `Remedy.for_width`: with its k."""
        return replace(self, k=self.k or default_auxk(d_in))

    def loss(self, left: LeftOver, whole: Residuals | None = None) -> Float[Tensor, ""]:
        """See `Remedy.loss`."""
        spread = None if whole is None else whole.spread * len(left.residual) / whole.n
        k = self.k or default_auxk(left.residual.shape[1])
        return auxk_loss(left.scores, left.residual, left.W_dec, left.dead, k, spread)


def auxk_loss(
    scores: Float[Tensor, "batch n_latents"],
    residual: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "n_latents d_out"],
    dead: Int[Tensor, " dead"],
    k: int,
    spread: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Return how badly the dead latents model the residual of the live ones.

    ê = Σ f_i W_dec[i] over the k strongest dead latents of each vector, and e = z − ẑ without
    gradient; the loss is Σ‖e − ê‖² / Σ‖e − ē‖² with ē the batch's mean of e (Gao et al. 2024,
    appendix A.2). Neither ê nor e includes the bias b_dec.

    Args:
        scores: pre-activations.
        residual: z − ẑ; its gradient is not used.
        W_dec: decoder rows.
        dead: the latents that count as dead.
        k: largest number of dead latents per vector.
        spread: the divisor, if it is not to be measured on `residual` itself.

    Returns:
        The loss, before its weight; 0 if there is no residual.
    """
    target = residual.detach()
    if spread is None:
        spread = (target - target.mean(dim=0)).square().sum()
    if spread == 0:
        return spread
    of_dead = scores[:, dead]
    code = torch.where(largest(of_dead, min(k, len(dead))), of_dead, 0).relu()
    return (target - code @ W_dec[dead]).square().sum() / spread


def default_auxk(d_in: int) -> int:
    """Return the power of two nearest to half the width (the larger if tied), as in the paper."""
    half = max(d_in / 2, 1)
    below = 1 << (int(half).bit_length() - 1)
    return below if half - below < 2 * below - half else 2 * below
