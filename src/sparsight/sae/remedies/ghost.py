"""Ghost gradients: dead latents, with an exponential activation, model half of the residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from sparsight.config import check_types
from sparsight.errors import UserError
from sparsight.sae.remedies.base import LeftOver, Remedy, Residuals


@dataclass(frozen=True)
class GhostGradients(Remedy):
    """Let dead latents, with exponential activations, model the residual of the live ones.

    For latents without an activation in the last `dead_after` vectors: g = Σ exp(s_i) W_dec[i],
    scaled to half the norm of the residual e; the loss is ‖g − e‖², rescaled to the size of the
    reconstruction's (Jermyn & Templeton 2024, "Ghost grads", Anthropic's circuits update of
    January). The scales and e get no gradient.

    Meant for ReLU, whose dead latents have no activation that AuxK could use. With TopK, AuxK is
    the better remedy: here all ghosts are pulled in the same direction.
    """

    word: ClassVar[str] = "ghost"
    label: ClassVar[str] = "ghost gradients"

    dead_after: int | None = None
    """A latent counts as dead after this many vectors without an activation; default: as in
    `AuxK`."""

    def __post_init__(self) -> None:
        check_types(self, "remedy.")
        if self.dead_after is not None and self.dead_after < 1:
            raise UserError(f"remedy.dead_after is {self.dead_after}; it must be at least 1.")

    @property
    def weight(self) -> float:
        """See `Remedy.weight`."""
        return 1.0

    @property
    def window(self) -> int | None:
        """See `Remedy.window`."""
        return self.dead_after

    def loss(self, left: LeftOver, whole: Residuals | None = None) -> Float[Tensor, ""]:
        """See `Remedy.loss`."""
        scale = None
        if whole is not None:
            scale = (whole.squared / whole.measured.clamp(min=1e-30)).to(left.W_dec.dtype)
        unit = len(left.residual) * left.variance
        return ghost_loss(left.scores, left.residual, left.W_dec, left.dead, scale) / unit

    def measure(self, left: LeftOver) -> Float[Tensor, ""]:
        """See `Remedy.measure`; here, the error of the ghosts."""
        return ghost_error(left.scores, left.residual, left.W_dec, left.dead)


def ghost_loss(
    scores: Float[Tensor, "batch n_latents"],
    residual: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "n_latents d_out"],
    dead: Int[Tensor, " dead"],
    scale: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Return Σ‖g − e‖² of ghost gradients, rescaled to Σ‖e‖²; see `GhostGradients`.

    Args:
        scores: pre-activations.
        residual: e = z − ẑ; its gradient is not used.
        W_dec: decoder rows.
        dead: the latents that count as dead.
        scale: the factor, if it is not to be measured on only these vectors.

    Returns:
        The loss: its value is Σ‖e‖², its gradient is that of the ghosts.
    """
    error = ghost_error(scores, residual, W_dec, dead)
    if scale is None:
        scale = residual.detach().square().sum() / error.detach().clamp(min=1e-30)
    return error * scale


def ghost_error(
    scores: Float[Tensor, "batch n_latents"],
    residual: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "n_latents d_out"],
    dead: Int[Tensor, " dead"],
) -> Float[Tensor, ""]:
    """Return Σ‖g − e‖² for ghosts g of half the norm of e; arguments as in `ghost_loss`."""
    target = residual.detach()
    # A factor per vector prevents overflow of the exponential; the scaling below cancels it.
    of_dead = scores[:, dead]
    ghosts = (of_dead - of_dead.detach().amax(dim=1, keepdim=True)).exp() @ W_dec[dead]
    norms = target.norm(dim=1, keepdim=True)
    scale = norms / (2 * ghosts.detach().norm(dim=1, keepdim=True)).clamp(min=1e-30)
    error: Tensor = (ghosts * scale - target).square().sum()
    return error
