"""How a latent's activation is spread over the patches of an image."""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor

SPATIAL_IMAGES = 20_000
"""Images at most from which spatial statistics are taken, spread evenly over the collection."""

_NEIGHBOURS = ((0, 1), (1, -1), (1, 0), (1, 1))
"""Row and column steps to half of the eight neighbours; the other half are their mirror images."""


class SpatialStatistics:
    """Moran's I of every latent, averaged over images, from sparse codes.

    With x_i the activations at the P patches of one image (0 where the latent does not fire), m
    their mean, and w_ij = 1 for the eight neighbours of a patch, W = Σ w_ij:

        I = (P / W) · Σ_ij w_ij (x_i − m)(x_j − m) / Σ_i (x_i − m)²

    (Moran 1950). It is near 1 for one compact area, and −1/(P − 1) on average for activations at
    random patches. Images in which a latent is equally strong at every patch are left out.

    Args:
        n_latents: number of latents.
        grid: rows and columns of patches.
        device: device of the codes.

    Attributes:
        total: sum of I over images, `[n_latents]`, float64.
        count: number of images, `[n_latents]`.
        null: −1/(P − 1).
    """

    def __init__(
        self, n_latents: int, grid: tuple[int, int], device: torch.device | str = "cpu"
    ) -> None:
        self.grid = grid
        self.n_patches = grid[0] * grid[1]
        self.total = torch.zeros(n_latents, dtype=torch.float64)
        self.count = torch.zeros(n_latents, dtype=torch.int64)
        self.null = -1 / (self.n_patches - 1) if self.n_patches > 1 else None
        row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
        across = (column > 0).long() + (column < grid[1] - 1)
        down = (row > 0).long() + (row < grid[0] - 1)
        self._degree = (across + down + across * down).flatten().double().to(device)

    def add(
        self,
        latent: Int[Tensor, " pairs"],
        pair: Int[Tensor, " entries"],
        patch: Int[Tensor, " entries"],
        value: Float64[Tensor, " entries"],
    ) -> None:
        """Add entries of whole images.

        Args:
            latent: latent of each (image, latent) pair.
            pair: pair of each entry, rising.
            patch: patch of each entry, 0 at the top left, in reading order.
            value: activation of each entry.
        """
        if not len(pair) or self.null is None:
            return
        order = (pair * self.n_patches + patch).argsort()
        pair, patch, value = pair[order], patch[order], value[order]
        key = pair * self.n_patches + patch
        products = torch.zeros_like(value)
        row, column = patch // self.grid[1], patch % self.grid[1]
        for down, right in _NEIGHBOURS:
            inside = (row + down < self.grid[0]) & (column + right < self.grid[1])
            inside &= column + right >= 0
            wanted = key + down * self.grid[1] + right
            place = torch.searchsorted(key, wanted).clamp(max=len(key) - 1)
            there = inside & (key[place] == wanted)
            products += torch.where(there, value * value[place], 0)
        pairs, lengths = pair.unique_consecutive(return_counts=True)

        def summed(values: Tensor) -> Tensor:
            return torch.segment_reduce(values, "sum", lengths=lengths)

        mean = summed(value) / self.n_patches
        edges = self._degree.sum()
        near = 2 * summed(products) - 2 * mean * summed(value * self._degree[patch])
        near = near + mean.square() * edges
        spread = summed(value.square()) - self.n_patches * mean.square()
        varied = spread > 1e-9 * summed(value.square())
        moran = (self.n_patches / edges * near / spread)[varied].cpu()
        latents: Int64[Tensor, " varied"] = latent[pairs][varied].cpu()
        self.total.index_add_(0, latents, moran)
        self.count += latents.bincount(minlength=len(self.count))
