"""What training minimises, in plain autograd: slow, and right by inspection."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.kernels.interface import Objective
from sparsight.sae.sparsity import BatchTopK, Dense, Sparsity, TopK, Weights
from sparsight.sae.sparsity.base import largest

SEED_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of the draws of two runs: odd and large, so that theirs do not coincide."""


@dataclass(frozen=True)
class Stage:
    """One of several reconstructions from a code."""

    weight: float = 1.0
    """Of its error."""

    width: int | None = None
    """Latents of the dictionary that it may use, from the first on; None is all."""

    k: int | None = None
    """Of a code that has another k than the SAE's own; only with TopK."""


@dataclass(frozen=True)
class Plan:
    """What training minimises: Σ_s weight_s ‖z − ẑ_s‖² / (batch · variance), the sparsity's penalty
    in the same unit, and what is for the dead latents."""

    sparsity: Sparsity
    """Of the SAE."""

    stages: tuple[Stage, ...] = (Stage(),)
    """Its reconstructions."""

    main: int = 0
    """Which of them is the SAE's own."""

    random_widths: int | None = None
    """Prefixes that are drawn anew for each step, instead of `stages`."""

    soft_cap: float | None = None
    """As in `SAEConfig`."""

    aux_k: int = 0
    """Dead latents per vector that model the residual; 0 is none."""

    aux_alpha: float = 0.0
    """Weight of their loss."""

    ghost: bool = False
    """Ghost gradients for dead latents."""

    @classmethod
    def of(cls, objective: Objective) -> Plan:
        """The same as an `Objective` of the kernels."""
        k = objective.k
        stages: tuple[Stage, ...] = (Stage(objective.weights[0]),)
        if objective.larger_k:
            stages = (*stages, Stage(objective.weights[1], k=objective.larger_k))
        elif objective.widths:
            pairs = zip(objective.weights, objective.widths, strict=True)
            stages = tuple(Stage(weight, width=width) for weight, width in pairs)
        return cls(
            BatchTopK(k) if objective.per_batch else TopK(k),
            stages,
            objective.main_stage,
            aux_k=objective.aux_k,
            aux_alpha=objective.aux_alpha,
        )

    def at(self, step: int, n_latents: int, seed: int) -> Plan:
        """The plan of a step: with prefixes drawn, where they are drawn.

        Widths w < n have probabilities in proportion to 1 / w.
        """
        if self.random_widths is None:
            return self
        # One stream of draws for a run; no built-in hash, which may differ between Pythons.
        generator = torch.Generator().manual_seed((seed * SEED_STRIDE + step) % 2**63)
        drawn = torch.rand(self.random_widths - 1, generator=generator, dtype=torch.float64)
        widths = sorted({*(drawn * math.log(n_latents)).exp().long().tolist(), n_latents})
        stages = tuple(Stage(1 / len(widths), width=width) for width in widths)
        return dataclasses.replace(self, stages=stages, main=len(stages) - 1, random_widths=None)


class DenseLoss(NamedTuple):
    """The loss of a batch and what it is made of."""

    loss: Float[Tensor, ""]
    """All of it; what is differentiated."""

    squared_error: Float[Tensor, ""]
    """Σ ‖z − ẑ‖² of the SAE's own reconstruction."""

    aux_loss: Float[Tensor, ""]
    """What is for the dead latents, before its weight; 0 where none is dead or nothing is left."""

    code: Float[Tensor, "batch n_latents"]
    """The SAE's own code, before a soft cap: thresholds are compared with scores."""

    penalty: Float[Tensor, ""]
    """The sparsity's, as it is in the loss."""


class Whole(NamedTuple):
    """What the loss of a part of a batch has to know of all of it."""

    n: int
    """Vectors."""

    cutoff: Float[Tensor, ""] | None
    """The smallest value that BatchTopK keeps; None for other sparsities."""

    spread: Float[Tensor, ""]
    """Σ‖e − ē‖² of the residuals; 0 where no dead latent asks for them."""

    ghost_scale: Float[Tensor, ""]
    """By which the error of ghosts is rescaled."""


