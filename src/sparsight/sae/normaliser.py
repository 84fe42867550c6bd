"""From raw activations to the space that an SAE is trained in, and back."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.errors import SparsightError
from sparsight.sae.config import NormaliserKind


class Normaliser(nn.Module):
    """x ↦ (x − mean) / scale; both are buffers, so they are saved with the SAE.

    Args:
        mean: what is subtracted.
        scale: what is divided by: one number (shape [1]), or one for each dimension.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Float[Tensor, " d_in"], scale: Float[Tensor, " d_in_or_1"]) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    @classmethod
    def identity(cls, d_in: int, kind: NormaliserKind = "none") -> Normaliser:
        """One that changes nothing, with buffers of the shape that `kind` has."""
        return cls(torch.zeros(d_in), torch.ones(d_in if kind == "standardise" else 1))

    @classmethod
    def fit(
        cls,
        kind: NormaliserKind,
        mean: Float[Tensor, " d_in"],
        second_moment: Float[Tensor, " d_in"],
    ) -> Normaliser:
        """From a data set's statistics.

        Args:
            kind: "scale" makes E‖x‖² = d_in with one divisor; "standardise" gives each dimension
                variance 1 (a dimension that never varies keeps its scale); "none".
            mean: mean of each dimension.
            second_moment: mean of x² of each dimension.

        Raises:
            SparsightError: the activations do not vary at all, or the statistics are not finite.
        """
        mean, second_moment = mean.double(), second_moment.double()
        if kind == "none":
            return cls.identity(len(mean))
        variance = (second_moment - mean**2).clamp(min=0)
        if not (torch.isfinite(mean).all() and torch.isfinite(second_moment).all()):
            raise SparsightError("The statistics of the activations are not finite.")
        if variance.sum() == 0:
            raise SparsightError("The activations do not vary: there is nothing to normalise.")
        if kind == "scale":
            scale = variance.mean().sqrt()[None]
        else:
            scale = variance.sqrt()
            scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.ones_like(scale))
        return cls(mean.float(), scale.float())

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Into normalised space."""
        return (x - self.mean) / self.scale

    def invert(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Back into the units of the model."""
        return x * self.scale + self.mean
