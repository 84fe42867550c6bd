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
"""Entries of a code that plain autograd holds at a time, if a batch can be split."""

Part = tuple[Float[Tensor, "_ d_in"], Float[Tensor, "_ d_out"]]
"""Vectors of a batch, and the targets of their reconstruction."""


class LossParts(NamedTuple):
    """The loss of a batch and its parts."""

    loss: Float[Tensor, ""]
    """The total loss, which is differentiated."""

    squared_error: Float[Tensor, ""]
    """Σ ‖z − ẑ‖² of the SAE's own reconstruction."""

    aux_loss: Float[Tensor, ""]
    """The loss of the dead latents, before its weight; 0 if none are dead or nothing is left."""

    code: Float[Tensor, "batch n_latents"]
    """The SAE's own code, before a soft cap: thresholds are compared with scores."""

    penalty: Float[Tensor, ""]
    """The sparsity's penalty, as it is in the loss."""


@runtime_checkable
class Loss(Protocol):
    """The interface of a loss for `DenseStep`."""

    @property
    def splits(self) -> bool:
        """Whether the loss of a batch can be computed from those of its parts."""

    @property
    def decoder(self) -> Tensor:
        """The decoder; a step removes the gradient's components along its rows."""

    def of_batch(
        self, parts: Sequence[Part], number: int, dead: Tensor | None, variance: float
    ) -> Callable[[Tensor, Tensor], LossParts]:
        """Return the loss of one part of a batch, as a function of its vectors and its target.

        The mean of the parts' losses, weighted by their numbers of vectors, is the batch's loss.

        Args:
            parts: all parts of the batch.
            number: number of the step, from 1.
            dead: latents that may learn from the residual.
            variance: variance of the target: Σ over dimensions.
        """

    def constrain(self) -> None:
        """Restore the parameters' constraints after an update."""


class DenseStep(TrainingStep):
    """See `TrainingStep`; a large batch is split, and its loss is the mean of its parts' losses.

    Args:
        parameters: everything that learns; it gets gradients.
        moments: first and second moment of each parameter; changed in place.
        since_fired: number of vectors since a latent was last active; changed in place.
        loss: what to minimise.
        adam: the optimiser.
        variance: variance of the target: Σ over dimensions; the unit of the loss.
        unit_norm: remove the gradient's components along the decoder's rows.
        precision: precision of the selection: "float32".
        lr_factors: multiples of the learning rate for parameters.

    Raises:
        ValueError: another precision is requested.
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
        """Compute the gradients; return the measurements, and which latents fired."""
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
                part = loss_of(inputs, target)
                (share * part.loss).backward()
            active = part.code != 0
            fired |= active.any(dim=0)
            least = torch.minimum(least, least_positive(part.code))
            parts = (
                part.squared_error, share * part.loss.detach(), share * part.aux_loss,
                active.sum(), share * part.penalty,
            )  # fmt: skip
            sums += torch.stack([each.double() for each in parts])
        squared_error, loss, aux_loss, n_active, penalty = sums
        unknown = squared_error.new_zeros(())
        return StepFigures(
            squared_error, loss, aux_loss, n_active.long(), unknown, least, penalty
        ), fired
