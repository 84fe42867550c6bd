"""Exact statistics of a site's activations, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK_BYTES = 1 << 20
"""Number of values converted to float64 at a time: as many as fit in a core's own cache."""


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics over all vectors of a site, as they are stored (rounded to the store's dtype).

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
    """The sums from which statistics follow; they can be added to one another.

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
        """Return the sums over no vectors."""
        zeros = torch.zeros(d_in, dtype=torch.float64)
        return cls(0, zeros, zeros.clone())

    def add(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Add a batch of vectors."""
        rows = max(1, _CHUNK_BYTES // (8 * x.shape[1]))
        ones = torch.ones(1, rows, dtype=torch.float64)
        room = torch.empty(rows, x.shape[1], dtype=torch.float64)
        for part in x.split(rows):
            double = room[: len(part)]
            double.copy_(part.float())  # float16 to float64 in one step is slow
            self.total += (ones[:, : len(part)] @ double)[0]
            self.squares += (ones[:, : len(part)] @ double.square_())[0]
        self.count += len(x)

    def merge(self, other: RunningSums) -> None:
        """Add another's sums."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def statistics(self) -> SiteStatistics:
        """Turn the sums into means."""
        n = max(self.count, 1)
        return SiteStatistics(self.count, self.total / n, self.squares / n)


def all_finite(x: Tensor) -> bool:
    """Return whether no entry is NaN or infinite: `isfinite().all()` at the speed of memory."""
    if x.numel() == 0:
        return True
    low, high = x.aminmax()  # NaN propagates
    return math.isfinite(low) and math.isfinite(high)