@torch.no_grad()
def whole_batch(
    weights: Weights,
    parts: Sequence[tuple[Float[Tensor, "_ d_in"], Float[Tensor, "_ d_out"]]],
    plan: Plan,
    dead: Int[Tensor, " dead"] | None,
) -> Whole:
    """A first pass over the parts of a batch that is too large to be held with a dense code.

    Args:
        weights: of the SAE.
        parts: activations in normalised space and their targets.
        plan: what is minimised.
        dead: latents that may learn from the residual.
    """
    n = sum(len(z) for z, _ in parts)
    b_dec = weights.b_dec
    cutoff = None
    if plan.sparsity.per_batch:
        z = torch.cat([z for z, _ in parts])
        values = plan.sparsity.encode(weights, z, training=True).values
        # The parts' scores are rounded otherwise: its last latent shall not fall out.
        cutoff = values.min() * (1 - 2**-20) if len(values) else b_dec.new_full((), math.inf)
    summed = torch.zeros_like(b_dec, dtype=torch.float64)
    squared, errors = b_dec.new_zeros(2, dtype=torch.float64)
    if dead is not None and len(dead):
        for z, target in parts:
            found = _dense(plan, weights, z, cutoff)
            code = _capped(_code(plan, plan.stages[plan.main], weights, found), plan.soft_cap)
            residual = target - code @ weights.W_dec[: code.shape[1]] - b_dec
            summed += residual.double().sum(dim=0)
            squared += residual.double().square().sum()
            if plan.ghost:
                errors += ghost_error(found.scores, residual, weights.W_dec, dead).double()
    spread = (squared - summed.square().sum() / n).clamp(min=0).to(b_dec.dtype)
    return Whole(n, cutoff, spread, (squared / errors.clamp(min=1e-30)).to(b_dec.dtype))


def dense_loss(
    weights: Weights,
    z: Float[Tensor, "batch d_in"],
    plan: Plan,
    variance: float,
    dead: Int[Tensor, " dead"] | None = None,
    *,
    target: Float[Tensor, "batch d_out"] | None = None,
    price: float = 1.0,
    whole: Whole | None = None,
) -> DenseLoss:
    """The loss of a `Plan` with a dense code, differentiable.

    Reconstruction: Gao et al. 2024, section 2.3; Multi-TopK: section 6.2 and appendix B; prefixes:
    Bussmann et al. 2025, "Learning multi-level features with Matryoshka SAEs".

    Args:
        weights: of the SAE.
        z: activations in normalised space.
        plan: what is minimised.
        variance: of the target: Σ over dimensions.
        dead: latents that may learn from the residual.
        target: what the reconstructions are compared with; None is `z`. Of a transcoder with a skip
            connection: without that connection's part.
        price: share of the sparsity's price that is due.
        whole: of the batch that `z` is a part of; the mean of the parts' losses, by their numbers
            of vectors, is then the batch's.
    """
    target = z if target is None else target
    W_dec, b_dec = weights.W_dec, weights.b_dec
    found = _dense(plan, weights, z, None if whole is None else whole.cutoff)
    codes = [_code(plan, stage, weights, found) for stage in plan.stages]
    bent = [_capped(code, plan.soft_cap) for code in codes]
    errors = [code @ W_dec[: code.shape[1]] + b_dec - target for code in bent]
    squared = [error.square().sum() for error in errors]
    total = sum(stage.weight * s for stage, s in zip(plan.stages, squared, strict=True))
    penalty = plan.sparsity.penalty(weights, found, target, price) / variance
    loss = torch.as_tensor(total) / (len(z) * variance) + penalty
    aux_loss = loss.new_zeros(())
    if dead is not None and len(dead):
        residual = -errors[plan.main]
        if plan.aux_k:
            spread = None if whole is None else whole.spread * len(z) / whole.n
            aux_loss = auxk_loss(found.scores, residual, W_dec, dead, plan.aux_k, spread)
            loss = loss + plan.aux_alpha * aux_loss
        if plan.ghost:
            scale = None if whole is None else whole.ghost_scale
            ghost = ghost_loss(found.scores, residual, W_dec, dead, scale) / (len(z) * variance)
            loss, aux_loss = loss + ghost, aux_loss + ghost
    code = codes[plan.main].detach()
    return DenseLoss(loss, squared[plan.main].detach(), aux_loss.detach(), code, penalty.detach())


