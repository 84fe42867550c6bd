"""The loss that training minimises, in plain autograd: slow, but verifiable by reading."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.kernels.dense_step import LossParts, Part
from sparsight.kernels.plan import Plan, Stage
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.remedies import LeftOver, Remedy, Residuals
from sparsight.sae.sparsity import Dense, Sparsity, Weights

SAEPlan = Plan[Sparsity, Remedy]
"""The plan of an SAE's loss."""


class Whole(NamedTuple):
    """What the loss of a part of a batch needs to know about the whole batch."""

    cutoff: Float[Tensor, ""] | None
    """The smallest value that BatchTopK keeps; None for other sparsities."""

    residuals: Residuals
    """Residuals for the remedy; 0 if no dead latent needs them."""


@torch.no_grad()
def whole_batch(
    weights: Weights,
    parts: Sequence[tuple[Float[Tensor, "_ d_in"], Float[Tensor, "_ d_out"]]],
    plan: SAEPlan,
    variance: float,
    dead: Int[Tensor, " dead"] | None,
) -> Whole:
    """Measure a batch, part by part, whose dense code would be too large for memory.

    Args:
        weights: weights of the SAE.
        parts: activations in normalised space and their targets.
        plan: what to minimise.
        variance: variance of the target: Σ over dimensions.
        dead: latents that may learn from the residual.
    """
    n = sum(len(z) for z, _ in parts)
    b_dec = weights.b_dec
    cutoff = None
    if plan.sparsity.per_batch:
        z = torch.cat([z for z, _ in parts])
        values = plan.sparsity.encode(weights, z, training=True).values
        # Scores of parts are rounded differently; the batch's last latent must not be lost.
        cutoff = values.min() * (1 - 2**-20) if len(values) else b_dec.new_full((), math.inf)
    summed = torch.zeros_like(b_dec, dtype=torch.float64)
    squared, measured = b_dec.new_zeros(2, dtype=torch.float64)
    if plan.remedy is not None and dead is not None and len(dead):
        for z, target in parts:
            dense = _scored(plan, weights, z, cutoff)
            code = _capped(_code(plan, plan.stages[plan.main], weights, dense), plan.soft_cap)
            residual = target - code @ weights.W_dec[: code.shape[1]] - b_dec
            summed += residual.double().sum(dim=0)
            squared += residual.double().square().sum()
            left = LeftOver(dense.scores, residual, weights.W_dec, dead, variance)
            measured += plan.remedy.measure(left).double()
    spread = (squared - summed.square().sum() / n).clamp(min=0).to(b_dec.dtype)
    return Whole(cutoff, Residuals(n, squared, spread, measured))


def dense_loss(
    weights: Weights,
    z: Float[Tensor, "batch d_in"],
    plan: SAEPlan,
    variance: float,
    dead: Int[Tensor, " dead"] | None = None,
    *,
    target: Float[Tensor, "batch d_out"] | None = None,
    price: float = 1.0,
    whole: Whole | None = None,
) -> LossParts:
    """Return the loss of a `Plan` with a dense code, differentiable.

    Reconstruction: Gao et al. 2024, section 2.3; Multi-TopK: section 6.2 and appendix B; prefixes:
    Bussmann et al. 2025, "Learning multi-level features with Matryoshka SAEs".

    Args:
        weights: weights of the SAE.
        z: activations in normalised space.
        plan: what to minimise.
        variance: variance of the target: Σ over dimensions.
        dead: latents that may learn from the residual.
        target: what to reconstruct; None is `z`. For a transcoder with a skip connection, without
            that connection's part.
        price: share of the sparsity's penalty to apply.
        whole: measures of the batch of which `z` is a part; the mean of the parts' losses, weighted
            by their numbers of vectors, is then the loss of the batch.
    """
    target = z if target is None else target
    W_dec, b_dec = weights.W_dec, weights.b_dec
    dense = _scored(plan, weights, z, None if whole is None else whole.cutoff)
    codes = [_code(plan, stage, weights, dense) for stage in plan.stages]
    bent = [_capped(code, plan.soft_cap) for code in codes]
    errors = [code @ W_dec[: code.shape[1]] + b_dec - target for code in bent]
    squared = [error.square().sum() for error in errors]
    total = sum(stage.weight * s for stage, s in zip(plan.stages, squared, strict=True))
    penalty = plan.sparsity.penalty(weights, dense, target, price) / variance
    loss = torch.as_tensor(total) / (len(z) * variance) + penalty
    aux_loss = loss.new_zeros(())
    if plan.remedy is not None and dead is not None and len(dead):
        left = LeftOver(dense.scores, -errors[plan.main], W_dec, dead, variance)
        aux_loss = plan.remedy.loss(left, None if whole is None else whole.residuals)
        loss = loss + plan.remedy.weight * aux_loss
    code = codes[plan.main].detach()
    return LossParts(loss, squared[plan.main].detach(), aux_loss.detach(), code, penalty.detach())


