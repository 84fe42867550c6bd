"""Where the parameters start."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.sae.config import SAEConfig
from sparsight.sae.kernels import decode_topk, encode_topk

WEISZFELD_STEPS = 100


def initial_parameters(
    d_in: int,
    config: SAEConfig,
    seed: int,
    sample: Float[Tensor, "batch d_in"] | None = None,
) -> dict[str, Tensor]:
    """Decoder rows random with norm 1, the encoder their multiple, biases as configured.

    The multiple is such that the reconstruction has the mean squared norm of x, as in the code
    beside Gao et al. 2024.

    Args:
        d_in: width of the activations.
        config: of the SAE.
        seed: of the decoder rows.
        sample: some activations in normalised space; without them standard normal ones stand in.

    Returns:
        `W_enc`, `b_enc`, `W_dec`, `b_dec`.
    """
    generator = torch.Generator().manual_seed(seed)
    n_latents = config.width(d_in)
    W_dec = torch.randn(n_latents, d_in, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    if sample is None:
        sample = torch.randn(256, d_in, generator=generator)
    b_dec = torch.zeros(d_in)
    if config.b_dec_init == "mean":
        b_dec = sample.double().mean(dim=0).float()
    elif config.b_dec_init == "geometric_median":
        b_dec = geometric_median(sample)
    b_enc = torch.zeros(n_latents)
    values, indices = encode_topk(sample, W_dec, b_enc, b_dec, config.sparsity.k)
    x_hat = decode_topk(values, indices, W_dec, torch.zeros(d_in))
    ratio = (sample - b_dec).square().sum() / x_hat.square().sum().clamp(min=1e-12)
    return {"W_enc": W_dec * ratio.sqrt(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}


def geometric_median(
    x: Float[Tensor, "batch d_in"], tolerance: float = 1e-6
) -> Float[Tensor, " d_in"]:
    """The point with the least sum of distances to all vectors, by Weiszfeld's iteration."""
    x = x.double()
    point = x.mean(dim=0)
    for _ in range(WEISZFELD_STEPS):
        weights = 1 / (x - point).norm(dim=1).clamp(min=1e-12)
        moved = (weights[:, None] * x).sum(dim=0) / weights.sum()
        if (moved - point).norm() <= tolerance * point.norm().clamp(min=1e-12):
            point = moved
            break
        point = moved
    return point.float()
