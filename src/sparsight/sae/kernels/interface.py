"""What a back end of the kernels offers."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

Precision = Literal["float32", "bfloat16"]
"""Of the product that selects latents; what was selected is scored in the precision of x."""


@runtime_checkable
class Backend(Protocol):
    """Two differentiable functions; a module that has them is a back end."""

    def encode_topk(
        self,
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
            precision: of the selection; with "bfloat16" some more than k are chosen and then
                scored again in the precision of `x`.

        Returns:
            Values, and the latents they belong to, in an order that the back end chooses.
        """

    def decode_topk(
        self,
        values: Float[Tensor, "batch k"],
        indices: Int[Tensor, "batch k"],
        W_dec: Float[Tensor, "n_latents d_in"],
        b_dec: Float[Tensor, " d_in"],
    ) -> Float[Tensor, "batch d_in"]:
        """The sum of the chosen decoder rows, weighted by `values`, and the bias."""
