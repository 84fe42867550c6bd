"""The interface of sparsities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, NamedTuple, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsight.errors import UserError
from sparsight.sae.code import SparseCode


@dataclass(frozen=True)
class Weights:
    """The tensors that determine a code.

    Attributes:
        W_enc: encoder rows.
        b_enc: their bias.
        W_dec: decoder rows.
        b_dec: their bias.
        centre: the vector that the encoder subtracts: `b_dec`, or zeros.
        extra: additional tensors of the kind of sparsity, by name.
    """

    W_enc: Float[Tensor, "n_latents d_in"]
    b_enc: Float[Tensor, " n_latents"]
    W_dec: Float[Tensor, "n_latents d_out"]
    b_dec: Float[Tensor, " d_out"]
    centre: Float[Tensor, " d_in"]
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def scores(self, z: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch n_latents"]:
        """Return the pre-activations W_enc (z − centre) + b_enc."""
        return (z - self.centre) @ self.W_enc.T + self.b_enc


class Dense(NamedTuple):
    """A code as a matrix, differentiable."""

    scores: Float[Tensor, "batch n_latents"]
    """Pre-activations."""

    code: Float[Tensor, "batch n_latents"]
    """Activations; 0 for latents that are not active."""


class Sparsity(ABC):
    """How active latents are chosen; subclasses are frozen dataclasses that hold the settings."""

    buffers: ClassVar[frozenset[str]] = frozenset()
    """The tensors of `start` that are not parameters."""

    of_training: ClassVar[frozenset[str]] = frozenset()
    """Settings that affect how an SAE is trained, not what it computes."""

    lr_factors: ClassVar[Mapping[str, float]] = {}
    """Multiples of the learning rate for tensors of `start`."""

    has_encoder: ClassVar[bool] = True
    """Whether codes are computed from `W_enc` and `b_enc`."""

    per_batch: ClassVar[bool] = False
    """Whether training chooses among the latents of a whole batch. Outside training, a threshold
    replaces the batch; training estimates it as the mean of the batches' smallest activations."""

    several_k: ClassVar[bool] = False
    """Whether training may reconstruct with several k at once; see `with_k`."""

    @property
    def places(self) -> int:
        """Its k; 0 if it has none."""
        return getattr(self, "k", 0)

    @property
    def fusable(self) -> bool:
        """Whether the fused training steps, without autograd, support it."""
        return False

    @property
    def separable(self) -> bool:
        """Whether the loss of a batch is the mean of its vectors' losses."""
        return True

    def start(self, n_latents: int) -> dict[str, Tensor]:
        """Return the initial values of its tensors other than the weights."""
        return {}

    def with_k(self, k: int) -> Self:
        """Return the same sparsity with another k, if it has one."""
        return replace(self, k=k)  # type: ignore[type-var]

    def shifted(
        self, extra: Mapping[str, Tensor], shift: Float[Tensor, " n_latents"]
    ) -> dict[str, Tensor]:
        """Return the tensors of `start` that must change to keep the code if every W_enc z becomes
        W_enc z + `shift`; `b_enc` is not among them."""
        return {}

    def check_width(self, n_latents: int) -> None:
        """Check that it works with this number of latents.

        Raises:
            UserError: it does not.
        """
        k = getattr(self, "k", None)
        if k is not None and k > n_latents:
            raise UserError(f"sparsity.k is {k}, but there are only {n_latents} latents.")

    @abstractmethod
    def encode(
        self, weights: Weights, z: Float[Tensor, "batch d_in"], *, training: bool = False
    ) -> SparseCode:
        """Return the code, with gradients, and without a dense tensor if possible.

        Args:
            weights: weights of the SAE.
            z: activations in normalised space.
            training: whether to choose among the latents of the whole batch, if the kind does so.
        """

    @abstractmethod
    def activate(
        self,
        weights: Weights,
        scores: Float[Tensor, "batch n_latents"],
        *,
        training: bool = False,
    ) -> Float[Tensor, "batch n_latents"]:
        """Return the code of scores, dense, in plain autograd."""

    def scores(
        self, weights: Weights, z: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch n_latents"]:
        """Return the pre-activations, by which active latents are chosen."""
        return weights.scores(z)

    def dense(
        self, weights: Weights, z: Float[Tensor, "batch d_in"], *, training: bool = False
    ) -> Dense:
        """Return scores and code, dense, in plain autograd."""
        scores = self.scores(weights, z)
        return Dense(scores, self.activate(weights, scores, training=training))

    def penalty(
        self,
        weights: Weights,
        found: Dense,
        target: Float[Tensor, "batch d_out"],
        share: float = 1.0,
    ) -> Float[Tensor, ""]:
        """Return the training penalty on the code, averaged over vectors, in units of ‖z − ẑ‖².

        Args:
            weights: weights of the SAE.
            found: the code.
            target: the target of the reconstruction.
            share: share of the price to apply while it rises; it does not affect error terms.
        """
        return found.code.new_zeros(())

    def constrain(self, weights: Weights) -> None:  # noqa: B027  # most have nothing to keep up
        """Restore the constraints of tensors, in place, after a step of the optimiser."""

    def describe(self, *, training: bool = True) -> str:
        """Return its name and settings, for people.

        Args:
            training: False leaves out `of_training`, which other projects' files do not hold.
        """
        left_out = frozenset() if training else self.of_training
        values = [
            f"{each.name} = {getattr(self, each.name)}"
            for each in fields(self)  # type: ignore[arg-type]
            if each.name not in left_out
        ]
        return ", ".join([type(self).__name__, *values])


def largest(scores: Float[Tensor, "batch n"], k: int) -> Bool[Tensor, "batch n"]:
    """Return the mask of the k largest of each row."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(1, scores.topk(k, dim=1).indices, True)


def largest_of_batch(scores: Float[Tensor, "batch n"], k: int) -> Bool[Tensor, "batch n"]:
    """Return the mask of the k · batch largest of all."""
    kept = torch.zeros_like(scores, dtype=torch.bool).flatten()
    kept[scores.flatten().topk(k * len(scores)).indices] = True
    return kept.view_as(scores)


def check_at_least(value: float | None, least: float, name: str) -> None:
    """Raise a `UserError` if a setting is below its minimum; None is allowed."""
    if value is not None and value < least:
        raise UserError(f"{name} is {value}; it must be at least {least:g}.")


def check_positive(value: float | None, name: str) -> None:
    """Raise a `UserError` if a setting is not positive; None is allowed."""
    if value is not None and value <= 0:
        raise UserError(f"{name} is {value}; it must be positive.")
