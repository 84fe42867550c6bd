"""Begin anew with dead latents, at vectors that are reconstructed badly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from sparsight.kernels import backend
from sparsight.sae import Archetypal, SparseAutoencoder
from sparsight.sae.dictionary import unit_rows
from sparsight.sae.objectives import SEED_STRIDE

PER_LATENT = frozenset(
    {"W_enc", "b_enc", "W_dec", "r_mag", "b_mag", "threshold", "mixture", "relaxation"}
)
"""Parameters that have a row a latent."""


@torch.no_grad()
def resample(
    sae: SparseAutoencoder,
    z: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    dead: Int[Tensor, " dead"],
    moments: Mapping[str, tuple[Tensor, Tensor]],
    *,
    scale: float,
    seed: tuple[int, int],
) -> Int[Tensor, " renewed"]:
    """Give dead latents the directions of vectors drawn by the square of their loss; see
    `Resampling`.

    Args:
        sae: changed in place.
        z: activations in normalised space.
        target: what they are to be reconstructed as; `z`, unless the SAE is a transcoder.
        dead: the latents.
        moments: of Adam, by parameter; changed in place.
        scale: as in `Resampling`.
        seed: of the run, and the step.

    Returns:
        The latents that were renewed: at most as many as there are vectors.
    """
    weights, sparsity = sae.weights(), sae.config.sparsity
    code = sparsity.encode(weights, z, training=True)
    z_hat = backend().decode(code.values, code.indices, code.offsets, weights.W_dec, weights.b_dec)
    if sae.config.skip:
        z_hat = z_hat + z @ sae.W_skip.T
    loss = (z_hat - target).double().square().sum(dim=1).cpu()
    generator = torch.Generator().manual_seed((seed[0] * SEED_STRIDE + seed[1]) % 2**63)
    odds = (loss / loss.amax().clamp(min=1e-300)).square().clamp(min=1e-30)
    n = min(len(dead), len(z))
    drawn = torch.multinomial(odds, n, generator=generator).to(z.device)
    renewed = dead[:n]
    alive = torch.ones(sae.n_latents, dtype=torch.bool, device=z.device)
    alive[dead] = False
    norms = sae.W_enc.norm(dim=1)
    usual = norms[alive].mean() if bool(alive.any()) else norms.mean()
    inward = unit_rows(z[drawn] - weights.centre)
    sae.W_enc[renewed] = scale * usual * inward
    sae.b_enc[renewed] = 0
    outward = unit_rows(target[drawn] - sae.b_dec) if sae.is_transcoder else inward
    if isinstance(sae.config.dictionary, Archetypal):
        # Rows cannot be anywhere: the anchor of the nearest direction takes the vector's place.
        nearest = (outward @ unit_rows(sae.anchors).T).argmax(dim=1)
        sae.mixture[renewed] = functional.one_hot(nearest, len(sae.anchors)).to(sae.mixture)
        sae.relaxation[renewed] = 0
        sae.constrain()
    else:
        sae.W_dec[renewed] = outward
    for name, start in sparsity.start(sae.n_latents).items():
        if name in PER_LATENT and getattr(sae, name).ndim:
            own = getattr(sae, name)
            own[renewed] = start.to(own)[renewed]
    for name in PER_LATENT & set(moments):
        for moment in moments[name]:
            moment[renewed] = 0
    return renewed