def _scored(
    plan: SAEPlan,
    weights: Weights,
    z: Float[Tensor, "batch d_in"],
    cutoff: Float[Tensor, ""] | None,
) -> Dense:
    """Return scores and code of a batch, or of a part of one if the batch's cutoff is known."""
    if cutoff is None:
        return plan.sparsity.dense(weights, z, training=True)
    known = dataclasses.replace(weights, extra={**weights.extra, "threshold": cutoff})
    return plan.sparsity.dense(known, z, training=False)


def _code(
    plan: SAEPlan, stage: Stage, weights: Weights, dense: Dense
) -> Float[Tensor, "batch width"]:
    code = dense.code
    if stage.k is not None:
        other = plan.sparsity.with_k(stage.k)
        code = other.activate(weights, dense.scores, training=True)
    return code if stage.width is None else code[:, : stage.width]


def _capped(code: Float[Tensor, "batch width"], cap: float | None) -> Float[Tensor, "batch width"]:
    return code if cap is None else cap * (code / cap).tanh()


@dataclass(frozen=True)
class SAELoss:
    """The loss of an SAE in training, for the dense step; see `kernels.dense_step.Loss`.

    Args:
        sae: the SAE in training.
        plan: what to minimise.
        warmup: number of steps in which the sparsity's penalty rises from 0.
        seed: of the prefixes that are drawn.
    """

    sae: SparseAutoencoder
    plan: SAEPlan
    warmup: float
    seed: int

    @property
    def splits(self) -> bool:
        """See `Loss.splits`: what is chosen in a whole batch can be known beforehand."""
        return self.plan.sparsity.separable or self.plan.sparsity.per_batch

    @property
    def decoder(self) -> Tensor:
        """See `Loss.decoder`."""
        return self.sae.W_dec

    def constrain(self) -> None:
        """See `Loss.constrain`."""
        self.sae.constrain()

    def of_batch(
        self, parts: Sequence[Part], number: int, dead: Tensor | None, variance: float
    ) -> Callable[[Tensor, Tensor], LossParts]:
        """See `Loss.of_batch`."""
        plan = self.plan.at(number - 1, self.sae.n_latents, self.seed)
        price = min(number / max(self.warmup, 1), 1.0)
        whole = None
        some_dead = dead is not None and len(dead) > 0
        if len(parts) > 1 and (some_dead or not plan.sparsity.separable):
            seen = [(z, self._without_skip(z, target)) for z, target in parts]
            whole = whole_batch(self.sae.weights(), seen, plan, variance, dead)

        def loss_of(z: Tensor, target: Tensor) -> LossParts:
            weights, wanted = self.sae.weights(), self._without_skip(z, target)
            return dense_loss(
                weights, z, plan, variance, dead, target=wanted, price=price, whole=whole
            )

        return loss_of

    def _without_skip(
        self, z: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"]
    ) -> Float[Tensor, "batch d_out"]:
        """Return the target minus the part of a transcoder's skip connection, if it has one."""
        return y - z @ self.sae.W_skip.T if self.sae.config.skip else y
