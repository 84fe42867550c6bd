"""Random views of an image: shifted, scaled, rotated, cropped, with noise."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sparsight.visualisation.settings import Transforms


def random_views(
    images: Float[Tensor, "batch 3 height width"],
    transforms: Transforms,
    generator: torch.Generator,
) -> Float[Tensor, "batch 3 height width"]:
    """Return every image transformed at random, at the same size, with gradients.

    Where a view reaches beyond the image, it sees it mirrored.

    Args:
        images: levels from 0 to 1.
        transforms: how far each transform may go.
        generator: on the CPU, so that a seed draws the same numbers for every device.
    """
    n, _, height, width = images.shape

    def within(most: float) -> Tensor:
        return most * (2 * torch.rand(n, generator=generator) - 1)

    share = 1 - (1 - transforms.crop) * torch.rand(n, generator=generator)
    size = share / (1 + within(transforms.scale))
    angle = within(math.radians(transforms.rotate))
    # Places are from −1 to 1: a part of the image may be anywhere inside it, and then shifted.
    x, y = ((1 - share) * within(1) + 2 * within(transforms.shift) for _ in range(2))
    cos, sin, aspect = angle.cos(), angle.sin(), height / width
    places = torch.stack(
        [size * cos, -size * sin * aspect, x, size * sin / aspect, size * cos, y], dim=1
    )
    grid = functional.affine_grid(
        places.view(n, 2, 3).to(images.device), [n, 3, height, width], align_corners=False
    )
    seen = functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    if transforms.noise:
        seen = seen + transforms.noise * torch.randn(seen.shape, generator=generator).to(seen)
    return seen


def total_variation(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, " batch"]:
    """Return the mean absolute difference between neighbouring pixels, per image."""
    down = images.diff(dim=2).abs().mean((1, 2, 3))
    return down + images.diff(dim=3).abs().mean((1, 2, 3))
