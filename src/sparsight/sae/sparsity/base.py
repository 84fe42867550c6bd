"""What every kind of sparsity offers."""

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
    """The tensors that a code is computed from.

    Attributes:
        W_enc: encoder rows.
        b_enc: their bias.
        W_dec: decoder rows.
        b_dec: their bias.
        centre: what the encoder subtracts from a vector: `b_dec`, or zeros.
        extra: what the kind of sparsity has beside these, by name.
    """

    W_enc: Float[Tensor, "n_latents d_in"]
    b_enc: Float[Tensor, " n_latents"]
    W_dec: Float[Tensor, "n_latents d_out"]
    b_dec: Float[Tensor, " d_out"]
    centre: Float[Tensor, " d_in"]
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def scores(self, z: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch n_latents"]:
        """Pre-activations: W_enc (z − centre) + b_enc."""
        return (z - self.centre) @ self.W_enc.T + self.b_enc


class Dense(NamedTuple):
    """A code as a matrix, differentiable."""

    scores: Float[Tensor, "batch n_latents"]
    """Pre-activations."""

    code: Float[Tensor, "batch n_latents"]
    """Activations; 0 where a latent is not active."""


class Sparsity(ABC):
    """How few latents a vector may use; subclasses are frozen dataclasses, the part's settings."""

    buffers: ClassVar[frozenset[str]] = frozenset()
    """Which of `start`'s tensors are no parameters."""

    of_training: ClassVar[frozenset[str]] = frozenset()
    """Settings that say how an SAE is trained, not what it computes."""

    lr_factors: ClassVar[Mapping[str, float]] = {}
    """Tensors of `start` that learn at a multiple of the learning rate."""

    has_encoder: ClassVar[bool] = True
    """Whether codes are computed from `W_enc` and `b_enc`."""

    per_batch: ClassVar[bool] = False
    """Whether training chooses among the latents of a whole batch. In use a threshold takes the
    batch's place, which training learns: the mean of the batches' smallest activations."""

    several_k: ClassVar[bool] = False
    """Whether training may reconstruct with several k at once; see `with_k`."""

    @property
    def places(self) -> int:
        """Its k; 0 where it has none."""
        return getattr(self, "k", 0)

    @property
    def fusable(self) -> bool:
        """Whether the training steps without autograd compute it."""
        return False

    @property
    def separable(self) -> bool:
        """Whether the loss of a batch is the mean of its vectors' losses."""
        return True

    def start(self, n_latents: int) -> dict[str, Tensor]:
        """The tensors that it has beside the weights, as training begins."""
        return {}

    def with_k(self, k: int) -> Self:
        """The same with another k, where it has one."""
        return replace(self, k=k)  # type: ignore[type-var]

    def shifted(
        self, extra: Mapping[str, Tensor], shift: Float[Tensor, " n_latents"]
    ) -> dict[str, Tensor]:
        """The tensors of `start` that change where every W_enc z becomes W_enc z + `shift`, so that
        the code stays; `b_enc` is not among them."""
        return {}

    def check_width(self, n_latents: int) -> None:
        """Make sure that it can be had with so many latents.

        Raises:
            UserError: it cannot.
        """
        k = getattr(self, "k", None)
        if k is not None and k > n_latents:
            raise UserError(f"sparsity.k is {k}, more than the {n_latents} latents.")

    @abstractmethod
    def encode(
        self, weights: Weights, z: Float[Tensor, "batch d_in"], *, training: bool = False
    ) -> SparseCode:
        """The code, without a dense tensor of it where that can be avoided; with gradients.

        Args:
            weights: of the SAE.
            z: activations in normalised space.
            training: whether the batch as a whole may be looked at.
        """

    @abstractmethod
    def activate(
        self,
        weights: Weights,
        scores: Float[Tensor, "batch n_latents"],
        *,
        training: bool = False,
    ) -> Float[Tensor, "batch n_latents"]:
        """The code of scores, dense, in plain autograd."""

    def dense(
        self, weights: Weights, z: Float[Tensor, "batch d_in"], *, training: bool = False
    ) -> Dense:
        """Scores and code, dense, in plain autograd."""
        scores = weights.scores(z)
        return Dense(scores, self.activate(weights, scores, training=training))

    def penalty(
        self,
        weights: Weights,
        found: Dense,
        target: Float[Tensor, "batch d_out"],
        share: float = 1.0,
    ) -> Float[Tensor, ""]:
        """What training pays for the code, a vector's mean, in the unit of ‖z − ẑ‖².

        Args:
            weights: of the SAE.
            found: the code.
            target: what the SAE is to give.
            share: of the price, while it rises; errors are not prices.
        """
        return found.code.new_zeros(())

    def constrain(self, weights: Weights) -> None:  # noqa: B027  # most have nothing to keep up
        """Bring tensors back to where they make sense, in place, after a step of the optimiser."""

    def describe(self, *, training: bool = True) -> str:
        """Its name and settings, for people.

        Args:
            training: False leaves out `of_training`, which a foreign checkpoint does not tell.
        """
        left_out = frozenset() if training else self.of_training
        values = [
            f"{each.name} = {getattr(self, each.name)}"
            for each in fields(self)  # type: ignore[arg-type]
            if each.name not in left_out
        ]
        return ", ".join([type(self).__name__, *values])


def largest(scores: Float[Tensor, "batch n"], k: int) -> Bool[Tensor, "batch n"]:
    """Which are the k largest of each row."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(1, scores.topk(k, dim=1).indices, True)


def largest_of_batch(scores: Float[Tensor, "batch n"], k: int) -> Bool[Tensor, "batch n"]:
    """Which are the k · batch largest of all."""
    kept = torch.zeros_like(scores, dtype=torch.bool).flatten()
    kept[scores.flatten().topk(k * len(scores)).indices] = True
    return kept.view_as(scores)


def check_at_least(value: float | None, least: float, name: str) -> None:
    """Raise a `UserError` if a setting is below what it may be; None may be anything."""
    if value is not None and value < least:
        raise UserError(f"{name} is {value}; it must be at least {least:g}.")


def check_positive(value: float | None, name: str) -> None:
    """Raise a `UserError` if a setting is not positive; None may be anything."""
    if value is not None and value <= 0:
        raise UserError(f"{name} is {value}; it must be positive.")
