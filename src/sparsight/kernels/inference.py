"""Selection for a whole call by the fastest means available: compiled if it pays, else torch."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.kernels import bounds, selection
from sparsight.kernels.interface import Precision
from sparsight.kernels.native import library

compiled = True
"""Whether compiled code may be used; `sparsight.kernels.using` changes it."""

FEWEST = 256
"""Number of vectors per call from which copying the encoder into low precision pays."""


def strongest_latents(
    x: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "n_latents d_in"],
    b: Float[Tensor, " n_latents"],
    k: int,
    precision: Precision | None = None,
) -> Int[Tensor, "batch k"]:
    """Return the latents of the k largest scores `W x + b` of each vector, in ascending order.

    Args:
        x: vectors, with the decoder's bias subtracted.
        W: encoder rows.
        b: encoder bias.
        k: number of latents.
        precision: precision of the selection; None is the fastest that gives the same latents.
    """
    if precision in (None, "int8") and _native_pays(x):
        W, b = W.to(x.dtype).contiguous(), b.to(x.dtype).contiguous()
        out = (x.new_empty(len(x), k), library.int32(len(x), k))
        library.Dictionary(W, b, "int8", x).topk(x.contiguous(), W, b, k, out=out)
        return out[1].long()
    return _select(x, W, b, k, precision)[1]


def latents_above(
    x: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "n_latents d_in"],
    b: Float[Tensor, " n_latents"],
    threshold: float,
) -> tuple[Float[Tensor, " found"], Int[Tensor, " found"], Int[Tensor, " batch"]]:
    """Return all scores that reach a threshold, their latents, and how many each vector has."""
    if threshold > -math.inf and _native_pays(x):
        W, b = W.to(x.dtype).contiguous(), b.to(x.dtype).contiguous()
        return library.Dictionary(W, b, "int8", x).above(x.contiguous(), W, b, threshold)
    return selection.exact_above(x, W, b, threshold, _decide(x))


def batch_topk(
    x: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "n_latents d_in"],
    b: Float[Tensor, " n_latents"],
    k: int,
) -> tuple[Float[Tensor, " found"], Int[Tensor, " found"], Int[Tensor, " batch"]]:
    """Return the k · batch largest scores of all, their latents, and how many each vector has."""
    return selection.batch_topk(x, W, b, k, lambda x, k: _select(x, W, b, k))


def _select(
    x: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "n_latents d_in"],
    b: Float[Tensor, " n_latents"],
    k: int,
    precision: Precision | None = None,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return scores and latents, in plain torch."""
    if precision is None and (x.dtype != torch.float32 or len(x) < FEWEST):
        return selection.select_exactly(x, W, b, k, decide=_decide(x))
    if precision in (None, "int8"):
        if x.dtype == W.dtype == torch.float32 and len(x) >= FEWEST:
            if bounds.fast_int8(x.device):
                made: bounds.Bounds = bounds.Int8Bounds(bounds.Int8Encoder(W), x, b)
                return bounds.select_surely(x, W, b, k, made, decide=_decide(x))[:2]
            if bounds.fast_bfloat16(x.device):
                made = bounds.Bfloat16Bounds(x, W, b)
                return bounds.select_surely(x, W, b, k, made, decide=_decide(x))[:2]
        precision = "float32"
    return selection.select_topk(x, W, b, k, precision)


def _native_pays(x: Tensor) -> bool:
    return len(x) >= FEWEST and _native(x)


def _native(x: Tensor) -> bool:
    return (
        compiled
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and library.multiplies_int8()
    )


def _decide(x: Tensor) -> selection.Decide | None:
    """Return what scores latents when rounding would decide: the same for calls of all sizes."""
    if _native(x):
        return library.scores
    return selection.ragged_scores if x.dtype in (torch.float32, torch.float64) else None
