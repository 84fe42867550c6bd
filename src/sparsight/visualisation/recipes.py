"""The four recipes: what is optimised, and how it becomes an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.visualisation.colours import ImageStatistics
from sparsight.visualisation.settings import Recipe

START = 0.02
"""Standard deviation of the noise from which images start, in levels from 0 to 1."""

CHANNELS = 32
"""Channels of the untrained network."""

COARSEST = 4
"""Least side of the untrained network's input."""


class ImageParameters(nn.Module, ABC):
    """The parameters of several images of one size, and the images that they make."""

    @abstractmethod
    def forward(self) -> Float[Tensor, "n 3 height width"]:
        """Return the images, with levels from 0 to 1 and gradients to the parameters."""

    def optimiser(self, lr: float) -> torch.optim.Optimizer:
        """Return the optimiser of the recipe."""
        return torch.optim.Adam(self.parameters(), lr)


def make_parameters(
    recipe: Recipe,
    statistics: ImageStatistics,
    size: tuple[int, int],
    generators: Sequence[torch.Generator],
) -> ImageParameters:
    """Start images.

    Args:
        recipe: how images are made.
        statistics: colours and spectrum, of which each recipe uses what it needs.
        size: height and width.
        generators: one per image, on the CPU.
    """
    recipes: dict[Recipe, Callable[..., ImageParameters]] = {
        "pixels": Pixels,
        "fourier": Fourier,
        "maco": Phases,
        "network": UntrainedNetwork,
    }
    return recipes[recipe](statistics, size, generators)


class Pixels(ImageParameters):
    """Every pixel is a parameter (its logit); starts as faint noise around the mean colour."""

    def __init__(
        self,
        statistics: ImageStatistics,
        size: tuple[int, int],
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        start = START * _noise((3, *size), generators) + _column(statistics.mean)
        self.logits = nn.Parameter(start.clamp(0.02, 0.98).logit())

    def forward(self) -> Float[Tensor, "n 3 height width"]:
        """See `ImageParameters`."""
        return self.logits.sigmoid()


class Fourier(ImageParameters):
    """The coefficients of a Fourier transform, in uncorrelated colours, scaled by frequency.

    A step then changes low frequencies most, as they are strongest in natural images (Olah et al.
    2017, "Feature visualization"). Colours and scales are those of the run's images.
    """

    scale: Tensor
    mean: Tensor
    axes: Tensor

    def __init__(
        self,
        statistics: ImageStatistics,
        size: tuple[int, int],
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        self.size = size
        shape = (3, size[0], size[1] // 2 + 1, 2)
        self.coefficients = nn.Parameter(0.1 * _noise(shape, generators))
        # 4: logits of levels change four times as much as levels around one half.
        self.register_buffer("scale", 4 * statistics.magnitude)
        self.register_buffer("mean", _column(statistics.mean.clamp(0.02, 0.98).logit()))
        self.register_buffer("axes", statistics.axes)

    def forward(self) -> Float[Tensor, "n 3 height width"]:
        """See `ImageParameters`."""
        spectrum = torch.view_as_complex(self.coefficients) * self.scale
        channels = torch.fft.irfft2(spectrum, s=self.size)
        return (self.mean + torch.einsum("bchw,kc->bkhw", channels, self.axes)).sigmoid()


class Phases(ImageParameters):
    """Only the phases; the magnitudes stay those of the run's images (MACO, Fel et al. 2023).

    "Unlocking feature visualization for deeper networks with magnitude constrained optimization".
    Phases are antisymmetric where the transform of a real image demands it, so that the magnitude
    is exactly that of the statistics; levels beyond 0 and 1 are then cut off.
    """

    magnitude: Tensor
    mean: Tensor
    axes: Tensor

    def __init__(
        self,
        statistics: ImageStatistics,
        size: tuple[int, int],
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        self.size = size
        shape = (3, size[0], size[1] // 2 + 1)
        start = torch.stack([torch.rand(shape, generator=each) for each in generators])
        self.phases = nn.Parameter(2 * torch.pi * start)
        self.register_buffer("magnitude", statistics.magnitude)
        self.register_buffer("mean", _column(statistics.mean))
        self.register_buffer("axes", statistics.axes)

    def channels(self) -> Float[Tensor, "n 3 height width"]:
        """Return the images in uncorrelated colours, before levels are cut off."""
        phases: Tensor = self.phases
        own = [0, phases.shape[-1] - 1] if self.size[1] % 2 == 0 else [0]
        for column in own:  # frequency (y, x) is here the conjugate of (−y, x)
            half = phases[..., column]
            mirrored = half.roll(-1, -1).flip(-1)
            antisymmetric = ((half - mirrored) / 2)[..., None]
            before, after = phases[..., :column], phases[..., column + 1 :]
            phases = torch.cat([before, antisymmetric, after], dim=-1)
        spectrum = torch.polar(self.magnitude.expand_as(phases), phases)
        channels: Tensor = torch.fft.irfft2(spectrum, s=self.size)
        return channels

    def forward(self) -> Float[Tensor, "n 3 height width"]:
        """See `ImageParameters`."""
        return (self.mean + torch.einsum("bchw,kc->bkhw", self.channels(), self.axes)).clamp(0, 1)

    def optimiser(self, lr: float) -> torch.optim.Optimizer:
        """See `ImageParameters`; NAdam, as in the paper."""
        return torch.optim.NAdam(self.parameters(), lr)


class UntrainedNetwork(ImageParameters):
    """The weights of an untrained convolutional network, one per image, with noise as its input.

    Such a network makes smooth images with edges more easily than noise (Ulyanov et al. 2018, "Deep
    image prior").
    """

    mean: Tensor

    def __init__(
        self,
        statistics: ImageStatistics,
        size: tuple[int, int],
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        self.size = size
        doublings = 0
        while min(size) >> (doublings + 1) >= COARSEST and doublings < 5:
            doublings += 1
        coarse = (3 + CHANNELS, *(-(-side >> doublings) for side in size))
        self.networks = nn.ModuleList(_decoder(doublings, each) for each in generators)
        self.register_buffer("inputs", _noise(coarse, generators))
        self.register_buffer("mean", _column(statistics.mean.clamp(0.02, 0.98).logit()))

    inputs: Tensor

    def forward(self) -> Float[Tensor, "n 3 height width"]:
        """See `ImageParameters`."""
        drawn = [
            network(each[None])[..., : self.size[0], : self.size[1]]
            for network, each in zip(self.networks, self.inputs, strict=True)
        ]
        return (self.mean + torch.cat(drawn)).sigmoid()


def _decoder(doublings: int, generator: torch.Generator) -> nn.Sequential:
    """Make a network that doubles the size of its input several times."""
    layers: list[nn.Module] = []
    before = 3 + CHANNELS
    for level in range(doublings + 1):
        if level:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
        layers += [
            nn.Conv2d(before, CHANNELS, 3, padding=1, padding_mode="reflect"),
            nn.GroupNorm(4, CHANNELS),
            nn.LeakyReLU(0.1),
        ]
        before = CHANNELS
    layers.append(nn.Conv2d(CHANNELS, 3, 1))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.weight[0].numel()
            drawn = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.data = drawn * (2 / fan_in) ** 0.5
            assert layer.bias is not None
            layer.bias.data.zero_()
    assert isinstance(layers[-1], nn.Conv2d)
    layers[-1].weight.data *= 0.2  # start near the mean colour
    return nn.Sequential(*layers)


def _noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(*shape, generator=each) for each in generators])


def _column(colour: Float[Tensor, 3]) -> Float[Tensor, "3 1 1"]:
    return colour[:, None, None]
