"""How strongly each latent fires over its images: histograms and quantiles, exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sparsight.latents.examples import LatentEntries

HISTOGRAM_BINS = 20
QUANTILES = {"q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
"""Columns of the index, and the quantile that each holds."""


@dataclass(frozen=True)
class Distributions:
    """The distribution of every latent's image maxima (its strongest activation in each image).

    Attributes:
        histogram: images per bin, `[n_latents, HISTOGRAM_BINS]`; equal bins from `low` to `high`.
        low: the smaller of 0 and the latent's weakest image maximum.
        high: the larger of 0 and its strongest.
        quantiles: the least image maximum that is at least as large as a share of all, by column.
    """

    histogram: Int64[Tensor, "n_latents bins"]
    low: Float[Tensor, " n_latents"]
    high: Float[Tensor, " n_latents"]
    quantiles: dict[str, Float[Tensor, " n_latents"]]

    @classmethod
    def zeros(cls, n_latents: int) -> Distributions:
        """Return distributions of latents that never fire."""
        return cls(
            torch.zeros(n_latents, HISTOGRAM_BINS, dtype=torch.int64),
            torch.zeros(n_latents),
            torch.zeros(n_latents),
            {name: torch.full((n_latents,), torch.nan) for name in QUANTILES},
        )

    def fill(self, entries: LatentEntries) -> None:
        """Fill in a block of latents."""
        latent, value = entries.latent, entries.value
        last = entries.rank == entries.count - 1
        self.high[latent[entries.rank == 0]] = value[entries.rank == 0].clamp(min=0)
        self.low[latent[last]] = value[last].clamp(max=0)
        low, high = self.low[latent].double(), self.high[latent].double()
        bins = ((value.double() - low) / (high - low) * HISTOGRAM_BINS).long()
        place = latent * HISTOGRAM_BINS + bins.clamp(0, HISTOGRAM_BINS - 1)
        self.histogram.view(-1).index_add_(0, place, torch.ones_like(place))
        ascending = entries.count - entries.rank  # 1 for the weakest
        for name, share in QUANTILES.items():
            wanted = (share * entries.count.double()).ceil().long().clamp(min=1)
            at = ascending == wanted
            self.quantiles[name][latent[at]] = value[at]
