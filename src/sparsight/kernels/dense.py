"""The operations in plain autograd: slow, but verifiable by reading."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from sparsight.kernels.interface import Precision


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
    precision: Precision | None = None,
    *,
    rectify: bool = True,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """See `Backend.encode_topk`; always in the precision of `x`."""
    top = ((x - b_dec) @ W_enc.T + b_enc).topk(k, dim=-1)
    return top.values.relu() if rectify else top.values, top.indices


def decode_topk(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "n_latents d_in"],
    b_dec: Float[Tensor, " d_in"],
) -> Float[Tensor, "batch d_in"]:
    """See `Backend.decode_topk`."""
    code = values.new_zeros(len(values), len(W_dec)).scatter(1, indices, values)
    return code @ W_dec + b_dec


def encode_batch_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
) -> tuple[Float[Tensor, " active"], Int[Tensor, " active"], Int[Tensor, " batch_plus_one"]]:
    """See `Backend.encode_batch_topk`."""
    scores = (x - b_dec) @ W_enc.T + b_enc
    kept = torch.zeros_like(scores, dtype=torch.bool).flatten()
    kept[scores.flatten().topk(k * len(x)).indices] = True
    return _ragged(scores, kept.view_as(scores))


def encode_above(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_in"],
    threshold: float,
) -> tuple[Float[Tensor, " active"], Int[Tensor, " active"], Int[Tensor, " batch_plus_one"]]:
    """See `Backend.encode_above`."""
    scores = (x - b_dec) @ W_enc.T + b_enc
    return _ragged(scores, scores >= threshold)


def decode(
    values: Float[Tensor, " active"],
    indices: Int[Tensor, " active"],
    starts: Int[Tensor, " batch_plus_one"],
    W_dec: Float[Tensor, "n_latents d_in"],
    b_dec: Float[Tensor, " d_in"],
) -> Float[Tensor, "batch d_in"]:
    """See `Backend.decode`."""
    rows = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff().cpu())
    code = values.new_zeros(len(starts) - 1, len(W_dec))
    code = code.index_put((rows.to(values.device), indices), values)
    return code @ W_dec + b_dec


def _ragged(
    scores: Float[Tensor, "batch n_latents"], kept: Bool[Tensor, "batch n_latents"]
) -> tuple[Float[Tensor, " active"], Int[Tensor, " active"], Int[Tensor, " batch_plus_one"]]:
    starts = functional.pad(kept.sum(dim=1).cumsum(0), (1, 0))
    return scores[kept].relu(), kept.nonzero()[:, 1], starts
