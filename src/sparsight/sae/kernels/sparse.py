"""Select without gradients, differentiate only through what was selected.

At k ≪ n_latents one product is dense, the pre-activations; and they are needed for the choice
alone. So the choice is made in tiles of rows, without autograd, and the backward passes touch the k
rows of each vector: the gradient of the code is k dot products, those of the weights are sums over
the vectors that chose a latent. Sums run in a fixed order, so that equal input gives equal bits.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from sparsight.sae.kernels.interface import Precision

# Torch says once a process that its sparse tensors are "in beta state"; what is used is tested.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 1), check_invariants=False)

_TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Entries of the widest temporary: pre-activations of a tile, or gathered rows."""


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
    precision: Precision = "float32",
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """See `Backend.encode_topk`; latents come in rising order."""
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
    """See `Backend.decode_topk`."""
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
    low_bias = bias.bfloat16() if low else bias
    found = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    rows = _tile_rows(x, n_latents)
    for first in range(0, len(x), rows):
        tile = x[first : first + rows]
        scores = torch.addmm(low_bias, tile.to(weights.dtype), weights.T)
        chosen = scores.topk(candidates, dim=1, sorted=False).indices
        if low:
            exact = _chosen_products(tile, W_enc, chosen) + bias[chosen]
            chosen = chosen.gather(1, exact.topk(k, dim=1, sorted=False).indices)
        found[first : first + rows] = chosen.sort(dim=1).values
    return found


def _tile_rows(x: Tensor, width: int) -> int:
    return max(1, _TILE_ELEMENTS.get(x.device.type, 1 << 22) // width)


def _chosen_products(
    x: Float[Tensor, "batch d_in"], W: Float[Tensor, "n d_in"], indices: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k"]:
    """Dot products of each vector with its own k rows."""
    if x.device.type in ("cpu", "cuda") and x.dtype in (torch.float32, torch.float64):
        k = indices.shape[1]
        places = torch.sparse_csr_tensor(
            torch.arange(0, indices.numel() + 1, k, device=x.device),
            indices.flatten(),
            x.new_zeros(indices.numel()),
            (len(x), len(W)),
            check_invariants=False,
        )
        products: Tensor = torch.sparse.sampled_addmm(places, x.contiguous(), W.T, beta=0.0)
        return products.values().view_as(indices)
    out = x.new_empty(indices.shape)
    rows = _tile_rows(x, indices.shape[1] * x.shape[1])
    for first in range(0, len(x), rows):
        part = slice(first, first + rows)
        out[part] = torch.bmm(W[indices[part]], x[part, :, None])[..., 0]
    return out


def _weighted_rows(
    values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"], W: Float[Tensor, "n d_in"]
) -> Float[Tensor, "batch d_in"]:
    return functional.embedding_bag(indices, W, per_sample_weights=values, mode="sum")


class _ByLatent(NamedTuple):
    """The pairs of vector and latent in the order of the latents: a transposed code."""

    pairs: Int[Tensor, " batch_times_k"]
    vectors: Int[Tensor, " batch_times_k"]
    starts: Int[Tensor, " n_latents"]

    @classmethod
    def of(cls, indices: Int[Tensor, "batch k"], n_latents: int) -> _ByLatent:
        flat = indices.flatten()
        pairs = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=n_latents)
        return cls(pairs, pairs // indices.shape[1], counts.cumsum(dim=0) - counts)

    def sums(
        self, values: Float[Tensor, "batch k"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "n_latents d_in"]:
        """For each latent the sum of the vectors that chose it, weighted by `values`."""
        weights = values.flatten()[self.pairs]
        return functional.embedding_bag(
            self.vectors, x, self.starts, per_sample_weights=weights, mode="sum"
        )


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
        grad = grad.contiguous()
        by_latent = _ByLatent.of(indices, len(W_enc))
        grad_b_enc = by_latent.sums(grad, grad.new_ones(len(grad), 1))[:, 0]
        grad_W_enc = grad_b_dec = grad_x = None
        if ctx.needs_input_grad[1]:
            # Σ g (x − b_dec), with the bias's part taken out of the sum.
            grad_W_enc = by_latent.sums(grad, x).addr_(grad_b_enc, b_dec, alpha=-1)
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
        grad = grad.contiguous()
        grad_values = grad_W_dec = None
        if ctx.needs_input_grad[0]:
            grad_values = _chosen_products(grad, W_dec, indices)
        if ctx.needs_input_grad[2]:
            grad_W_dec = _ByLatent.of(indices, len(W_dec)).sums(values, grad)
        return grad_values, None, grad_W_dec
