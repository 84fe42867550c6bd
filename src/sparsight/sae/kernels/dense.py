"""The operations in plain autograd: slow, and right by inspection."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from sparsight.sae.kernels.interface import Precision


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
    precision: Precision = "float32",
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """See `Backend.encode_topk`; always in the precision of `x`."""
    top = ((x - b_dec) @ W_enc.T + b_enc).topk(k, dim=-1)
    return top.values.relu(), top.indices


def decode_topk(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "n_latents d_in"],
    b_dec: Float[Tensor, " d_in"],
) -> Float[Tensor, "batch d_in"]:
    """See `Backend.decode_topk`."""
    code = values.new_zeros(len(values), len(W_dec)).scatter(1, indices, values)
    return code @ W_dec + b_dec
