"""The few operations that an SAE is made of, as differentiable functions of tensors.

`sparse` touches k rows per vector wherever it can; `dense` is the same in plain autograd, the truth
that tests compare with. Start with `encode_topk` and `decode_topk`; `using` changes the back end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float, Int
from torch import Tensor

from sparsight.errors import UserError
from sparsight.sae.kernels import dense, sparse
from sparsight.sae.kernels.interface import Backend, Precision

__all__ = ["BACKENDS", "Backend", "Precision", "decode_topk", "encode_topk", "using"]

BACKENDS: dict[str, Backend] = {"sparse": sparse, "dense": dense}

_current: Backend = sparse


@contextmanager
def using(name: str) -> Iterator[None]:
    """Compute with another back end inside a `with`.

    Raises:
        UserError: there is no such back end.
    """
    global _current
    if name not in BACKENDS:
        raise UserError(f"No kernels are called {name!r}; there are: {', '.join(BACKENDS)}.")
    before, _current = _current, BACKENDS[name]
    try:
        yield
    finally:
        _current = before


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "n_latents d_in"],
    b_enc: Float[Tensor, " n_latents"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
    precision: Precision = "float32",
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k strongest latents of each vector; see `Backend.encode_topk`."""
    return _current.encode_topk(x, W_enc, b_enc, b_dec, k, precision)


def decode_topk(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "n_latents d_in"],
    b_dec: Float[Tensor, " d_in"],
) -> Float[Tensor, "batch d_in"]:
    """The reconstruction of a code; see `Backend.decode_topk`."""
    return _current.decode_topk(values, indices, W_dec, b_dec)