def _dense(
    plan: Plan, weights: Weights, z: Float[Tensor, "batch d_in"], cutoff: Float[Tensor, ""] | None
) -> Dense:
    """Scores and code of a batch; or of a part of one, where it is known what that keeps."""
    if cutoff is None:
        return plan.sparsity.dense(weights, z, training=True)
    known = dataclasses.replace(weights, extra={**weights.extra, "threshold": cutoff})
    return plan.sparsity.dense(known, z, training=False)


def _code(plan: Plan, stage: Stage, weights: Weights, found: Dense) -> Float[Tensor, "batch width"]:
    code = found.code
    if stage.k is not None:
        other = plan.sparsity.with_k(stage.k)
        code = other.activate(weights, found.scores, training=True)
    return code if stage.width is None else code[:, : stage.width]


def _capped(code: Float[Tensor, "batch width"], cap: float | None) -> Float[Tensor, "batch width"]:
    return code if cap is None else cap * (code / cap).tanh()


def auxk_loss(
    scores: Float[Tensor, "batch n_latents"],
    residual: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "n_latents d_out"],
    dead: Int[Tensor, " dead"],
    k: int,
    spread: Float[Tensor, ""] | None = None,
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
        spread: what is divided by, where it is not to be measured on `residual` itself.

    Returns:
        The loss, before its weight; 0 where nothing is left over.
    """
    target = residual.detach()
    if spread is None:
        spread = (target - target.mean(dim=0)).square().sum()
    if spread == 0:
        return spread
    of_dead = scores[:, dead]
    code = torch.where(largest(of_dead, min(k, len(dead))), of_dead, 0).relu()
    return (target - code @ W_dec[dead]).square().sum() / spread


def ghost_loss(
    scores: Float[Tensor, "batch n_latents"],
    residual: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "n_latents d_out"],
    dead: Int[Tensor, " dead"],
    scale: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Σ‖g − e‖² of ghost gradients, rescaled to Σ‖e‖²; see `GhostGradients`.

    Args:
        scores: pre-activations.
        residual: e = z − ẑ; its gradient is not used.
        W_dec: decoder rows.
        dead: which latents count as dead.
        scale: what is multiplied by, where it is not to be measured on these vectors alone.

    Returns:
        The loss: its value is Σ‖e‖², its gradient that of the ghosts.
    """
    error = ghost_error(scores, residual, W_dec, dead)
    if scale is None:
        scale = residual.detach().square().sum() / error.detach().clamp(min=1e-30)
    return error * scale


def ghost_error(
    scores: Float[Tensor, "batch n_latents"],
    residual: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "n_latents d_out"],
    dead: Int[Tensor, " dead"],
) -> Float[Tensor, ""]:
    """Σ‖g − e‖² of ghosts g that have half the norm of e; arguments as of `ghost_loss`."""
    target = residual.detach()
    # A factor for each vector is scaled away below; without it the exponential could overflow.
    of_dead = scores[:, dead]
    ghosts = (of_dead - of_dead.detach().amax(dim=1, keepdim=True)).exp() @ W_dec[dead]
    norms = target.norm(dim=1, keepdim=True)
    scale = norms / (2 * ghosts.detach().norm(dim=1, keepdim=True)).clamp(min=1e-30)
    error: Tensor = (ghosts * scale - target).square().sum()
    return error


def default_auxk(d_in: int) -> int:
    """The power of two nearest to half the width, the larger of two: the paper's rule of thumb."""
    half = max(d_in / 2, 1)
    below = 1 << (int(half).bit_length() - 1)
    return below if half - below < 2 * below - half else 2 * below
