"""How patches look: their mean colour and their texture, each sorted into fixed bins.

The bins need no fitting, so they are the same for every collection. They only serve to ask how much
of a latent's activation goes along with colour or texture (`measuring`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

COLOUR_LEVELS = 6
N_COLOURS = COLOUR_LEVELS**3

CONTRASTS = (0.02, 0.06, 0.14)
"""Limits between the levels of contrast: the standard deviation of grey, from 0 to 0.5."""

FREQUENCIES = (1.2, 2.0)
"""Limits between low, medium and high frequency, in cycles per patch."""

COHERENT = 0.5
"""From this coherence of the gradients on, a patch has one orientation."""

_ORIENTATIONS = 4
_FORMS = (len(FREQUENCIES) + 1) * (_ORIENTATIONS + 1)
N_TEXTURES = 1 + len(CONTRASTS) * _FORMS
"""One bin for flat patches; else contrast × frequency × orientation, or none."""

_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Looks:
    """The bins of a batch's patches.

    Attributes:
        colour: bin of the mean colour, below `N_COLOURS`.
        texture: bin of the texture, below `N_TEXTURES`.
    """

    colour: Int[Tensor, "batch patches"]
    texture: Int[Tensor, "batch patches"]

    def of_images(self) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
        """Return each image's most frequent colour and texture; among equals, the lowest bin."""
        return _mode(self.colour, N_COLOURS), _mode(self.texture, N_TEXTURES)


def looks_of(images: UInt8[Tensor, "batch height width 3"], grid: tuple[int, int]) -> Looks:
    """Sort the patches of images into bins of colour and texture.

    Args:
        images: the images as the model sees them; levels 0 to 255.
        grid: rows and columns of patches, which divide height and width.
    """
    x = images.permute(0, 3, 1, 2).float() / 255
    size = (x.shape[2] // grid[0], x.shape[3] // grid[1])
    colour = functional.avg_pool2d(x, size, size)
    levels = (colour * COLOUR_LEVELS).long().clamp(max=COLOUR_LEVELS - 1)
    red, green, blue = levels.unbind(1)
    bins = (red * COLOUR_LEVELS + green) * COLOUR_LEVELS + blue
    return Looks(bins.flatten(1), _textures(x, grid, size).flatten(1))


def _textures(
    x: Float[Tensor, "batch 3 height width"], grid: tuple[int, int], size: tuple[int, int]
) -> Int[Tensor, "batch rows columns"]:
    """Sort patches by contrast, mean frequency and orientation of their grey levels.

    Gradients are differences inside the patch. Their second moments (the structure tensor, Förstner
    and Gülch 1987) give orientation and coherence; gradient energy over variance is the mean
    squared frequency (Parseval).
    """
    height, width = size
    weights = torch.tensor(_GREY).view(3, 1, 1)
    grey = (x * weights).sum(dim=1)[:, : grid[0] * height, : grid[1] * width]
    patches = grey.view(len(x), grid[0], height, grid[1], width).permute(0, 1, 3, 2, 4)
    variance = patches.var(dim=(3, 4), unbiased=False)
    down = patches[..., 1:, :-1] - patches[..., :-1, :-1]
    right = patches[..., :-1, 1:] - patches[..., :-1, :-1]
    xx, yy, xy = (
        (a * b).mean(dim=(3, 4)) for a, b in ((right, right), (down, down), (right, down))
    )
    energy = xx + yy
    coherence = ((xx - yy) ** 2 + 4 * xy**2).sqrt() / energy.clamp(min=1e-12)
    angle = 0.5 * torch.atan2(2 * xy, xx - yy) % math.pi
    turn = (angle / math.pi * _ORIENTATIONS).round().long() % _ORIENTATIONS
    orientation = torch.where(coherence >= COHERENT, turn, _ORIENTATIONS)
    cycles = (energy / variance.clamp(min=1e-12)).sqrt() / (2 * math.pi) * math.sqrt(height * width)
    frequency = torch.bucketize(cycles, torch.tensor(FREQUENCIES))
    contrast = torch.bucketize(variance.sqrt(), torch.tensor(CONTRASTS))
    form = frequency * (_ORIENTATIONS + 1) + orientation
    return torch.where(contrast == 0, 0, 1 + (contrast - 1) * _FORMS + form)


def _mode(bins: Int[Tensor, "batch patches"], count: int) -> Int[Tensor, " batch"]:
    tally = torch.zeros(len(bins), count, dtype=torch.int64)
    tally.scatter_add_(1, bins, torch.ones_like(bins))
    return tally.argmax(dim=1)
