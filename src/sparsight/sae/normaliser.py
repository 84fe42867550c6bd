"""From raw activations to the space in which an SAE is trained, and back."""

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
"""The kinds that measure every vector separately."""


class Normaliser(nn.Module):
    """x ↦ (x − mean) / scale; both are buffers, so they are saved with the SAE.

    The kinds in `PER_VECTOR` use each vector's own mean and scale: "layer_norm" takes the mean of
    its entries and their deviation (unbiased; plus 1e-5 when dividing), "constant_norm" takes 0 and
    ‖x‖ / √d; the buffers are not used. The computation runs in float32, or in float64 if an input
    is float64.

    Args:
        mean: is subtracted.
        scale: the divisor: one number (shape [1]), or one per dimension.
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
        """Return a normaliser that changes nothing, with buffers of the shape that `kind` has."""
        return cls(torch.zeros(d_in), torch.ones(d_in if kind == "standardise" else 1), kind)

    @classmethod
    def fit(
        cls,
        kind: NormaliserKind,
        mean: Float[Tensor, " d_in"],
        second_moment: Float[Tensor, " d_in"],
    ) -> Normaliser:
        """Fit a normaliser to a data set's statistics.

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
        """Whether every vector is measured separately."""
        return self.kind in PER_VECTOR

    def frame(self, x: Float[Tensor, "batch d_in"]) -> Frame | None:
        """Return the units of each vector; None if all vectors share the same."""
        x = wide(x)
        if self.kind == "layer_norm":
            if not len(x):  # torch warns about the deviation of nothing
                return Frame(x[:, :1], x[:, :1])
            return Frame(x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True))
        if self.kind == "constant_norm":
            scale = x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
            return Frame(torch.zeros_like(scale), scale.clamp(min=1e-12))
        return None

    def forward(
        self, x: Float[Tensor, "batch d_in"], frame: Frame | None = None
    ) -> Float[Tensor, "batch d_in"]:
        """Convert to normalised space.

        Args:
            x: activations in the model's units.
            frame: the units of each vector, if they are not to be measured on `x` itself.
        """
        if frame is None:
            frame = self.frame(x)
        if frame is not None:
            # The inverse does without it, as in ViT-Prisma, SAELens and OpenAI's SAEs.
            guard = LAYER_NORM_EPS if self.kind == "layer_norm" else 0.0
            return (wide(x) - frame.mean) / (frame.scale + guard)
        return (wide(x) - wide(self.mean)) / wide(self.scale)

    def invert(
        self, z: Float[Tensor, "batch d_in"], frame: Frame | None = None
    ) -> Float[Tensor, "batch d_in"]:
        """Convert back to the model's units.

        Args:
            z: vectors in normalised space.
            frame: the units of each vector, if all vectors do not share the same.

        Raises:
            UserError: the units are needed and not given.
        """
        if not self.per_vector:
            return wide(z) * wide(self.scale) + wide(self.mean)
        if frame is None:
            raise UserError(
                f"The SAE's normaliser is {self.kind!r}, so a code is decoded in the units of its "
                "vectors: give `decode` a code as `encode` made it, or one with its `frame`."
            )
        return wide(z) * wide(frame.scale) + wide(frame.mean)
