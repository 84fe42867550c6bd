"""The training step in plain autograd, with a dense code: slow, for every architecture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.kernels.interface import (
    Adam,
    Precision,
    StepFigures,
    TrainingStep,
    least_positive,
)

DENSE_ENTRIES = 2**27
"""Of a code that plain autograd holds at a time, where a batch can be taken in parts."""

Part = tuple[Float[Tensor, "_ d_in"], Float[Tensor, "_ d_out"]]
"""Vectors of a batch, and what they are to be reconstructed as."""


class LossParts(NamedTuple):
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


@runtime_checkable
class Loss(Protocol):
    """What a `DenseStep` differentiates."""

    @property
    def splits(self) -> bool:
        """Whether the loss of a batch can be put together from those of its parts."""

    @property
    def decoder(self) -> Tensor:
        """The rows of which a step takes the gradient's part along them out."""

    def of_batch(
        self, parts: Sequence[Part], number: int, dead: Tensor | None, variance: float
    ) -> Callable[[Tensor, Tensor], LossParts]:
        """The loss of one of some parts of a batch, as a function of its vectors and its target.

        The mean of the parts' losses, by their numbers of vectors, is the batch's.

        Args:
            parts: all of the batch.
            number: of the step, from 1.
            dead: latents that may learn from the residual.
            variance: of the target: Σ over dimensions.
        """

    def constrain(self) -> None:
        """Bring the parameters back to where they may be, after an update."""


class DenseStep(TrainingStep):
    """See `TrainingStep`; a large batch is taken in parts, of whose losses its own is the mean.

    Args:
        parameters: everything that learns; it gets gradients.
        moments: for each its first and second moment; changed in place.
        since_fired: vectors since a latent was last active; changed in place.
        loss: what is minimised.
        adam: the optimiser.
        variance: of the target: Σ over dimensions; the unit of the loss.
        unit_norm: take the gradient's part along the decoder's rows out.
        precision: of the selection: "float32".
        lr_factors: parameters that learn at a multiple of the learning rate.

    Raises:
        ValueError: another precision is asked for.
    """

    precisions = ("float32",)

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        moments: Mapping[str, tuple[Tensor, Tensor]],
        since_fired: Int[Tensor, " n_latents"],
        loss: Loss,
        adam: Adam,
        *,
        variance: float,
        unit_norm: bool,
        precision: Precision = "float32",
        lr_factors: Mapping[str, float] | None = None,
    ) -> None:
        self.check_precision(precision)
        self.name = "dense-float32"
        self.parameters = parameters
        self.since_fired = since_fired
        self.loss = loss
        self.max_norm = math.inf if adam.max_norm is None else adam.max_norm
        self.variance = variance
        self.unit_norm = unit_norm
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in parameters.items():
            groups.setdefault((lr_factors or {}).get(name, 1.0), []).append(parameter)
        self.optimiser = torch.optim.Adam(
            [{"params": each, "factor": factor} for factor, each in groups.items()],
            betas=adam.betas,
            eps=adam.eps,
            fused=True,
        )
        for name, parameter in parameters.items():
            mean, square = moments[name]
            self.optimiser.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": mean,
                "exp_avg_sq": square,
            }

    @torch.no_grad()
    def step(
        self,
        z: Float[Tensor, "batch d_in"],
        *,
        lr: float,
        number: int,
        dead: Int[Tensor, " dead"] | None = None,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> StepFigures:
        """See `TrainingStep.step`."""
        self.optimiser.zero_grad(set_to_none=True)
        figures, fired = self._differentiate(z, z if target is None else target, number, dead)
        W_dec = self.loss.decoder
        if self.unit_norm and W_dec.grad is not None:
            along = (W_dec.grad * W_dec).sum(dim=1, keepdim=True)
            W_dec.grad -= along * W_dec
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_norm)
        for state in self.optimiser.state.values():
            state["step"].fill_(number - 1)
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["factor"]
        self.optimiser.step()
        self.loss.constrain()
        self.since_fired.add_(len(z)).masked_fill_(fired, 0)
        return figures._replace(grad_norm=norm)

    def _differentiate(
        self,
        z: Float[Tensor, "batch d_in"],
        y: Float[Tensor, "batch d_out"],
        number: int,
        dead: Int[Tensor, " dead"] | None,
    ) -> tuple[StepFigures, Tensor]:
        """Fill the gradients; what was measured, and which latents fired."""
        n_latents = len(self.since_fired)
        size = max(1, DENSE_ENTRIES // n_latents) if self.loss.splits else len(z)
        batch = list(zip(z.split(size), y.split(size), strict=True))
        loss_of = self.loss.of_batch(batch, number, dead, self.variance)
        fired = torch.zeros(n_latents, dtype=torch.bool, device=z.device)
        sums = torch.zeros(5, dtype=torch.float64, device=z.device)
        least = torch.full((), math.inf, device=z.device)
        for inputs, target in batch:
            share = len(inputs) / len(z)
            with torch.enable_grad():
                found = loss_of(inputs, target)
                (share * found.loss).backward()
            active = found.code != 0
            fired |= active.any(dim=0)
            least = torch.minimum(least, least_positive(found.code))
            parts = (
                found.squared_error, share * found.loss.detach(), share * found.aux_loss,
                active.sum(), share * found.penalty,
            )  # fmt: skip
            sums += torch.stack([each.double() for each in parts])
        squared_error, loss, aux_loss, n_active, penalty = sums
        unknown = squared_error.new_zeros(())
        return StepFigures(
            squared_error, loss, aux_loss, n_active.long(), unknown, least, penalty
        ), fired
