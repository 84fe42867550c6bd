"""What training minimises."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

SEED_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of the draws of two runs: odd and large, so that theirs do not coincide."""


@runtime_checkable
class Choice(Protocol):
    """What the kernels ask of a sparsity."""

    @property
    def places(self) -> int:
        """Active latents per vector; 0 where there is no such number."""

    @property
    def per_batch(self) -> bool:
        """Whether it chooses the k · batch strongest of a whole batch, not k of each vector."""


@runtime_checkable
class DeadLoss(Protocol):
    """What the kernels ask of a loss for the dead latents."""

    @property
    def weight(self) -> float:
        """Of that loss."""

    @property
    def aux_k(self) -> int:
        """Dead latents per vector that model the residual."""


S = TypeVar("S", bound=Choice, covariant=True)
R = TypeVar("R", bound=DeadLoss, covariant=True)


@dataclass(frozen=True)
class Stage:
    """One of several reconstructions from a code."""

    weight: float = 1.0
    """Of its error."""

    width: int | None = None
    """Latents of the dictionary that it may use, from the first on; None is all."""

    k: int | None = None
    """Of a code that has another k than the SAE's own."""


@dataclass(frozen=True)
class Plan(Generic[S, R]):
    """What training minimises: Σ_s weight_s ‖z − ẑ_s‖² / (batch · variance), the sparsity's penalty
    in the same unit, and the loss of the dead latents.

    The fused steps compute plans whose reconstructions are nested: stages by rank (`larger_k`) or
    by prefix (`widths`), each of which uses a part of the code that the next one contains.
    """

    sparsity: S
    """Of the SAE."""

    stages: tuple[Stage, ...] = (Stage(),)
    """Its reconstructions."""

    main: int = 0
    """Which of them is the SAE's own."""

    random_widths: int | None = None
    """Prefixes that are drawn for each step, instead of `stages`."""

    soft_cap: float | None = None
    """As in `SAEConfig`."""

    remedy: R | None = None
    """For dead latents, if it has a loss."""

    @property
    def k(self) -> int:
        """Active latents per vector, of the SAE's own code."""
        return self.sparsity.places

    @property
    def per_batch(self) -> bool:
        """The k · batch largest of the whole batch, instead of k of each vector."""
        return self.sparsity.per_batch

    @property
    def larger_k(self) -> int | None:
        """Of a second code, with the same latents and more (Multi-TopK)."""
        return self.stages[-1].k

    @property
    def widths(self) -> tuple[int, ...]:
        """A reconstruction from the first so many latents each, rising; the last is all of them."""
        return tuple(stage.width for stage in self.stages if stage.width is not None)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the reconstructions."""
        return tuple(stage.weight for stage in self.stages)

    @property
    def n_stages(self) -> int:
        """Number of reconstructions."""
        return len(self.stages)

    @property
    def selected(self) -> int:
        """Latents per vector that take part."""
        return self.larger_k or self.k

    @property
    def aux_k(self) -> int:
        """Dead latents per vector that model the residual; 0 is none."""
        return 0 if self.remedy is None else self.remedy.aux_k

    @property
    def aux_alpha(self) -> float:
        """Weight of their loss."""
        return 0.0 if self.remedy is None else self.remedy.weight

    def at(self, step: int, n_latents: int, seed: int) -> Plan[S, R]:
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


AnyPlan = Plan[Any, Any]
"""A plan of any sparsity, for the kernels."""
