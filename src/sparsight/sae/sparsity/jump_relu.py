"""JumpReLU: every latent above a threshold of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from sparsight.config import check_types
from sparsight.errors import UserError
from sparsight.kernels import backend
from sparsight.sae.code import SparseCode
from sparsight.sae.sparsity.base import Dense, Sparsity, Weights, check_at_least, check_positive

TANH_SCALE = 4.0


@dataclass(frozen=True)
class JumpReLU(Sparsity):
    """Keep what exceeds the latent's threshold θ_i > 0, unchanged; training adds a penalty.

    The derivatives with respect to θ, which are 0 almost everywhere, are estimated with a
    rectangular kernel of width ε: −(θ / ε) [|s − θ| < ε / 2] for the activation and
    −(1 / ε) [|s − θ| < ε / 2] for the number of active latents (Rajamanoharan et al. 2024,
    "Jumping ahead", section 3 and equations 11 and 12).

    The penalty "l0" is price · L0, or with `target_l0`, price · d (L0 / target − 1)²; "tanh" is
    price · Σ tanh(4 f_i ‖W_dec[i]‖) (Conerly et al. 2025, "Dictionary learning optimization
    techniques", Anthropic's circuits update of January).
    """

    of_training: ClassVar[frozenset[str]] = frozenset(
        {"price", "penalty_kind", "target_l0", "bandwidth", "initial_threshold"}
    )
    lr_factors: ClassVar[Mapping[str, float]] = {"threshold": 10.0}
    # A step of Adam moves each of the d entries of an encoder row, hence the score by many times
    # the learning rate, but the threshold by only the learning rate: it would lag far behind.

    price: float = 1.0
    """Penalty per active latent; the error of a vector z is ‖z − ẑ‖² in normalised space."""

    penalty_kind: Literal["l0", "tanh"] = "l0"
    """What the penalty measures."""

    target_l0: float | None = None
    """Number of active latents per vector to aim for; only with "l0"."""

    bandwidth: float = 0.1
    """Width ε of the kernel that estimates gradients, in units of the pre-activations."""

    initial_threshold: float | None = None
    """Initial threshold θ, in units of the pre-activations. Default: √price, above which a latent
    orthogonal to the others is worth its price; or 0.1 with "tanh", which is flat at √price."""

    def __post_init__(self) -> None:
        check_types(self, "sparsity.")
        check_at_least(self.price, 0, "sparsity.price")
        check_positive(self.target_l0, "sparsity.target_l0")
        check_positive(self.bandwidth, "sparsity.bandwidth")
        check_at_least(self.initial_threshold, 0, "sparsity.initial_threshold")
        if self.target_l0 is not None and self.penalty_kind != "l0":
            raise UserError(
                f"sparsity.target_l0 has no effect with penalty_kind {self.penalty_kind!r}, only "
                "with 'l0'. Leave one out."
            )

    @property
    def separable(self) -> bool:
        """See `Sparsity.separable`."""
        return self.target_l0 is None

    def start(self, n_latents: int) -> dict[str, Tensor]:
        """See `Sparsity.start`; returns the thresholds."""
        initial = self.initial_threshold
        if initial is None:
            initial = 0.1 if self.penalty_kind == "tanh" else math.sqrt(self.price)
        return {"threshold": torch.full((n_latents,), initial)}

    def encode(
        self, weights: Weights, z: Float[Tensor, "batch d_in"], *, training: bool = False
    ) -> SparseCode:
        """See `Sparsity.encode`; the thresholds get no gradient here."""
        threshold = weights.extra["threshold"].detach()
        above, indices, starts = backend().encode_above(
            z, weights.W_enc, weights.b_enc - threshold, weights.centre, 0.0
        )
        # From the excess over the threshold back to the score; equality does not count as active.
        values = torch.where(above > 0, above + threshold[indices], 0)
        return SparseCode.from_ragged(values, indices, starts, len(weights.W_enc))

    def activate(
        self,
        weights: Weights,
        scores: Float[Tensor, "batch n_latents"],
        *,
        training: bool = False,
    ) -> Float[Tensor, "batch n_latents"]:
        """See `Sparsity.activate`."""
        jumped: Tensor = _Jump.apply(scores, weights.extra["threshold"], self.bandwidth)  # type: ignore[no-untyped-call]
        return jumped

    def penalty(
        self,
        weights: Weights,
        found: Dense,
        target: Float[Tensor, "batch d_out"],
        share: float = 1.0,
    ) -> Float[Tensor, ""]:
        """See `Sparsity.penalty`."""
        if self.penalty_kind == "tanh":
            strength = found.code * weights.W_dec.norm(dim=1)
            bounded: Tensor = (TANH_SCALE * strength).tanh().sum(dim=1).mean()
            return share * self.price * bounded
        steps: Tensor = _Step.apply(found.scores, weights.extra["threshold"], self.bandwidth)  # type: ignore[no-untyped-call]
        l0 = steps.sum(dim=1).mean()
        if self.target_l0 is None:
            return share * self.price * l0
        missed: Tensor = (l0 / self.target_l0 - 1).square()
        return share * self.price * target.shape[1] * missed

    @torch.no_grad()
    def constrain(self, weights: Weights) -> None:
        """See `Sparsity.constrain`; thresholds are not negative."""
        weights.extra["threshold"].clamp_(min=0)


class _Jump(Function):
    """s where s > θ and s > 0, else 0."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(scores, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(scores > threshold.clamp(min=0), scores, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        scores, threshold = ctx.saved_tensors
        near = (scores - threshold).abs() < ctx.bandwidth / 2
        of_threshold = torch.where(near, grad, 0).sum(dim=0) * (-threshold / ctx.bandwidth)
        return torch.where(scores > threshold.clamp(min=0), grad, 0), of_threshold, None


class _Step(Function):
    """1 where s > θ, else 0."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(scores, threshold)
        ctx.bandwidth = bandwidth
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        scores, threshold = ctx.saved_tensors
        near = (scores - threshold).abs() < ctx.bandwidth / 2
        return None, torch.where(near, grad, 0).sum(dim=0) / -ctx.bandwidth, None
