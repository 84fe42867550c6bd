"""How an image is made for a latent: the recipe and all other settings."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

from sparsight.config import check_positive, check_seed, check_types
from sparsight.errors import UserError

Recipe = Literal["maco", "pixels", "fourier", "network"]
"""What is optimised: only the phases of a Fourier transform (the magnitudes are those of the run's
own images), the pixels, all coefficients of the transform, or the weights of a network."""

Pool = Literal["max", "softmax", "mean", "cls"]
"""How the pre-activations of an image's tokens become one number to raise."""

RECIPES: tuple[Recipe, ...] = get_args(Recipe)


@dataclass(frozen=True)
class Transforms:
    """Random changes of the image before each step, so that it works in more than one position.

    Each is drawn separately for every view. Images are judged with other changes; see `judging`.
    """

    shift: float = 0.06
    """Largest shift in each direction, as a share of the side."""

    scale: float = 0.15
    """Largest change of size, as a share."""

    rotate: float = 8.0
    """Largest rotation, in degrees."""

    crop: float = 0.85
    """Smallest side of the part of the image that is seen, as a share of the whole side."""

    noise: float = 0.04
    """Standard deviation of the noise on every pixel, whose values are from 0 to 1."""

    def __post_init__(self) -> None:
        check_types(self, "transforms.")
        for name, most in (("shift", 0.5), ("scale", 0.9), ("rotate", 180.0), ("noise", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise UserError(f"transforms.{name} is {value}; it must be from 0 to {most:g}.")
        if not 0 < self.crop <= 1:
            raise UserError(f"transforms.crop is {self.crop}; it must be above 0 and at most 1.")


@dataclass(frozen=True)
class VisualisationSettings:
    """How images are made for a latent."""

    recipe: Recipe = "maco"
    """What is optimised: only the phases of an image whose magnitudes are those of the run's images
    (maco: looks most natural), pixels (needs no images), fourier, or an untrained network."""

    steps: int = 160
    """Steps of the optimiser."""

    n: int = 1
    """Images per latent."""

    views: int = 2
    """Transformed copies of each image that the model sees in each step."""

    pool: Pool = "softmax"
    """What is raised. max: the strongest pre-activation among the image's tokens; softmax: their
    mean weighted towards the strongest; mean: the mean over patches, for textures that fill the
    image; cls: that of CLS."""

    lr: float | None = None
    """Learning rate; default: the recipe's own."""

    tv: float | None = None
    """Weight of the total variation, which makes images smooth; default: the recipe's own."""

    diversity: float = 0.3
    """Weight of the similarity between the images of one latent, if there are several."""

    press: float = 0.0
    """Weight of the other latents' activations, which are pressed down. That costs activation, and
    often the latent is still not the strongest one."""

    seed: int = 0
    """Seed; the same seed gives the same images on the same machine."""

    transforms: Transforms = field(default_factory=Transforms)
    """Random changes of the image before each step."""

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(steps=self.steps, n=self.n, views=self.views)
        check_seed(self.seed)
        for name in ("lr", "tv", "diversity", "press"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UserError(f"{name} is {value}; it must be a finite number of at least 0.")
        if self.lr == 0:
            raise UserError("lr is 0, so that nothing would change; give a positive number.")

    def filled(self) -> VisualisationSettings:
        """Return the settings with the recipe's own values in place of None."""
        own = OWN[self.recipe]
        values = {f.name: own[f.name] for f in fields(self) if getattr(self, f.name) is None}
        return replace(self, **values)  # type: ignore[arg-type]


OWN: dict[Recipe, dict[str, float]] = {
    "pixels": {"lr": 0.08, "tv": 1.0},
    "fourier": {"lr": 0.05, "tv": 1.0},
    "maco": {"lr": 0.5, "tv": 0.0},
    "network": {"lr": 0.03, "tv": 0.5},
}
"""Learning rate and weight of the total variation, by recipe."""
