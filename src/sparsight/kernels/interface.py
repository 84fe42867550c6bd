"""The interface of back ends: differentiable functions, and a fused training step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.kernels.plan import AnyPlan

Precision = Literal["float32", "bfloat16", "int8", "float8"]
"""Precision of the product that selects latents; they are then scored in the precision of x."""

MATRICES = ("W_enc", "W_dec")
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


@runtime_checkable
class Backend(Protocol):
    """Differentiable functions; any module that defines them is a back end."""

    def encode_topk(
        self,
        x: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "n_latents d_in"],
        b_enc: Float[Tensor, " n_latents"],
        b_dec: Float[Tensor, " d_in"],
        k: int,
        precision: Precision | None = None,
        *,
        rectify: bool = True,
    ) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
        """Return the k largest of `W_enc (x - b_dec) + b_enc`, at least 0, with all gradients.

        Args:
            x: the vectors.
            W_enc: encoder rows.
            b_enc: encoder bias.
            b_dec: decoder bias, subtracted first.
            k: number of latents per vector.
            precision: precision of the selection; below "float32", more than k are chosen and then
                scored again in the precision of `x`. None leaves it to the back end.
            rectify: False leaves negative values as they are.

        Returns:
            Values and their latents, in an order that the back end chooses.
        """

    def decode_topk(
        self,
        values: Float[Tensor, "batch k"],
        indices: Int[Tensor, "batch k"],
        W_dec: Float[Tensor, "n_latents d_in"],
        b_dec: Float[Tensor, " d_in"],
    ) -> Float[Tensor, "batch d_in"]:
        """Return the sum of the chosen decoder rows, weighted by `values`, plus the bias."""

    def encode_batch_topk(
        self,
        x: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "n_latents d_in"],
        b_enc: Float[Tensor, " n_latents"],
        b_dec: Float[Tensor, " d_in"],
        k: int,
    ) -> tuple[Float[Tensor, " active"], Int[Tensor, " active"], Int[Tensor, " batch_plus_one"]]:
        """Return the k · batch largest scores of all, at least 0, with gradients.

        Returns:
            Values and latents, vector after vector, and the start of each vector's entries.
        """

    def encode_above(
        self,
        x: Float[Tensor, "batch d_in"],
        W_enc: Float[Tensor, "n_latents d_in"],
        b_enc: Float[Tensor, " n_latents"],
        b_dec: Float[Tensor, " d_in"],
        threshold: float,
    ) -> tuple[Float[Tensor, " active"], Int[Tensor, " active"], Int[Tensor, " batch_plus_one"]]:
        """Return all scores that reach a threshold, with gradients, as `encode_batch_topk` does."""

    def decode(
        self,
        values: Float[Tensor, " active"],
        indices: Int[Tensor, " active"],
        starts: Int[Tensor, " batch_plus_one"],
        W_dec: Float[Tensor, "n_latents d_in"],
        b_dec: Float[Tensor, " d_in"],
    ) -> Float[Tensor, "batch d_in"]:
        """Decode as `decode_topk` does, for a code whose rows differ in length."""


class StepFigures(NamedTuple):
    """The measurements of a step, as tensors that stay on the device."""

    squared_error: Float[Tensor, ""]
    """Σ ‖z − ẑ‖² of the SAE's own reconstruction."""

    loss: Float[Tensor, ""]
    """The total loss."""

    aux_loss: Float[Tensor, ""]
    """The auxiliary loss, before its weight; 0 without one."""

    active: Int[Tensor, ""]
    """Number of entries of the code with a positive value."""

    grad_norm: Float[Tensor, ""]
    """Norm of the gradient before clipping."""

    least: Float[Tensor, ""]
    """The smallest positive value in the code; infinity if all are 0."""

    penalty: Float[Tensor, ""] | None = None
    """The sparsity's penalty, as it is in the loss; None if the step computes none."""


