"""The sparse output of the encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional


class Frame(NamedTuple):
    """The units of vectors that are normalised one by one: x = z · scale + mean."""

    mean: Float[Tensor, "rows 1"]
    scale: Float[Tensor, "rows 1"]


@dataclass(frozen=True, repr=False)
class SparseCode:
    """Which latents are active on each vector, and how strongly; rows may differ in length.

    Attributes:
        indices: the active latents, row after row.
        values: their activations: positive, or of either sign if the sparsity keeps both.
        offsets: where each row begins in `indices`; the last entry is its length.
        n_latents: width of the dictionary.
        frame: the units of each row, if the normaliser has none that all rows share.
    """

    indices: Int[Tensor, " active"]
    values: Float[Tensor, " active"]
    offsets: Int[Tensor, " rows_plus_one"]
    n_latents: int
    frame: Frame | None = None

    @classmethod
    def from_padded(
        cls,
        values: Float[Tensor, "rows k"],
        indices: Int[Tensor, "rows k"],
        n_latents: int,
        *,
        signed: bool = False,
    ) -> SparseCode:
        """Build a code from k candidates per row; those with a positive value are active, or with
        `signed` those that are not 0."""
        active = values != 0 if signed else values > 0
        offsets = torch.zeros(len(values) + 1, dtype=torch.int64, device=values.device)
        torch.cumsum(active.sum(dim=1), dim=0, out=offsets[1:])
        return cls(indices[active], values[active], offsets, n_latents)

    @classmethod
    def from_ragged(
        cls,
        values: Float[Tensor, " candidates"],
        indices: Int[Tensor, " candidates"],
        starts: Int[Tensor, " rows_plus_one"],
        n_latents: int,
    ) -> SparseCode:
        """Build a code from any number of candidates per row; positive values are active."""
        active = values > 0
        offsets = functional.pad(active.cumsum(0), (1, 0))[starts]
        return cls(indices[active], values[active], offsets, n_latents)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        return (
            f"SparseCode({len(self):,} vectors, {len(self.values):,} active entries of "
            f"{self.n_latents:,} latents, {self.values.dtype} on {self.values.device})"
        )

    @property
    def l0(self) -> Int[Tensor, " rows"]:
        """The number of active latents of each vector."""
        return self.offsets.diff()

    @property
    def rows(self) -> Int[Tensor, " active"]:
        """The row to which each entry belongs."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.offsets.device), self.l0)

    def with_nan(self, rows: Bool[Tensor, " rows"]) -> SparseCode:
        """Return a copy in which one NaN entry, for latent 0, replaces those of the given rows."""
        kept = ~rows[self.rows]
        offsets = functional.pad(torch.where(rows, 1, self.l0).cumsum(0), (1, 0))
        moved = offsets[:-1] - self.offsets[:-1]
        places = (torch.arange(len(kept), device=kept.device) + moved[self.rows])[kept]
        indices = self.indices.new_zeros(int(offsets[-1]))
        values = self.values.new_full((len(indices),), torch.nan)
        return replace(
            self,
            indices=indices.index_put((places,), self.indices[kept]),
            values=values.index_put((places,), self.values[kept]),
            offsets=offsets,
        )

    def dense(self) -> Float[Tensor, "rows n_latents"]:
        """Return the code as a matrix, including zeros."""
        out = self.values.new_zeros(len(self), self.n_latents)
        return out.index_put((self.rows, self.indices), self.values)
