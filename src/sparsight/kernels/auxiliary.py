"""The auxiliary loss over dead latents by dense products, where a good part of them is in use."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.kernels.interface import FusedStep


class Auxiliary(NamedTuple):
    """Gradients of the auxiliary loss, at the dead latents alone."""

    latents: Int[Tensor, " dead"]
    W_enc: Float[Tensor, "dead d_in"]
    b_enc: Float[Tensor, " dead"]
    W_dec: Float[Tensor, "dead d_in"]


def dense_auxiliary(
    step: FusedStep,
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_in"],
    dead: Int[Tensor, " dead"],
) -> tuple[Auxiliary, Float[Tensor, ""]]:
    """The gradients, weighted, and the loss, not weighted; see `AuxK`.

    Args:
        step: whose parameters and plan they are.
        x: normalised activations, the decoder's bias subtracted.
        target: z − ẑ.
        dead: the dead latents.
    """
    W_enc, W_dec, b_enc = step.W_enc[dead], step.W_dec[dead], step.b_enc[dead]
    scores = torch.addmm(b_enc, x, W_enc.T)
    k = min(step.plan.aux_k, len(dead))
    values, chosen = scores.topk(k, dim=1, sorted=False)
    code = scores.zero_().scatter_(1, chosen, values.relu_())
    error = torch.addmm(target, code, W_dec, beta=-1)
    spread = _square(target - target.mean(dim=0))
    # Nothing is left over where the spread is 0: then the loss and its gradient are 0.
    factor = torch.where(spread > 0, 1 / spread, 0.0)
    loss = _square(error) * factor
    error *= (2 * step.plan.aux_alpha * factor).to(error.dtype)
    of_code = (error @ W_dec.T).mul_(code > 0)
    return Auxiliary(dead, of_code.T @ x, of_code.sum(dim=0), code.T @ error), loss


def _square(x: Float[Tensor, "rows d_in"]) -> Float[Tensor, ""]:
    """The sum of squares, of rows in their own precision, of all in float64."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=1)
    return norms.double().square().sum()
