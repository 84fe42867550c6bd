"""The initial values of the parameters."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.kernels import backend
from sparsight.sae.config import Archetypal, SAEConfig
from sparsight.sae.dictionary import archetypal_rows, archetypal_start, unit_rows
from sparsight.sae.sparsity import Weights

WEISZFELD_STEPS = 100
MEASURED = 4096
"""Number of vectors of the sample on which the encoder's scale is measured."""
DENSE_ENTRIES = 2**24
"""Number of entries of a dense code that are held at a time."""
DATA_SHARE = 0.8
"""Share of a data point's direction in a decoder row that starts from data."""


def initial_parameters(
    d_in: int,
    config: SAEConfig,
    seed: int,
    sample: Float[Tensor, "batch d_in"] | None = None,
    d_out: int | None = None,
) -> dict[str, Tensor]:
    """Make decoder rows with norm 1, an encoder proportional to them, and biases as configured.

    The factor is chosen so that the reconstruction has the mean squared norm of x, as in the code
    of Gao et al. 2024; if latents have thresholds, approximately. A transcoder's encoder has random
    rows, like its decoder.

    Args:
        d_in: width of the activations.
        config: the SAE's configuration.
        seed: seed of the decoder rows.
        sample: some activations in normalised space; standard normal ones by default.
        d_out: width of a transcoder's target.

    Returns:
        `W_enc`, `b_enc`, `W_dec`, `b_dec`, and any further parameters of the parts.
    """
    generator = torch.Generator().manual_seed(seed)
    n_latents = config.width(d_in)
    rows = _directions(n_latents, d_in, generator)
    if sample is None:
        sample = torch.randn(256, d_in, generator=generator)
    W_dec = rows if d_out is None else _directions(n_latents, d_out, generator)
    b_dec = torch.zeros(d_out or d_in)
    if d_out is None and config.b_dec_init == "mean":
        b_dec = sample.double().mean(dim=0).float()
    elif d_out is None and config.b_dec_init == "geometric_median":
        b_dec = geometric_median(sample)
    if config.decoder_init == "data":
        centre = b_dec if d_out is None else 0
        rows = _from_data(rows, sample - centre, generator)
        W_dec = rows if d_out is None else W_dec
    extra = config.sparsity.start(n_latents)
    if isinstance(config.dictionary, Archetypal):
        extra |= archetypal_start(config.dictionary, n_latents, sample, generator)
        W_dec = archetypal_rows(extra)
        rows = unit_rows(W_dec)
    b_enc = torch.zeros(n_latents)
    start = {"W_enc": rows, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, **extra}
    if config.skip:
        start["W_skip"] = torch.zeros(d_out or d_in, d_in)
    if config.tied:
        return start
    measured = sample[:MEASURED]
    centre = b_dec if config.subtract_b_dec else torch.zeros(d_in)
    weights = Weights(rows, b_enc, W_dec, torch.zeros_like(b_dec), centre, extra)
    x_hat = _reconstruction(config, weights, measured)
    target = measured - b_dec if d_out is None else measured
    ratio = target.square().sum() / x_hat.square().sum().clamp(min=1e-12)
    start["W_enc"] = rows * ratio.sqrt()
    return start


def _reconstruction(
    config: SAEConfig, weights: Weights, z: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "batch d_out"]:
    """Return ẑ without the decoder's bias."""
    sparsity = config.sparsity
    if hasattr(sparsity, "k"):
        code = sparsity.encode(weights, z, training=True)
        none = torch.zeros_like(weights.b_dec)
        return backend().decode(code.values, code.indices, code.offsets, weights.W_dec, none)
    # About half of all latents are still active: as sparse codes they would take minutes.
    parts = z.split(max(1, DENSE_ENTRIES // len(weights.W_enc)))
    codes = (sparsity.dense(weights, part, training=True).code for part in parts)
    return torch.cat([code @ weights.W_dec for code in codes])


def blank_parameters(d_in: int, config: SAEConfig, d_out: int | None = None) -> dict[str, Tensor]:
    """Return the same tensors without values, for loading: drawing random ones takes seconds."""
    n_latents, width = config.width(d_in), d_out or d_in
    start = {
        "W_enc": torch.empty(n_latents, d_in),
        "b_enc": torch.empty(n_latents),
        "W_dec": torch.empty(n_latents, width),
        "b_dec": torch.empty(width),
        **config.sparsity.start(n_latents),
    }
    if isinstance(config.dictionary, Archetypal):
        n_anchors = config.dictionary.n_anchors
        start["anchors"] = torch.empty(n_anchors, d_in)
        start["mixture"] = torch.empty(n_latents, n_anchors)
        start["relaxation"] = torch.empty(n_latents, d_in)
        start["log_multiplier"] = torch.empty(())
    if config.skip:
        start["W_skip"] = torch.empty(width, d_in)
    return start


def geometric_median(
    x: Float[Tensor, "batch d_in"], tolerance: float = 1e-6
) -> Float[Tensor, " d_in"]:
    """Return the point with the least sum of distances to all vectors, by Weiszfeld's iteration."""
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


def _directions(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    return unit_rows(torch.randn(n, d, generator=generator))


def _from_data(
    rows: Float[Tensor, "n d"], x: Float[Tensor, "batch d"], generator: torch.Generator
) -> Float[Tensor, "n d"]:
    """Mix random directions with those of data points, repeating these as rarely as possible."""
    rounds = -(-len(rows) // len(x))
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(rounds)])
    chosen = unit_rows(x[order[: len(rows)]])
    return unit_rows(DATA_SHARE * chosen + (1 - DATA_SHARE) * rows)
