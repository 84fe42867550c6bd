"""Actions on the activations of latents or neurons; each is a function of one number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.errors import UserError

Values = float | Sequence[float] | Tensor
"""One number for all chosen latents or neurons, or one for each."""


class Action(ABC):
    """A map from activations f to f′; subclasses are frozen dataclasses of its settings."""

    @property
    @abstractmethod
    def keeps_zero(self) -> bool:
        """Whether 0 stays 0, so that inactive latents can be skipped."""

    @abstractmethod
    def __call__(self, f: Float[Tensor, "*rows chosen"]) -> Float[Tensor, "*rows chosen"]:
        """Return the new activations."""

    def of(self, chosen: Sequence[int], n: int) -> Action:
        """Return the action with settings for the chosen latents or neurons.

        Args:
            chosen: numbers of the latents or neurons that it acts on.
            n: their total number; settings with `n` entries are reduced to the chosen ones.

        Raises:
            UserError: a setting has another number of entries.
        """
        return self


@dataclass(frozen=True)
class Off(Action):
    """f′ = 0."""

    keeps_zero = True

    def __call__(self, f: Float[Tensor, "*rows chosen"]) -> Float[Tensor, "*rows chosen"]:
        """See `Action`."""
        return torch.zeros_like(f)


@dataclass(frozen=True)
class Keep(Action):
    """f′ = f for the chosen ones, and 0 for all others."""

    keeps_zero = True

    def __call__(self, f: Float[Tensor, "*rows chosen"]) -> Float[Tensor, "*rows chosen"]:
        """Return zeros, for those that are not kept; see `Action`."""
        return torch.zeros_like(f)


@dataclass(frozen=True)
class Scale(Action):
    """f′ = factor · f."""

    factor: float
    """Below 0 it reverses the direction; 1 changes nothing."""

    keeps_zero = True

    def __post_init__(self) -> None:
        _check_finite(self.factor, "Scale: factor")

    def __call__(self, f: Float[Tensor, "*rows chosen"]) -> Float[Tensor, "*rows chosen"]:
        """See `Action`."""
        return self.factor * f


@dataclass(frozen=True)
class Clamp(Action):
    """f′ = f clamped to two bounds, of which one may be left out."""

    low: float | None = None
    """Least activation; above 0 it activates inactive latents."""

    high: float | None = None
    """Largest activation."""

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise UserError("Clamp: give low, high, or both.")
        for name in ("low", "high"):
            if getattr(self, name) is not None:
                _check_finite(getattr(self, name), f"Clamp: {name}")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise UserError(f"Clamp: low ({self.low}) must not be above high ({self.high}).")

    @property
    def keeps_zero(self) -> bool:
        """See `Action`."""
        return (self.low is None or self.low <= 0) and (self.high is None or self.high >= 0)

    def __call__(self, f: Float[Tensor, "*rows chosen"]) -> Float[Tensor, "*rows chosen"]:
        """See `Action`."""
        return f.clamp(self.low, self.high)


@dataclass(frozen=True, eq=False)
class Set(Action):
    """f′ = value, whatever f is."""

    value: Values
    """One number for all, or one for each of the chosen ones."""

    keeps_zero = False

    def __post_init__(self) -> None:
        _check_finite(self.value, "Set: value")

    def of(self, chosen: Sequence[int], n: int) -> Action:
        """See `Action`."""
        return Set(_picked(self.value, chosen, n, "Set: value"))

    def __call__(self, f: Float[Tensor, "*rows chosen"]) -> Float[Tensor, "*rows chosen"]:
        """See `Action`."""
        return torch.as_tensor(self.value, dtype=f.dtype, device=f.device).expand_as(f)


@dataclass(frozen=True, eq=False)
class MeanAblation(Action):
    """f′ = the mean of f over a data set: only what f says about this image is lost."""

    means: Values
    """Means of the chosen ones, or of all; `mean_codes` measures them."""

    keeps_zero = False

    def __post_init__(self) -> None:
        _check_finite(self.means, "MeanAblation: means")

    def of(self, chosen: Sequence[int], n: int) -> Action:
        """See `Action`."""
        return MeanAblation(_picked(self.means, chosen, n, "MeanAblation: means"))

    def __call__(self, f: Float[Tensor, "*rows chosen"]) -> Float[Tensor, "*rows chosen"]:
        """See `Action`."""
        return torch.as_tensor(self.means, dtype=f.dtype, device=f.device).expand_as(f)


def _picked(values: Values, chosen: Sequence[int], n: int, name: str) -> Values:
    if isinstance(values, int | float):
        return values
    found = torch.as_tensor(values).detach()
    if found.ndim == 0:
        return float(found)
    if found.shape == (n,):
        return found[torch.tensor(list(chosen), dtype=torch.int64)]
    if found.shape == (len(chosen),):
        return found
    raise UserError(
        f"{name} has shape {list(found.shape)}; expected one number, one for each of the "
        f"{len(chosen)} chosen, or one for each of all {n}."
    )


def _check_finite(value: Values, name: str) -> None:
    if isinstance(value, int | float):
        finite = math.isfinite(value)
    else:
        finite = bool(torch.as_tensor(value).isfinite().all())
    if not finite:
        raise UserError(f"{name} holds NaN or infinity; it must be finite.")
