"""What training minimises, in plain autograd: slow, and right by inspection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsight.sae.kernels.interface import Objective


class DenseLoss(NamedTuple):
    """The loss of a batch and what it is made of."""

    loss: Float[Tensor, ""]
    """All of it; what is differentiated."""

    squared_error: Float[Tensor, ""]
    """Σ ‖z − ẑ‖² of the SAE's own reconstruction."""

    aux_loss: Float[Tensor, ""]
    """The auxiliary loss, before its weight; 0 where no latent is dead or nothing is left over."""

    code: Float[Tensor, "batch n_latents"]
    """The SAE's own code."""


def dense_loss(
    parameters: dict[str, Tensor],
    z: Float[Tensor, "batch d_in"],
    objective: Objective,
    variance: float,
    dead: Int[Tensor, " dead"] | None = None,
) -> DenseLoss:
    """The loss of `Objective` with a dense code, differentiable.

    Reconstruction: Gao et al. 2024, section 2.3; Multi-TopK: section 6.2 and appendix B; BatchTopK:
    Bussmann et al. 2024; prefixes: Bussmann et al. 2025, "Learning multi-level features with
    Matryoshka SAEs".

    Args:
        parameters: `W_enc`, `b_enc`, `W_dec`, `b_dec`.
        z: activations in normalised space.
        objective: what is minimised.
        variance: of the activations: Σ over dimensions.
        dead: latents that the auxiliary loss may use.
    """
    W_dec, b_dec = parameters["W_dec"], parameters["b_dec"]
    scores = (z - b_dec) @ parameters["W_enc"].T + parameters["b_enc"]
    kept = _largest_of_batch(scores, objective.k) if objective.per_batch else None
    codes = []
    for stage in range(objective.n_stages):
        if objective.larger_k:
            kept = _largest(scores, (objective.k, objective.larger_k)[stage])
        elif kept is None:
            kept = _largest(scores, objective.k)
        code = torch.where(kept, scores, 0).relu()
        if objective.widths:
            code = code[:, : objective.widths[stage]]
        codes.append(code)
    errors = [code @ W_dec[: code.shape[1]] + b_dec - z for code in codes]
    squared = [error.square().sum() for error in errors]
    total = sum(w * s for w, s in zip(objective.weights, squared, strict=True))
    loss = torch.as_tensor(total) / (len(z) * variance)
    aux_loss = loss.new_zeros(())
    main = objective.main_stage
    if dead is not None and len(dead):
        aux_loss = auxk_loss(scores, -errors[main], W_dec, dead, objective.aux_k)
        loss = loss + objective.aux_alpha * aux_loss
    return DenseLoss(loss, squared[main].detach(), aux_loss.detach(), codes[main].detach())


def auxk_loss(
    scores: Float[Tensor, "batch n_latents"],
    residual: Float[Tensor, "batch d_in"],
    W_dec: Float[Tensor, "n_latents d_in"],
    dead: Int[Tensor, " dead"],
    k: int,
) -> Float[Tensor, ""]:
    """How badly the dead latents model what the living ones leave over.

    ê = Σ f_i W_dec[i] over the k strongest dead latents of each vector, e = z − ẑ without
    gradient; the loss is Σ‖e − ê‖² / Σ‖e − ē‖², ē the batch's mean of e (Gao et al. 2024, appendix
    A.2). The bias b_dec is no part of ê, as it is none of e.

    Args:
        scores: pre-activations.
        residual: z − ẑ; its gradient is not used.
        W_dec: decoder rows.
        dead: which latents count as dead.
        k: how many of them at most.

    Returns:
        The loss, before its weight; 0 where nothing is left over.
    """
    target = residual.detach()
    spread = (target - target.mean(dim=0)).square().sum()
    if spread == 0:
        return spread
    of_dead = scores[:, dead]
    code = torch.where(_largest(of_dead, min(k, len(dead))), of_dead, 0).relu()
    return (target - code @ W_dec[dead]).square().sum() / spread


def default_auxk(d_in: int) -> int:
    """The power of two nearest to half the width, the larger of two: the paper's rule of thumb."""
    half = max(d_in / 2, 1)
    below = 1 << (int(half).bit_length() - 1)
    return below if half - below < 2 * below - half else 2 * below


def _largest(scores: Tensor, k: int) -> Bool[Tensor, "batch n"]:
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(1, scores.topk(k, dim=1).indices, True)


def _largest_of_batch(scores: Tensor, k: int) -> Bool[Tensor, "batch n"]:
    kept = torch.zeros_like(scores, dtype=torch.bool).flatten()
    kept[scores.flatten().topk(k * len(scores)).indices] = True
    return kept.view_as(scores)
