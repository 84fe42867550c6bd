"""The operations in plain autograd: slow, and right by inspection."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest of `W_enc (x - b_dec) + b_enc`, at least 0."""
    top = ((x - b_dec) @ W_enc.T + b_enc).topk(k, dim=-1)
    return top.values.relu(), top.indices


def decode_topk(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "n_latents d_in"],
    b_dec: Float[Tensor, " d_in"],
) -> Float[Tensor, "batch d_in"]:
    """The sum of the chosen decoder rows, weighted by `values`, and the bias."""
    code = values.new_zeros(len(values), len(W_dec)).scatter(1, indices, values)
    return code @ W_dec + b_dec
