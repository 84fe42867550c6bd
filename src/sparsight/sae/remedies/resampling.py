"""Resampling: reinitialise dead latents at vectors that are badly reconstructed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from sparsight.config import check_types
from sparsight.errors import UserError
from sparsight.kernels import backend
from sparsight.kernels.plan import SEED_STRIDE
from sparsight.sae.autoencoder import SparseAutoencoder
from sparsight.sae.config import Archetypal, SAEConfig
from sparsight.sae.dictionary import unit_rows
from sparsight.sae.remedies.base import PER_LATENT, Remedy, Trained


@dataclass(frozen=True)
class Resampling(Remedy):
    """Reinitialise dead latents at vectors that are badly reconstructed.

    A vector is drawn with probability proportional to the square of its loss. Its direction from
    b_dec becomes the decoder row, with norm 1, and the encoder row, with `scale` times the mean
    norm of the live ones; the bias and Adam's moments become 0 (Bricken et al. 2023, "Towards
    monosemanticity", appendix "Neuron resampling"). Each vector of the current batch is used at
    most once; if there are more dead latents than vectors, the rest follow with the next batches.

    Meant for ReLU, JumpReLU and Gated. With TopK, resampled latents soon die again; use AuxK there.
    """

    word: ClassVar[str] = "resampling"
    label: ClassVar[str] = "resampling"
    fusable: ClassVar[bool] = True
    renews: ClassVar[bool] = True

    every: int | None = None
    """Vectors between resamplings; default: a tenth of the run."""

    times: int = 4
    """Largest number of resamplings."""

    dead_after: int | None = None
    """A latent counts as dead after this many vectors without an activation; default: half of
    `every`."""

    scale: float = 0.2
    """Norm of a new encoder row, relative to live latents' rows. New latents are similar, and many
    are active for the same vector: with 1 they would drown out what the others have learnt."""

    def __post_init__(self) -> None:
        check_types(self, "remedy.")
        for name in ("every", "times", "dead_after", "scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"remedy.{name} is {value}; it must be positive.")

    def check(self, sae: SAEConfig) -> None:
        """See `Remedy.check`."""
        if sae.tied:
            raise UserError(
                "resampling needs an encoder of its own, which can start weak; with tied weights, "
                "choose the remedy auxk."
            )

    def interval(self, length: int) -> int:
        """Return the number of vectors between resamplings, in a run of `length` vectors."""
        return self.every or max(1, length // 10)

    def renew(self, trained: Trained) -> Int[Tensor, " renewed"] | None:
        """See `Remedy.renew`."""
        step, size = trained.step, len(trained.z)
        interval = self.interval(trained.length)
        every = max(1, round(interval / size))
        instalments = math.ceil(trained.sae.n_latents / size)
        if not 1 <= step // every <= self.times or step % every >= instalments:
            return None
        # Later instalments take latents that were dead at the first, not those that it killed.
        since = (self.dead_after or max(1, interval // 2)) + step % every * size
        dead = (trained.since_fired >= since).nonzero()[:, 0]
        if len(dead) == 0:
            return None
        return resample(
            trained.sae,
            trained.z,
            trained.target,
            dead,
            trained.moments,
            scale=self.scale,
            seed=(trained.seed, step),
        )


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
    """Give dead latents the directions of vectors drawn by the square of their loss.

    See `Resampling`.

    Args:
        sae: the SAE; changed in place.
        z: activations in normalised space.
        target: the target of the reconstruction: `z`, unless the SAE is a transcoder.
        dead: the dead latents.
        moments: Adam's moments, by parameter; changed in place.
        scale: as in `Resampling`.
        seed: seed of the run, and number of the step.

    Returns:
        The latents that were resampled: at most as many as there are vectors.
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
        # Rows are constrained: use the anchor with the nearest direction instead of the vector.
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
