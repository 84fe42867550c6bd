"""The interface of remedies for dead latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Self

from jaxtyping import Float, Int
from torch import Tensor

from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.config import SAEConfig

PER_LATENT = frozenset(
    {"W_enc", "b_enc", "W_dec", "r_mag", "b_mag", "threshold", "mixture", "relaxation"}
)
"""Parameters that have one row per latent."""


class LeftOver(NamedTuple):
    """What the live latents leave unexplained of a batch, or of a part of one."""

    scores: Float[Tensor, "batch n_latents"]
    """Pre-activations, differentiable."""

    residual: Float[Tensor, "batch d_out"]
    """z − ẑ; its gradient is not used."""

    W_dec: Float[Tensor, "n_latents d_out"]
    """Decoder rows."""

    dead: Int[Tensor, " dead"]
    """The latents that count as dead, ascending; at least one."""

    variance: float
    """Variance of the target: Σ over dimensions. The unit of the loss is batch · variance."""


class Residuals(NamedTuple):
    """What a remedy needs to know about a whole batch when it sees a part of it."""

    n: int
    """Number of vectors of the batch."""

    squared: Float[Tensor, ""]
    """Σ‖e‖² of the residuals e, in float64."""

    spread: Float[Tensor, ""]
    """Σ‖e − ē‖², with ē the batch's mean."""

    measured: Float[Tensor, ""]
    """Results of `Remedy.measure`, summed over the parts in float64."""


class Trained(NamedTuple):
    """An SAE between two steps of its training."""

    sae: SparseAutoencoder
    """The SAE, which a remedy may change in place."""

    z: Float[Tensor, "batch d_in"]
    """The next batch, in normalised space."""

    target: Float[Tensor, "batch d_out"]
    """The target of the reconstruction: `z`, unless the SAE is a transcoder."""

    since_fired: Int[Tensor, " n_latents"]
    """Number of vectors since each latent was last active."""

    moments: Mapping[str, tuple[Tensor, Tensor]]
    """Adam's moments, by parameter, which a remedy may change in place."""

    step: int
    """Number of steps that are done."""

    length: int
    """Length of the run in vectors."""

    seed: int
    """Seed of the run."""


class Remedy:
    """A remedy for dead latents; subclasses are frozen dataclasses that hold its settings."""

    word: ClassVar[str]
    """The name that users write: `--remedy WORD`."""

    label: ClassVar[str]
    """The name in reports."""

    fusable: ClassVar[bool] = False
    """Whether the fused training steps, without autograd, support it."""

    renews: ClassVar[bool] = False
    """Whether it may resample latents; see `renew`."""

    @property
    def weight(self) -> float:
        """The weight of its loss; 0 for a remedy without one."""
        return 0.0

    @property
    def aux_k(self) -> int:
        """The number of dead latents per vector that its loss uses, for the fused steps."""
        return 0

    @property
    def window(self) -> int | None:
        """The number of vectors without an activation after which a latent counts as dead; None
        leaves it to the run."""
        return None

    def check(self, sae: SAEConfig) -> None:  # most fit every autoencoder
        """Check that it fits an autoencoder.

        Raises:
            UserError: it does not.
        """

    def for_width(self, d_in: int) -> Self:
        """Return the same remedy with the settings that depend on the width of the activations."""
        return self

    def loss(self, left: LeftOver, whole: Residuals | None = None) -> Float[Tensor, ""]:
        """Return the loss of the dead latents, before its weight, in plain autograd.

        Args:
            left: what the live latents leave unexplained.
            whole: measures of the batch of which `left` is a part; the mean of the parts' losses,
                weighted by their numbers of vectors, is then the loss of the batch.
        """
        return left.residual.new_zeros(())

    def measure(self, left: LeftOver) -> Float[Tensor, ""]:
        """Return what `loss` needs of a batch besides the residuals: a sum over its vectors."""
        return left.residual.new_zeros(())

    def renew(self, trained: Trained) -> Int[Tensor, " renewed"] | None:
        """Resample dead latents before the next step, if it is time to.

        Returns:
            The latents that were resampled; None or an empty tensor if there are none.
        """
        return None
