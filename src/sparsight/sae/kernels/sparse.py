"""Select without gradients, differentiate only through what was selected.

At k ≪ n_latents one product is dense, the pre-activations; and they are needed for the choice
alone. So the choice is made in tiles of rows, without autograd, and the backward passes touch the k
rows of each vector: the gradient of the code is k dot products, those of the weights are sums over
the vectors that chose a latent, taken as one sparse product.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

Precision = Literal["float32", "bfloat16"]

# Said once by torch for any CSR tensor; the product that is used here is tested.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

_TILE_ELEMENTS = 1 << 22
"""Entries of the widest temporary: pre-activations of a tile, or gathered rows."""


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
    precision: Precision = "float32",
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest of `W_enc (x - b_dec) + b_enc`, at least 0, with gradients to all four.

    Args:
        x: the vectors.
        W_enc: encoder rows.
        b_enc: encoder bias.
        b_dec: decoder bias, subtracted first.
        k: how many.
        precision: of the selection; with "bfloat16" some more are chosen and then scored again in
            the precision of `x`.

    Returns:
        Values, and the latents they belong to, in no particular order.
    """
    with torch.no_grad():
        indices = _select(x.detach(), W_enc.detach(), b_enc.detach(), b_dec.detach(), k, precision)
    chosen: Tensor = _ScoreChosen.apply(x, W_enc, b_enc, b_dec, indices)  # type: ignore[no-untyped-call]
    return chosen.relu(), indices


def decode_topk(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "n_latents d_in"],
    b_dec: Float[Tensor, " d_in"],
) -> Float[Tensor, "batch d_in"]:
    """The sum of the chosen decoder rows, weighted by `values`, and the bias."""
    decoded: Tensor = _Decode.apply(values, indices, W_dec)  # type: ignore[no-untyped-call]
    return decoded + b_dec


def _select(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, precision: Precision
) -> Int[Tensor, "batch k"]:
    n_latents = len(W_enc)
    bias = b_enc - W_enc @ b_dec
    low = precision == "bfloat16" and x.dtype == torch.float32
    # In bfloat16 a quarter more candidates than k hold the true k; exact scores then decide.
    candidates = min(n_latents, k + max(k // 4, 8)) if low else k
    weights = W_enc.bfloat16() if low else W_enc
    found = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    rows = max(1, _TILE_ELEMENTS // n_latents)
    for first in range(0, len(x), rows):
        tile = x[first : first + rows]
        if not low:
            scores = torch.addmm(bias, tile, weights.T)
            found[first : first + rows] = scores.topk(k, dim=1, sorted=False).indices
            continue
        scores = torch.addmm(bias.bfloat16(), tile.bfloat16(), weights.T)
        wide = scores.topk(candidates, dim=1, sorted=False).indices
        exact = _chosen_products(tile, W_enc, wide) + bias[wide]
        found[first : first + rows] = wide.gather(1, exact.topk(k, dim=1, sorted=False).indices)
    return found


def _chosen_products(
    x: Float[Tensor, "batch d_in"], W: Float[Tensor, "n d_in"], indices: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k"]:
    """Dot products of each vector with its own k rows."""
    out = x.new_empty(indices.shape)
    rows = max(1, _TILE_ELEMENTS // (indices.shape[1] * x.shape[1]))
    for first in range(0, len(x), rows):
        part = slice(first, first + rows)
        out[part] = torch.bmm(W[indices[part]], x[part, :, None])[..., 0]
    return out


def _weighted_rows(
    values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"], W: Float[Tensor, "n d_in"]
) -> Float[Tensor, "batch d_in"]:
    return functional.embedding_bag(indices, W, per_sample_weights=values, mode="sum")


def _sum_by_latent(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    x: Float[Tensor, "batch d_in"],
    n_latents: int,
) -> Float[Tensor, "n_latents d_in"]:
    """For each latent the sum of the vectors that chose it, weighted by `values`."""
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    starts = torch.zeros(n_latents + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(torch.bincount(flat, minlength=n_latents), dim=0, out=starts[1:])
    by_latent = torch.sparse_csr_tensor(
        starts,
        order // indices.shape[1],
        values.flatten()[order],
        (n_latents, len(x)),
        check_invariants=False,
    )
    return by_latent @ x


class _ScoreChosen(Function):
    """Pre-activations of chosen latents: W_enc[i] · (x − b_dec) + b_enc[i]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, indices: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec, indices)
        return _chosen_products(x - b_dec, W_enc, indices) + b_enc[indices]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, W_enc, b_dec, indices = ctx.saved_tensors
        ones = grad.new_ones(len(grad), 1)
        grad_b_enc = _sum_by_latent(grad, indices, ones, len(W_enc))[:, 0]
        grad_W_enc = grad_b_dec = grad_x = None
        if ctx.needs_input_grad[1]:
            # Σ g (x − b_dec), with the bias's part taken out of the sum.
            grad_W_enc = _sum_by_latent(grad, indices, x, len(W_enc))
            grad_W_enc = grad_W_enc.addr_(grad_b_enc, b_dec, alpha=-1)
        if ctx.needs_input_grad[3]:
            grad_b_dec = -(grad_b_enc @ W_enc)
        if ctx.needs_input_grad[0]:
            grad_x = _weighted_rows(grad, indices, W_enc)
        return grad_x, grad_W_enc, grad_b_enc, grad_b_dec, None


class _Decode(Function):
    """Σ value · W_dec[i], with gradients to the values and to the rows in use."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        return _weighted_rows(values, indices, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        values, indices, W_dec = ctx.saved_tensors
        grad_values = grad_W_dec = None
        if ctx.needs_input_grad[0]:
            grad_values = _chosen_products(grad, W_dec, indices)
        if ctx.needs_input_grad[2]:
            grad_W_dec = _sum_by_latent(values, indices, grad.contiguous(), len(W_dec))
        return grad_values, None, grad_W_dec
