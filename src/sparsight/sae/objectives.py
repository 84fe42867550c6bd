"""What training minimises."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.kernels import decode_topk, encode_topk


def auxk_loss(
    sae: SparseAutoencoder,
    z: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " n_latents"],
    k: int,
) -> Float[Tensor, ""] | None:
    """How badly the dead latents model what the living ones leave over.

    ê = Σ f_i W_dec[i] over the k strongest dead latents of each vector, e = z − ẑ without
    gradient; the loss is Σ‖e − ê‖² / Σ‖e − ē‖², ē the batch's mean of e (Gao et al. 2024, appendix
    A.2). The bias b_dec is no part of ê, as it is none of e.

    Args:
        sae: the autoencoder.
        z: activations in normalised space.
        residual: z − ẑ; its gradient is not used.
        dead: which latents count as dead.
        k: how many of them at most.

    Returns:
        The loss, before its weight; None where no latent is dead or nothing is left over.
    """
    which: Int[Tensor, " dead"] = dead.nonzero()[:, 0]
    if len(which) == 0:
        return None
    target = residual.detach()
    spread = (target - target.mean(dim=0)).square().sum()
    if spread == 0:
        return None
    values, indices = encode_topk(
        z, sae.W_enc[which], sae.b_enc[which], sae.b_dec, min(k, len(which))
    )
    W_dec = sae.W_dec[which]
    e_hat = decode_topk(values, indices, W_dec, W_dec.new_zeros(sae.d_in))
    return (target - e_hat).square().sum() / spread


def default_auxk(d_in: int) -> int:
    """The power of two nearest to half the width, the larger of two: the paper's rule of thumb."""
    half = max(d_in / 2, 1)
    below = 1 << (int(half).bit_length() - 1)
    return below if half - below < 2 * below - half else 2 * below
