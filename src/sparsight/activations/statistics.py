"""Exact statistics of a site's activations, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_ROWS_AT_A_TIME = 8192


@dataclass(frozen=True)
class SiteStatistics:
    """Of all vectors of a site.

    Attributes:
        count: number of vectors.
        mean: mean of each dimension, float64.
        second_moment: mean of x² of each dimension, float64.
    """

    count: int
    mean: Float[Tensor, " d_in"]
    second_moment: Float[Tensor, " d_in"]


@dataclass
class RunningSums:
    """Sums that statistics are made of; they can be added to one another.

    Attributes:
        count: number of vectors.
        total: sum of each dimension, float64.
        squares: sum of x² of each dimension, float64.
    """

    count: int
    total: Float[Tensor, " d_in"]
    squares: Float[Tensor, " d_in"]

    @classmethod
    def nothing(cls, d_in: int) -> RunningSums:
        """The sums of no vectors."""
        zeros = torch.zeros(d_in, dtype=torch.float64)
        return cls(0, zeros, zeros.clone())

    def add(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Count some vectors in."""
        for part in x.split(_ROWS_AT_A_TIME):
            double = part.double()
            self.count += len(part)
            self.total += double.sum(dim=0)
            self.squares += double.square_().sum(dim=0)

    def merge(self, other: RunningSums) -> None:
        """Count another's vectors in."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def statistics(self) -> SiteStatistics:
        """Means instead of sums."""
        n = max(self.count, 1)
        return SiteStatistics(self.count, self.total / n, self.squares / n)
