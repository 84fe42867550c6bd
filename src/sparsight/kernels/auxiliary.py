"""The auxiliary loss over dead latents in dense products, for when many of them are used."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.kernels.interface import FusedStep


class Auxiliary(NamedTuple):
    """Gradients of the auxiliary loss, only at the dead latents."""

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
    """Return the weighted gradients and the unweighted loss; see `AuxK`.

    Args:
        step: the step, with its parameters and plan.
        x: normalised activations minus the decoder's bias.
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
    # If the spread is 0 there is no residual, so the loss and its gradient are 0.
    factor = torch.where(spread > 0, 1 / spread, 0.0)
    loss = _square(error) * factor
    error *= (2 * step.plan.aux_alpha * factor).to(error.dtype)
    of_code = (error @ W_dec.T).mul_(code > 0)
    return Auxiliary(dead, of_code.T @ x, of_code.sum(dim=0), code.T @ error), loss


def _square(x: Float[Tensor, "rows d_in"]) -> Float[Tensor, ""]:
    """Return the sum of squares: per row in its own precision, over rows in float64."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=1)
    return norms.double().square().sum()
