"""From raw activations to the space that an SAE is trained in, and back."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.errors import SparsightError, UserError
from sparsight.sae.code import Frame
from sparsight.sae.config import NormaliserKind
from sparsight.sae.precision import wide

ROUNDING = 1e-12
"""Variance, as a share of the mean square, that rounding to float32 alone can explain."""
LAYER_NORM_EPS = 1e-5
PER_VECTOR = ("layer_norm", "constant_norm")
"""Kinds that measure every vector by itself."""


class Normaliser(nn.Module):
    """x ↦ (x − mean) / scale; both are buffers, so they are saved with the SAE.

    Of the kinds in `PER_VECTOR` mean and scale are those of the vector: "layer_norm" takes the
    mean of its entries and their deviation (unbiased; plus 1e-5 where it divides), "constant_norm"
    0 and ‖x‖ / √d; the buffers are not used. All of it is computed in float32, or in float64 where
    an input is float64.

    Args:
        mean: what is subtracted.
        scale: what is divided by: one number (shape [1]), or one for each dimension.
        kind: as in `SAEConfig.normaliser`.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        mean: Float[Tensor, " d_in"],
        scale: Float[Tensor, " d_in_or_1"],
        kind: NormaliserKind = "scale",
    ) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    @classmethod
    def identity(cls, d_in: int, kind: NormaliserKind = "none") -> Normaliser:
        """One that changes nothing, with buffers of the shape that `kind` has."""
        return cls(torch.zeros(d_in), torch.ones(d_in if kind == "standardise" else 1), kind)

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
                variance 1 (a dimension that never varies keeps its scale); the others need no
                statistics.
            mean: mean of each dimension.
            second_moment: mean of x² of each dimension.

        Raises:
            SparsightError: the activations do not vary at all, or the statistics are not finite.
        """
        mean, second_moment = mean.double(), second_moment.double()
        if kind == "none" or kind in PER_VECTOR:
            return cls.identity(len(mean), kind)
        variance = (second_moment - mean**2).clamp(min=0)
        if not (torch.isfinite(mean).all() and torch.isfinite(second_moment).all()):
            raise SparsightError("The statistics of the activations are not finite.")
        if variance.sum() <= ROUNDING * second_moment.sum():
            raise SparsightError("The activations do not vary: there is nothing to normalise.")
        if kind == "scale":
            scale = variance.mean().sqrt()[None]
        else:
            scale = variance.sqrt()
            scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.ones_like(scale))
        return cls(mean.float(), scale.float(), kind)

    @property
    def per_vector(self) -> bool:
        """Whether every vector is measured by itself."""
        return self.kind in PER_VECTOR

    def frame(self, x: Float[Tensor, "batch d_in"]) -> Frame | None:
        """The units of each vector; None where they are the same for all."""
        x = wide(x)
        if self.kind == "layer_norm":
            if not len(x):  # torch warns of the deviation of nothing
                return Frame(x[:, :1], x[:, :1])
            return Frame(x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True))
        if self.kind == "constant_norm":
            scale = x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
            return Frame(torch.zeros_like(scale), scale.clamp(min=1e-12))
        return None

    def forward(
        self, x: Float[Tensor, "batch d_in"], frame: Frame | None = None
    ) -> Float[Tensor, "batch d_in"]:
        """Into normalised space.

        Args:
            x: in the units of the model.
            frame: the units of each vector, where they are not to be measured on `x` itself.
        """
        if frame is None:
            frame = self.frame(x)
        if frame is not None:
            # Undone without it, as in ViT-Prisma, SAELens and OpenAI's SAEs.
            guard = LAYER_NORM_EPS if self.kind == "layer_norm" else 0.0
            return (wide(x) - frame.mean) / (frame.scale + guard)
        return (wide(x) - wide(self.mean)) / wide(self.scale)

    def invert(
        self, z: Float[Tensor, "batch d_in"], frame: Frame | None = None
    ) -> Float[Tensor, "batch d_in"]:
        """Back into the units of the model.

        Args:
            z: in normalised space.
            frame: the units of each vector, where they are not the same for all.

        Raises:
            UserError: they are needed and not given.
        """
        if not self.per_vector:
            return wide(z) * wide(self.scale) + wide(self.mean)
        if frame is None:
            raise UserError(
                f"The SAE's normaliser is {self.kind!r}, so a code is decoded in the units of its "
                "vectors: give `decode` a code as `encode` made it, or one with its `frame`."
            )
        return wide(z) * wide(frame.scale) + wide(frame.mean)
