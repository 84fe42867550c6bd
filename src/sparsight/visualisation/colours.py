"""What a run's images have in common: mean colour, axes of colour, mean spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.images import ImageSource, sample_places
from sparsight.latents.heatmaps import black_and_white
from sparsight.vision import VisionModel
from sparsight.vision.passes import ImagePass, PassSettings

SAMPLE = 256
"""Images from which the mean spectrum is measured."""


class Levels:
    """The model's normalisation of pixels, whose levels are from 0 (black) to 1 (white).

    Args:
        model: the model that sees the images.
    """

    def __init__(self, model: VisionModel) -> None:
        _, self.height, self.width = model.input_shape
        black, white = black_and_white(model)
        self._black = black.float().to(model.device)[:, None, None]
        self._range = (white - black).clamp(min=1e-6).float().to(model.device)[:, None, None]

    def pixels(self, levels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """Return what the model takes."""
        return self._black + self._range * levels

    def levels(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """Return levels from what the model takes."""
        return (pixels.to(self._black) - self._black) / self._range


@dataclass(frozen=True)
class ImageStatistics:
    """Mean colour, axes of colour and mean spectrum of some images.

    A colour is mean + axes · c; the spectrum is that of c, whose three channels are uncorrelated.

    Attributes:
        mean: mean colour, from 0 to 1.
        axes: orthonormal axes of colour, one per column, the one with most variance first.
        magnitude: mean magnitude of the two-dimensional Fourier transform (`rfft2`, not
            normalised) of each channel; 0 at frequency 0, which the mean colour stands for.
        size: height and width of the images.
        origin: where the statistics come from, in words.
    """

    mean: Float[Tensor, 3]
    axes: Float[Tensor, "3 3"]
    magnitude: Float[Tensor, "3 height half_width"]
    size: tuple[int, int]
    origin: str

    @cached_property
    def deviations(self) -> Float[Tensor, 3]:
        """The standard deviation that the mean spectrum gives each channel (Parseval's theorem)."""
        height, width = self.size
        squares = self.magnitude.square().sum(1)
        energy = 2 * squares.sum(1) - squares[:, 0]  # the other columns stand for two each
        if width % 2 == 0:
            energy = energy - squares[:, -1]
        return energy.sqrt() / (height * width)

    def to(self, device: torch.device) -> ImageStatistics:
        """Return the statistics on a device."""
        mean, axes, magnitude = (x.to(device) for x in (self.mean, self.axes, self.magnitude))
        return ImageStatistics(mean, axes, magnitude, self.size, self.origin)


def measure_images(
    model: VisionModel,
    images: ImageSource,
    *,
    max_images: int = SAMPLE,
    seed: int = 0,
    settings: PassSettings | None = None,
) -> ImageStatistics:
    """Measure a random sample of images, as the model sees them.

    The axes of colour are those of the first batch. Memory does not depend on the number of images.

    Args:
        model: the model; its preprocessing is used.
        images: the images.
        max_images: size of the sample.
        seed: seed of the sample.
        settings: batch size, workers and quiet.

    Raises:
        UserError: none of the images can be read.
    """
    levels = Levels(model)
    places = sample_places(len(images), max_images, seed)
    axes: Tensor | None = None
    colour = torch.zeros(3, dtype=torch.float64)
    magnitude = torch.zeros(3, levels.height, levels.width // 2 + 1, dtype=torch.float64)
    n = 0
    with ImagePass(model, images, "spectrum", settings, indices=places.tolist()) as seen:
        for batch in seen:
            rgb = levels.levels(batch.pixels).clamp(0, 1).cpu().double()
            if axes is None:
                axes = _axes(rgb)
            channels = torch.einsum("bkhw,kc->bchw", rgb, axes)
            magnitude += torch.fft.rfft2(channels).abs().sum(0)
            colour += rgb.mean((2, 3)).sum(0)
            n += len(rgb)
    assert axes is not None  # the pass raises if nothing was read
    magnitude /= n
    magnitude[:, 0, 0] = 0
    origin = f"{n:,} images of {images.spec}"
    size = (levels.height, levels.width)
    return ImageStatistics((colour / n).float(), axes.float(), magnitude.float(), size, origin)


def _axes(rgb: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "3 3"]:
    """Return the eigenvectors of the covariance of colours, the largest first, signs fixed."""
    flat = rgb.permute(1, 0, 2, 3).flatten(1)
    vectors = torch.linalg.eigh(torch.cov(flat)).eigenvectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    signed: Tensor = vectors * largest.sign()
    return signed


def assumed_statistics(height: int, width: int) -> ImageStatistics:
    """Return statistics like those of photos, where no images are at hand.

    The magnitude falls with 1 / frequency, as in natural images (Field 1987); the axes are
    brightness, red against blue, and green against both, with deviations 0.22, 0.06 and 0.03.
    """
    axes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]]).T
    vertical = torch.fft.fftfreq(height)[:, None]
    frequency = (vertical.square() + torch.fft.rfftfreq(width).square()).sqrt()
    falling = 1 / frequency.clamp(min=1 / max(height, width))
    falling[0, 0] = 0
    size, grey = (height, width), torch.full((3,), 0.5)
    axes = axes / axes.norm(dim=0)
    unscaled = ImageStatistics(grey, axes, falling.repeat(3, 1, 1), size, "")
    scale = torch.tensor([0.22, 0.06, 0.03]) / unscaled.deviations
    magnitude = falling * scale[:, None, None]
    return ImageStatistics(
        grey, axes, magnitude, size, "an assumed spectrum that falls with 1 / frequency"
    )
