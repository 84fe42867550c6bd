"""Which positions of the residual stream to keep."""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from sparsight.errors import UserError

Tokens = Literal["all", "patches", "cls", "mean"]
"""`all` positions, only the image `patches`, the `cls` position, or the `mean` over the patches."""


def check_tokens(tokens: str, has_cls: bool) -> None:
    """Raise a `UserError` if `tokens` is unknown, or is `cls` and the model has none."""
    if tokens not in get_args(Tokens):
        choices = ", ".join(get_args(Tokens))
        raise UserError(f"Unknown tokens={tokens!r}. Choose one of: {choices}.")
    if tokens == "cls" and not has_cls:
        raise UserError(
            "tokens='cls': this model has no CLS position. Use 'all', 'patches' or 'mean'."
        )


def select_tokens(
    x: Float[Tensor, "batch positions d_in"], tokens: Tokens, n_prefix: int, has_cls: bool
) -> Float[Tensor, "batch tokens d_in"]:
    """Keep the positions that `tokens` names.

    Args:
        x: activations: prefix positions (CLS, then registers) first, then patches in reading order.
        tokens: `all` keeps every position, including registers; `patches` drops the prefix; `cls`
            keeps position 0; `mean` is the mean over the patches, summed in float32 or wider.
        n_prefix: number of prefix positions (CLS and registers).
        has_cls: whether position 0 is a CLS position.

    Raises:
        UserError: `tokens` is unknown, or is `cls` and the model has none.
    """
    check_tokens(tokens, has_cls)
    if tokens == "all":
        return x
    if tokens == "cls":
        # A copy, so that the one position does not keep all others in memory.
        return x[:, :1].contiguous()
    patches = x[:, n_prefix:]
    if tokens == "patches":
        return patches
    total = patches.float() if x.dtype.itemsize < 4 else patches
    return total.mean(dim=1, keepdim=True).to(x.dtype)
