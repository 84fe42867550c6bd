"""What every remedy for dead latents offers."""

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
    """What the living latents leave over of a batch, or of a part of one."""

    scores: Float[Tensor, "batch n_latents"]
    """Pre-activations, differentiable."""

    residual: Float[Tensor, "batch d_out"]
    """z − ẑ; its gradient is not used."""

    W_dec: Float[Tensor, "n_latents d_out"]
    """Decoder rows."""

    dead: Int[Tensor, " dead"]
    """The latents that count as dead, rising; one at least."""

    variance: float
    """Of the target: Σ over dimensions. The unit of the loss is batch · variance."""


class Residuals(NamedTuple):
    """What a remedy has to know of all of a batch when it sees a part of one."""

    n: int
    """Vectors of the batch."""

    squared: Float[Tensor, ""]
    """Σ‖e‖² of the residuals e, in float64."""

    spread: Float[Tensor, ""]
    """Σ‖e − ē‖², with ē the batch's mean."""

    measured: Float[Tensor, ""]
    """What `Remedy.measure` gave, summed over the parts in float64."""


class Trained(NamedTuple):
    """An SAE between two steps of its training."""

    sae: SparseAutoencoder
    """A remedy may change it, in place."""

    z: Float[Tensor, "batch d_in"]
    """The next batch, in normalised space."""

    target: Float[Tensor, "batch d_out"]
    """What it is to be reconstructed as: `z`, unless the SAE is a transcoder."""

    since_fired: Int[Tensor, " n_latents"]
    """Vectors since each latent was last active."""

    moments: Mapping[str, tuple[Tensor, Tensor]]
    """Of Adam, by parameter; a remedy may change them, in place."""

    step: int
    """Steps that are done."""

    length: int
    """Vectors of the run."""

    seed: int
    """Of the run."""


class Remedy:
    """Something for dead latents; subclasses are frozen dataclasses, the remedy's settings."""

    word: ClassVar[str]
    """What people write for it: `--remedy WORD`."""

    label: ClassVar[str]
    """What reports call it."""

    fusable: ClassVar[bool] = False
    """Whether the training steps without autograd compute it."""

    renews: ClassVar[bool] = False
    """Whether latents may begin anew with it; see `renew`."""

    @property
    def weight(self) -> float:
        """Of its loss; 0 for a remedy that has none."""
        return 0.0

    @property
    def aux_k(self) -> int:
        """Dead latents per vector that its loss uses, for the training steps without autograd."""
        return 0

    @property
    def window(self) -> int | None:
        """Vectors without an activation after which a latent counts as dead; None leaves it to the
        run."""
        return None

    def check(self, sae: SAEConfig) -> None:  # most fit every autoencoder
        """Make sure that it fits an autoencoder.

        Raises:
            UserError: it does not.
        """

    def for_width(self, d_in: int) -> Self:
        """The same with the settings that follow from the width of the activations."""
        return self

    def loss(self, left: LeftOver, whole: Residuals | None = None) -> Float[Tensor, ""]:
        """The loss of the dead latents, before its weight, in plain autograd.

        Args:
            left: what the living latents leave over.
            whole: of the batch that `left` is a part of; the mean of the parts' losses, by their
                numbers of vectors, is then the batch's.
        """
        return left.residual.new_zeros(())

    def measure(self, left: LeftOver) -> Float[Tensor, ""]:
        """What `loss` needs of a whole batch beside the residuals: a sum over its vectors."""
        return left.residual.new_zeros(())

    def renew(self, trained: Trained) -> Int[Tensor, " renewed"] | None:
        """Change dead latents before the next step, if it is time to.

        Returns:
            The latents that begin anew; None, or an empty tensor, where none does.
        """
        return None
