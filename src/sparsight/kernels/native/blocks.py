"""Codes with many entries per vector, as sparse matrices of the compiled kernels; see blocks.h."""

from __future__ import annotations

from ctypes import Structure, byref, c_int, c_int64, c_void_p
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.kernels.native.library import at, constant, function, int32, opened


class _Blocks(Structure):
    _fields_ = (
        ("n_rows", c_int64),
        ("n_columns", c_int64),
        ("starts", c_void_p),
        ("columns", c_void_p),
        ("entries", c_void_p),
        ("to_end", c_int64),
    )


class _CodeInBlocks:
    """A sparse matrix whose sums share rows."""

    def __init__(
        self,
        order: Literal["by_vector", "by_latent"],
        latents: Int[Tensor, "batch k"],
        n_latents: int,
        shape: tuple[int, int],
        columns: Int[Tensor, " entries"],
        entries: Int[Tensor, " entries"] | None,
    ) -> None:
        n_rows, n_columns = shape
        blocks = -(-n_columns // constant("block"))
        to_end = n_rows if order == "by_vector" else 1
        tensors = int32(blocks * n_rows + to_end), columns, entries
        self.kept = tensors  # as long as the struct points to them
        self.struct = _Blocks(n_rows, n_columns, *map(at, tensors), to_end)
        getattr(opened(), f"sparsight_blocks_{order}")(
            c_void_p(at(latents)), *map(c_int64, (*latents.shape, n_latents)),
            byref(self.struct), c_int(torch.get_num_threads()),
        )  # fmt: skip

    def sums(
        self,
        weights: Float[Tensor, " entries"],
        base: Float[Tensor, "columns d_in"],
        out: Float[Tensor, "rows d_in"],
        *,
        add: bool = False,
    ) -> Float[Tensor, "rows d_in"]:
        """Sum, for each row, the weighted rows of `base` of its entries; `add` adds to `out`.

        Args:
            weights: one per entry, in their order.
            base: one row per column of the matrix.
            out: changed in place.
            add: keep what is in `out`, and add to it.
        """
        function("block_sums", out.dtype)(
            byref(self.struct), c_void_p(at(weights)), c_void_p(at(base)),
            c_int64(out.shape[1]), c_int(add), c_void_p(at(out)),
            c_int(torch.get_num_threads()),
        )  # fmt: skip
        return out


class VectorsByLatents(_CodeInBlocks):
    """A code as it is, with vectors as rows.

    Args:
        latents: latents of each vector's entries, int32, ascending; unused places hold -1.
        n_latents: total number of latents.
    """

    def __init__(self, latents: Int[Tensor, "batch k"], n_latents: int) -> None:
        shape = len(latents), n_latents
        super().__init__("by_vector", latents, n_latents, shape, latents.flatten(), None)

    def products(
        self,
        x: Float[Tensor, "batch d_in"],
        base: Float[Tensor, "n_latents d_in"],
        values: Float[Tensor, "batch k"],
        out: Float[Tensor, "batch k"],
    ) -> None:
        """Return, for each entry with a value above 0, the dot product of its row of `x` with its
        row of `base`; 0 for the others."""
        function("block_products", x.dtype)(
            byref(self.struct), c_void_p(at(x)), c_void_p(at(base)), c_int64(x.shape[1]),
            c_void_p(at(values)), c_void_p(at(out)), c_int(torch.get_num_threads()),
        )  # fmt: skip


class LatentsByVectors(_CodeInBlocks):
    """A code with latents as rows, in an order of its own.

    Args:
        latents: latents of each vector's entries, int32; -1 where there is none.
        n_latents: total number of latents.
        room: room for the columns and the places of the entries.
    """

    def __init__(
        self,
        latents: Int[Tensor, "batch k"],
        n_latents: int,
        room: Int[Tensor, "2 entries"] | None = None,
    ) -> None:
        shape = n_latents, len(latents)
        columns, entries = int32(2, latents.numel()) if room is None else room
        super().__init__("by_latent", latents, n_latents, shape, columns, entries)

    def ordered(
        self, of_code: Float[Tensor, "batch k"], room: Float[Tensor, " room"] | None = None
    ) -> tuple[Float[Tensor, " entries"], Float[Tensor, " n_latents"]]:
        """Return numbers of the code's entries in this matrix's order, and their sums by latent.

        Args:
            of_code: the numbers.
            room: room for as many.
        """
        out = torch.empty_like(of_code).flatten() if room is None else room
        sums = of_code.new_empty(self.struct.n_rows)
        function("block_order", of_code.dtype)(
            byref(self.struct), *(c_void_p(at(each)) for each in (of_code, out, sums)),
            c_int(torch.get_num_threads()),
        )  # fmt: skip
        return out, sums
