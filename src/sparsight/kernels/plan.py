"""The plan: what training minimises."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

SEED_STRIDE = 0x9E3779B97F4A7C15
"""Distance between the random seeds of two runs: odd and large, so that their draws differ."""


@runtime_checkable
class Choice(Protocol):
    """What the kernels need to know about a sparsity."""

    @property
    def places(self) -> int:
        """The number of active latents per vector; 0 if there is no fixed number."""

    @property
    def per_batch(self) -> bool:
        """Whether it chooses the k · batch strongest of a whole batch, not k of each vector."""


@runtime_checkable
class DeadLoss(Protocol):
    """What the kernels need to know about a loss for the dead latents."""

    @property
    def weight(self) -> float:
        """The weight of that loss."""

    @property
    def aux_k(self) -> int:
        """The number of dead latents per vector that model the residual."""


S = TypeVar("S", bound=Choice, covariant=True)
R = TypeVar("R", bound=DeadLoss, covariant=True)


@dataclass(frozen=True)
class Stage:
    """One of several reconstructions from a code."""

    weight: float = 1.0
    """Weight of its error."""

    width: int | None = None
    """Number of latents that it may use, from the first of the dictionary; None is all."""

    k: int | None = None
    """The k of its code, if it is not the SAE's own."""


@dataclass(frozen=True)
class Plan(Generic[S, R]):
    """What training minimises: Σ_s weight_s ‖z − ẑ_s‖² / (batch · variance), the sparsity's penalty
    in the same unit, and the loss of the dead latents.

    The fused steps compute plans whose reconstructions are nested: stages by rank (`larger_k`) or
    by prefix (`widths`), each of which uses a part of the code that the next one contains.
    """

    sparsity: S
    """Sparsity of the SAE."""

    stages: tuple[Stage, ...] = (Stage(),)
    """Its reconstructions."""

    main: int = 0
    """Index of the SAE's own reconstruction."""

    random_widths: int | None = None
    """Number of prefixes to draw for each step, instead of `stages`."""

    soft_cap: float | None = None
    """Soft cap of activations, as in `SAEConfig`."""

    remedy: R | None = None
    """Remedy for dead latents, if it has a loss."""

    @property
    def k(self) -> int:
        """The number of active latents per vector in the SAE's own code."""
        return self.sparsity.places

    @property
    def per_batch(self) -> bool:
        """Whether to select the k · batch largest of the whole batch, instead of k per vector."""
        return self.sparsity.per_batch

    @property
    def larger_k(self) -> int | None:
        """The k of a second code, which adds latents to the first (Multi-TopK)."""
        return self.stages[-1].k

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of reconstructions from prefixes, ascending; the last is all latents."""
        return tuple(stage.width for stage in self.stages if stage.width is not None)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights of the reconstructions."""
        return tuple(stage.weight for stage in self.stages)

    @property
    def n_stages(self) -> int:
        """The number of reconstructions."""
        return len(self.stages)

    @property
    def selected(self) -> int:
        """The number of latents to select per vector."""
        return self.larger_k or self.k

    @property
    def aux_k(self) -> int:
        """The number of dead latents per vector that model the residual; 0 is none."""
        return 0 if self.remedy is None else self.remedy.aux_k

    @property
    def aux_alpha(self) -> float:
        """The weight of the dead latents' loss."""
        return 0.0 if self.remedy is None else self.remedy.weight

    def at(self, step: int, n_latents: int, seed: int) -> Plan[S, R]:
        """Return the plan of a step, in which random prefixes are drawn.

        Widths w < n have probabilities proportional to 1 / w.
        """
        if self.random_widths is None:
            return self
        # One stream of draws per run; not the built-in hash, which may differ between Pythons.
        generator = torch.Generator().manual_seed((seed * SEED_STRIDE + step) % 2**63)
        drawn = torch.rand(self.random_widths - 1, generator=generator, dtype=torch.float64)
        widths = sorted({*(drawn * math.log(n_latents)).exp().long().tolist(), n_latents})
        stages = tuple(Stage(1 / len(widths), width=width) for width in widths)
        return dataclasses.replace(self, stages=stages, main=len(stages) - 1, random_widths=None)


AnyPlan = Plan[Any, Any]
"""A plan with any sparsity, for the kernels."""