def least_positive(values: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Return the smallest positive value; infinity if there is none."""
    return torch.where(values > 0, values, math.inf).amin()


@dataclass(frozen=True)
class Adam:
    """Settings of the optimiser (Kingma & Ba 2015), without weight decay."""

    betas: tuple[float, float]
    eps: float
    max_norm: float | None
    """The gradient is scaled down to this norm; None leaves it as it is."""


class TrainingStep(ABC):
    """A whole training step: select, differentiate, update. The back ends implement it."""

    name: str
    """Name of the back end."""

    precisions: ClassVar[tuple[Precision, ...]]
    """The precisions that its selection supports."""

    variance: float
    """Variance of the target: Σ over dimensions; the unit of the loss."""

    @abstractmethod
    def step(
        self,
        z: Float[Tensor, "batch d_in"],
        *,
        lr: float,
        number: int,
        dead: Int[Tensor, " dead"] | None = None,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> StepFigures:
        """Train on one batch.

        Args:
            z: normalised activations.
            lr: learning rate.
            number: number of the step, from 1, for Adam's bias correction.
            dead: latents that the auxiliary loss may use, ascending.
            target: for a transcoder, the target of the prediction; None is `z`.
        """

    @classmethod
    def check_precision(cls, precision: Precision) -> None:
        """Check that the selection supports a precision.

        Raises:
            ValueError: it does not.
        """
        if precision not in cls.precisions:
            known = ", ".join(cls.precisions)
            raise ValueError(f"{cls.__name__} selects in {known}, not in {precision}.")


class FusedStep(TrainingStep):
    """A training step without autograd: select, differentiate by hand, update latent by latent.

    The gradient of a weight matrix is never held as a whole. Parameters, moments and `since_fired`
    are changed in place. The numbers are the same as with autograd and `torch.optim.Adam`.

    Args:
        parameters: `W_enc`, `b_enc`, `W_dec`, `b_dec`.
        moments: first and second moment of each parameter.
        since_fired: number of vectors since a latent was last active.
        plan: what to minimise.
        adam: the optimiser.
        variance: variance of the activations: Σ over dimensions; the unit of the loss.
        unit_norm: keep decoder rows at norm 1, and remove the gradient's components along them.
        precision: precision of the selection.

    Raises:
        ValueError: the back end does not support that precision.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        moments: Mapping[str, tuple[Tensor, Tensor]],
        since_fired: Int[Tensor, " n_latents"],
        plan: AnyPlan,
        adam: Adam,
        *,
        variance: float,
        unit_norm: bool,
        precision: Precision,
    ) -> None:
        self.check_precision(precision)
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (
            parameters[name].detach() for name in PARAMETERS
        )
        self.n_latents, self.d_in = self.W_enc.shape
        self.moments = moments
        self.since_fired = since_fired
        self.plan = plan
        self.adam = adam
        self.variance = variance
        self.unit_norm = unit_norm
        self.precision: Precision = precision
        self._versions: tuple[int, ...] = ()

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
        """See `TrainingStep.step`.

        Raises:
            ValueError: there is a `target`; fused steps do not train transcoders.
        """
        if target is not None:
            raise ValueError(f"{type(self).__name__} does not train transcoders.")
        if self._versions != self._versions_now():
            self._copy_encoder()  # the encoder was changed elsewhere
        figures = self._step(z, lr, number, dead)
        self._versions = self._versions_now()
        return figures

    @abstractmethod
    def _step(
        self,
        z: Float[Tensor, "batch d_in"],
        lr: float,
        number: int,
        dead: Int[Tensor, " dead"] | None,
    ) -> StepFigures:
        """Perform the back end's own part of `step`."""

    @abstractmethod
    def _copy_encoder(self) -> None:
        """Renew the copy of the encoder in low precision; a step keeps it up to date."""

    def _versions_now(self) -> tuple[int, ...]:
        return (self.W_enc._version, self.b_enc._version)

    def own_values(self, values: Float[Tensor, " entries"], n: int) -> Float[Tensor, " own"]:
        """Return the values of the SAE's own code, without those that a larger k adds."""
        if self.plan.larger_k:
            return values.view(n, -1)[:, : self.plan.k].flatten()
        return values

    def stage_weights(self, n_vectors: int) -> list[float]:
        """Return the factors of x̂ − x in the gradient of the loss, stage by stage."""
        return [2 * weight / (n_vectors * self.variance) for weight in self.plan.weights]

    def stage_ends(
        self, starts: Int[Tensor, " batch_plus_one"], latents: Int[Tensor, " entries"]
    ) -> Int[Tensor, "batch stages"]:
        """Return the end of each stage of each vector's entries.

        Args:
            starts: the start of each vector's entries.
            latents: latents of the entries: ascending in each vector, or the k strongest first.
        """
        plan = self.plan
        if plan.larger_k:
            return torch.stack([starts[:-1] + plan.k, starts[1:]], dim=1)
        if not plan.widths:
            return starts[1:, None].contiguous()
        rows = torch.arange(len(starts) - 1, device=starts.device)
        of_entries = torch.repeat_interleave(rows, starts.diff(), output_size=len(latents))
        keys = of_entries * self.n_latents + latents
        limits = torch.tensor(plan.widths, device=starts.device)
        return torch.searchsorted(keys, rows[:, None] * self.n_latents + limits)

    def residual(
        self, errors: Float[Tensor, "stages batch d_in"], weights: list[float]
    ) -> Float[Tensor, "batch d_in"]:
        """Return z − ẑ of the SAE's own reconstruction.

        `errors` are weighted, and each includes those of later stages.
        """
        stage = self.plan.main
        own = errors[stage]
        if stage + 1 < len(weights):
            own = own - errors[stage + 1]
        return own / -weights[stage]
