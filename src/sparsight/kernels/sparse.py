"""Select without gradients, and differentiate only through what was selected.

For k ≪ n_latents only one product is dense, the pre-activations, and they are needed only for the
selection. So the selection runs in tiles of rows, without autograd, and the backward passes touch
the k rows of each vector: the gradient of the code is k dot products, those of the weights are sums
over the vectors that chose a latent. Sums run in a fixed order, so equal input gives equal bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from sparsight.kernels.inference import batch_topk, latents_above, strongest_latents
from sparsight.kernels.interface import Precision
from sparsight.kernels.selection import ragged_products


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
    """See `Backend.encode_topk`; latents are in ascending order."""
    with torch.no_grad():
        indices = strongest_latents(x - b_dec, W_enc, b_enc, k, precision)
    starts = torch.arange(0, indices.numel() + 1, k, device=x.device)
    scores = _scores(x, W_enc, b_enc, b_dec, indices.flatten(), starts).view_as(indices)
    return scores.relu() if rectify else scores, indices


def encode_batch_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
) -> tuple[Float[Tensor, " active"], Int[Tensor, " active"], Int[Tensor, " batch_plus_one"]]:
    """See `Backend.encode_batch_topk`; the latents of a vector are in ascending order."""
    with torch.no_grad():
        _, indices, counts = batch_topk(x - b_dec, W_enc, b_enc, k)
        starts = functional.pad(counts.cumsum(0), (1, 0))
    return _scores(x, W_enc, b_enc, b_dec, indices, starts).relu(), indices, starts


def encode_above(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_in"],
    threshold: float,
) -> tuple[Float[Tensor, " active"], Int[Tensor, " active"], Int[Tensor, " batch_plus_one"]]:
    """See `Backend.encode_above`; the latents of a vector are in ascending order."""
    with torch.no_grad():
        _, indices, counts = latents_above(x - b_dec, W_enc, b_enc, threshold)
        starts = functional.pad(counts.cumsum(0), (1, 0))
    return _scores(x, W_enc, b_enc, b_dec, indices, starts).relu(), indices, starts


def decode_topk(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "n_latents d_in"],
    b_dec: Float[Tensor, " d_in"],
) -> Float[Tensor, "batch d_in"]:
    """See `Backend.decode_topk`."""
    starts = torch.arange(0, indices.numel() + 1, indices.shape[1], device=values.device)
    return decode(values.flatten(), indices.flatten(), starts, W_dec, b_dec)


def decode(
    values: Float[Tensor, " active"],
    indices: Int[Tensor, " active"],
    starts: Int[Tensor, " batch_plus_one"],
    W_dec: Float[Tensor, "n_latents d_in"],
    b_dec: Float[Tensor, " d_in"],
) -> Float[Tensor, "batch d_in"]:
    """See `Backend.decode`."""
    decoded: Tensor = _Decode.apply(values, indices, starts, W_dec)  # type: ignore[no-untyped-call]
    return decoded + b_dec


def _scores(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, indices: Tensor, starts: Tensor
) -> Float[Tensor, " active"]:
    chosen: Tensor = _ScoreChosen.apply(x, W_enc, b_enc, b_dec, indices, starts)  # type: ignore[no-untyped-call]
    return chosen


def _weighted_rows(
    values: Float[Tensor, " active"],
    indices: Int[Tensor, " active"],
    starts: Int[Tensor, " batch_plus_one"],
    W: Float[Tensor, "n d_in"],
) -> Float[Tensor, "batch d_in"]:
    return functional.embedding_bag(indices, W, starts[:-1], per_sample_weights=values, mode="sum")


class _ByLatent(NamedTuple):
    """The entries of a code ordered by latent: a transposed code."""

    entries: Int[Tensor, " active"]
    vectors: Int[Tensor, " active"]
    starts: Int[Tensor, " n_latents"]

    @classmethod
    def of(
        cls, indices: Int[Tensor, " active"], starts: Int[Tensor, " batch_plus_one"], n_latents: int
    ) -> _ByLatent:
        entries = indices.argsort(stable=True)
        rows = torch.arange(len(starts) - 1, device=starts.device)
        vectors = torch.repeat_interleave(rows, starts.diff(), output_size=len(indices))
        counts = torch.bincount(indices, minlength=n_latents)
        return cls(entries, vectors[entries], counts.cumsum(dim=0) - counts)

    def sums(
        self, values: Float[Tensor, " active"], x: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "n_latents d_in"]:
        """Return, for each latent, the sum of the vectors that chose it, weighted by `values`."""
        return functional.embedding_bag(
            self.vectors, x, self.starts, per_sample_weights=values[self.entries], mode="sum"
        )


class _ScoreChosen(Function):
    """Computes pre-activations of chosen latents: W_enc[i] · (x − b_dec) + b_enc[i]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        indices: Tensor,
        starts: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec, indices, starts)
        return ragged_products(x - b_dec, W_enc, starts, indices) + b_enc[indices]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, W_enc, b_dec, indices, starts = ctx.saved_tensors
        grad = grad.contiguous()
        by_latent = _ByLatent.of(indices, starts, len(W_enc))
        grad_b_enc = by_latent.sums(grad, grad.new_ones(len(x), 1))[:, 0]
        grad_W_enc = grad_b_dec = grad_x = None
        if ctx.needs_input_grad[1]:
            # Σ g (x − b_dec), with the bias's part taken out of the sum.
            grad_W_enc = by_latent.sums(grad, x).addr_(grad_b_enc, b_dec, alpha=-1)
        if ctx.needs_input_grad[3]:
            grad_b_dec = -(grad_b_enc @ W_enc)
        if ctx.needs_input_grad[0]:
            grad_x = _weighted_rows(grad, indices, starts, W_enc)
        return grad_x, grad_W_enc, grad_b_enc, grad_b_dec, None, None


class _Decode(Function):
    """Computes Σ value · W_dec[i], with gradients for the values and for the rows in use."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, starts: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, starts, W_dec)
        return _weighted_rows(values, indices, starts, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        values, indices, starts, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        grad_values = grad_W_dec = None
        if ctx.needs_input_grad[0]:
            grad_values = ragged_products(grad, W_dec, starts, indices)
        if ctx.needs_input_grad[3]:
            grad_W_dec = _ByLatent.of(indices, starts, len(W_dec)).sums(values, grad)
        return grad_values, None, None, grad_W_dec
