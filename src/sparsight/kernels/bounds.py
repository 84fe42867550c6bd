"""Selection in low precision that finds the latents of full precision, in plain torch.

Latents are chosen by upper bounds of their scores, and the chosen ones are scored again exactly. A
bound adds the most that rounding can hide: with x = x_q + x_r and w = w_q + w_r, the codes and what
they lose, x · w differs from x_q · w_q by no more than ‖x_r‖ ‖w‖ + ‖x_q‖ ‖w_r‖ (Cauchy-Schwarz).
This also holds for correlated errors, such as those of vectors with few different numbers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Protocol

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from sparsight.kernels.memory import use_large_pages
from sparsight.kernels.selection import (
    Decide,
    enough_candidates,
    room_of,
    select_exactly,
    strongest,
    strongest_in_low_precision,
    strongest_of,
    tile_rows,
)

SAMPLE = 32
"""Number of vectors from which to estimate how many candidates are enough."""

MOST_UNSURE = 0.02
"""Share of uncertain vectors above which more candidates are taken."""

CACHED = 1 << 20
"""Number of entries that are copied at a time, so that they are read from memory once."""

LARGEST_CODE = 127
"""Largest code of rows and vectors in int8."""

LARGEST_FACTOR = 64
"""Largest code of rows at the time when the unit is set."""

LARGEST_BIAS_FACTOR = 4095
"""Largest factor of a vector, which converts a bias from common units into its own."""

LARGEST_SUM = 2.0**31
"""The upper end of int32."""

SMALLEST = 1e-30
"""Scores and units below this lose their precision."""

MOST_UNLIKE = 2.0
"""Multiple of the usual norm of the codes above which a vector would widen the others' bounds."""


def fast_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and supported is not None and bool(supported())


def fast_int8(device: torch.device) -> bool:
    """Return whether torch multiplies int8 on a device exactly, and faster than bfloat16.

    If a processor has AMX, oneDNN uses it for bfloat16, but not for `torch._int_mm`.
    """
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    quicker = tiles is not None and bool(tiles()) and fast_bfloat16(device)
    return supports_int8(device) and not quicker


def supports_int8(device: torch.device) -> bool:
    """Return whether torch multiplies int8 on a device exactly, and faster than float32."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    if device.type != "cpu" or supported is None or not torch.backends.mkldnn.is_available():
        return False
    return bool(supported()) and _multiplies_exactly()


@lru_cache(maxsize=1)
def _multiplies_exactly() -> bool:
    """Return whether sums are exact: without VNNI, or told not to use it, oneDNN saturates them."""
    ones = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(ones, ones.T) == 64 * 127**2).all())


def select_surely(
    x: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "n_latents d_in"],
    b: Float[Tensor, " n_latents"],
    k: int,
    bounds: Bounds,
    candidates: int | None = None,
    buffer: Tensor | None = None,
    decide: Decide | None = None,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"], int]:
    """Like `select_topk`, but score in full whatever rounding leaves uncertain.

    A vector is uncertain if a latent that was not a candidate could reach its k-th score. If many
    vectors are, more candidates are taken, until that would cost more than it saves.

    Args:
        x: vectors, with the decoder's bias subtracted.
        W: encoder rows, in the precision of x.
        b: encoder bias, in the precision of x.
        k: number of latents.
        bounds: chooses candidates in low precision.
        candidates: number of candidates at first, k or more; by default what a few vectors need.
        buffer: room for the pre-activations of a tile.
        decide: chooses among near scores if a vector is scored in full.

    Returns:
        Scores, latents in ascending order, and the final number of candidates: all latents if low
        precision did not pay.
    """
    n_latents = len(W)
    values, latents = x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64)
    rows = tile_rows(x, n_latents)
    if candidates is None:
        candidates = _needed(x, W, b, k, bounds)
    if buffer is None and candidates < n_latents:
        buffer = torch.empty(rows * n_latents, dtype=bounds.dtype, device=x.device)
        use_large_pages(buffer)
    for first in range(0, len(x), rows):
        part = slice(first, first + rows)
        tile = x[part]
        if candidates >= n_latents:
            values[part], latents[part] = select_exactly(tile, W, b, k, decide=decide)
            continue
        chosen, most = bounds.candidates(part, candidates, buffer)
        values[part], latents[part] = strongest_of(tile, W, b, chosen, k)
        passed = most.amin(dim=1)
        unsure = (~(values[part].amin(dim=1) > passed)).nonzero()[:, 0]
        if len(unsure):
            exact = select_exactly(tile[unsure], W, b, k, decide=decide)
            values[first + unsure], latents[first + unsure] = exact
        if len(unsure) > MOST_UNSURE * len(tile):
            candidates += candidates // 2
            if 2 * len(unsure) > len(tile) or candidates > _most_candidates(k):
                candidates = n_latents
    return values, latents, candidates


def _most_candidates(k: int) -> int:
    """Return the largest number of candidates that it pays to score again."""
    return 8 * k + 64


def _needed(
    x: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "n_latents d_in"],
    b: Float[Tensor, " n_latents"],
    k: int,
    bounds: Bounds,
) -> int:
    """Return how many candidates make most of the first vectors certain; all latents if none do."""
    n_latents, least = len(W), enough_candidates(k, len(W))
    tried = _most_candidates(k)
    if least >= n_latents or tried >= n_latents or len(x) == 0:
        return n_latents if least >= n_latents else least
    sample = x[:SAMPLE]
    chosen, most = bounds.candidates(slice(0, SAMPLE), tried, None)
    kth = strongest_of(sample, W, b, chosen, k)[0].amin(dim=1)
    in_question = (~(most < kth[:, None])).sum(dim=1) + 1
    wanted = int(in_question.float().quantile(1 - MOST_UNSURE, interpolation="lower"))
    if wanted > tried:  # the rest are no more certain than these
        wanted = int(in_question.float().quantile(0.5))
    return n_latents if wanted > tried else max(least, wanted + wanted // 8)


class Bounds(Protocol):
    """Chooses candidates for some vectors and knows what it may have missed."""

    dtype: torch.dtype
    """The dtype of its pre-activations."""

    def candidates(
        self, part: slice, k: int, room: Tensor | None
    ) -> tuple[Int[Tensor, "rows k"], Float[Tensor, "rows k"]]:
        """Return latents in any order, and upper bounds of their scores, the least of which also
        bounds the scores of all other latents.

        Args:
            part: which of the vectors.
            k: number of latents.
            room: room for pre-activations.
        """


class Bfloat16Bounds:
    """Bounds from scores in bfloat16; see `select_surely`.

    Entries of x and W lose at most 2⁻⁹ of themselves. The product, its sum with the bias, and the
    bias itself move by at most half a place, 2⁻⁸ of what is rounded. A GPU that adds parts of a
    product may round those, too.
    """

    def __init__(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "n_latents d_in"],
        b: Float[Tensor, " n_latents"],
    ) -> None:
        self.dtype = torch.bfloat16
        self.x, self.W, self.b = x, W.bfloat16(), b.bfloat16()
        lost = (2**-8 if x.device.type == "cpu" else 2**-7) + _noise(x.shape[1])
        self.of_row = 1.01 * lost * W.norm(dim=1).amax()
        self.of_bias = b.abs().amax() / 127 + SMALLEST

    def candidates(
        self, part: slice, k: int, room: Tensor | None
    ) -> tuple[Int[Tensor, "rows k"], Float[Tensor, "rows k"]]:
        """See `Bounds`."""
        x = self.x[part]
        scores, chosen = strongest_in_low_precision(x, self.W, self.b, k, room)
        reached = scores.gather(1, chosen).float()
        return chosen, reached + reached.abs() / 127 + (self.of_row * x.norm(dim=1) + self.of_bias)[
            :, None
        ]


def _noise(d_in: int) -> float:
    """Return how far two sums of float32 can differ, as a share of the product of two norms."""
    return 2 * (d_in + 64) * 2.0**-24


class Int8Encoder:
    """A copy of encoder rows for torch's integer product.

    A row is `unit · factor · codes`, and a vector is `scale · codes`: a product of codes, times the
    row's factor, is a score in units of `unit · scale`.

    Args:
        W: the rows, in float32.
    """

    def __init__(self, W: Float[Tensor, "n_latents d_in"]) -> None:
        W = W.detach()
        self.codes = torch.empty(W.shape, dtype=torch.int8)
        self.factors = torch.empty(len(W), dtype=torch.int32)
        # For each row: its largest entry; the norm of its codes, and of what they lose.
        self.largest, self.sizes, self.lost = (torch.empty(len(W)) for _ in range(3))
        use_large_pages(self.codes)
        parts = W.split(max(1, CACHED // W.shape[1]))
        starts = range(0, len(W), len(parts[0]))
        room = torch.empty_like(parts[0])
        for part, first in zip(parts, starts, strict=True):
            self._measure(part, first, room)
        self.set_unit()
        for part, first in zip(parts, starts, strict=True):
            self._copy(part, first, room)

    def set_unit(self) -> None:
        """Set the unit that fits the rows as last copied; then all of them must be copied again."""
        self.unit = float(self.largest.max()) / (LARGEST_CODE * LARGEST_FACTOR) or 1.0

    def refresh(
        self,
        rows: Float[Tensor, "rows d_in"],
        first: int = 0,
        room: Float[Tensor, "room d_in"] | None = None,
    ) -> None:
        """Copy rows that have changed.

        Args:
            rows: their present values.
            first: index of the first one.
            room: room for as many numbers; its content is overwritten.
        """
        room = torch.empty_like(rows) if room is None else room
        self._measure(rows, first, room)
        self._copy(rows, first, room)

    def _measure(self, rows: Tensor, first: int, room: Tensor) -> None:
        largest = self.largest[first : first + len(rows)]
        torch.amax(torch.abs(rows, out=room[: len(rows)]), dim=1, out=largest)

    def _copy(self, rows: Tensor, first: int, room: Tensor) -> None:
        part, room = slice(first, first + len(rows)), room[: len(rows)]
        factors = (self.largest[part] / (LARGEST_CODE * self.unit)).ceil_().clamp_(min=1)
        self.factors[part] = factors.int()
        torch.mul(rows, (1 / (self.unit * factors))[:, None], out=room)
        torch.linalg.vector_norm(room, dim=1, out=self.sizes[part])
        self.codes[part] = room.round()
        torch.linalg.vector_norm(room.sub_(self.codes[part]), dim=1, out=self.lost[part])


class Int8Bounds:
    """Bounds of some vectors' scores, in int32; see `Bounds`.

    Args:
        of: the encoder's rows.
        x: the vectors, in float32.
        b: the encoder's bias.
    """

    def __init__(
        self, of: Int8Encoder, x: Float[Tensor, "batch d_in"], b: Float[Tensor, " n_latents"]
    ) -> None:
        self.dtype, self.encoder = torch.int32, of
        scale = x.abs().amax(dim=1) / LARGEST_CODE
        scale.clamp_(min=max(float(scale.nanmedian()) / 64, SMALLEST))
        exact = x / scale[:, None]
        sizes = exact.norm(dim=1)
        self.fit = sizes <= MOST_UNLIKE * sizes.nanmedian()
        codes = exact.round()
        self.codes: Int8[Tensor, "batch d_in"] = codes.to(torch.int8)
        lost = exact.sub_(codes).norm(dim=1)
        self.scale = scale.double() * of.unit
        if of.unit < SMALLEST or not bool(self.fit.any()):
            self.fit.zero_()
            return
        # One bound for all vectors, which no vector that fits exceeds.
        size, hidden_of_x = (float((each * self.fit).nan_to_num().amax()) for each in (sizes, lost))
        # b / (unit · scale) as a product of two integers, one of the latent and one of the vector.
        common = LARGEST_BIAS_FACTOR * scale[self.fit].amin()
        self.of_vector: Int[Tensor, " batch"] = (common / scale).round_().int()
        of_latent = (b / (of.unit * common)).round_()
        noise = _noise(x.shape[1])
        hidden = of.factors * (
            (hidden_of_x + noise * size) * of.sizes + (size + hidden_of_x) * of.lost
        )
        hidden += (
            LARGEST_BIAS_FACTOR * (1 + 2 * noise * of_latent.abs()) + of_latent.abs()
        ) / 2 + 1
        hidden *= 1.001
        rounding = math.sqrt(x.shape[1]) / 2
        most = of.factors * ((size + rounding) * (of.sizes + rounding))
        most += LARGEST_BIAS_FACTOR * of_latent.abs() + hidden
        if not bool(most.max() < LARGEST_SUM):
            self.fit.zero_()
        else:
            self.of_latent, self.hidden = of_latent.int(), hidden.ceil_().int()

    def candidates(
        self, part: slice, k: int, room: Tensor | None
    ) -> tuple[Int[Tensor, "rows k"], Float[Tensor, "rows k"]]:
        """See `Bounds`."""
        codes, scale, fit, of = self.codes[part], self.scale[part], self.fit[part], self.encoder
        if not bool(fit.any()):
            nothing = torch.full((len(codes), k), math.inf, dtype=scale.dtype)
            return torch.arange(k).expand(len(codes), k), nothing
        out = room_of(room, len(codes), len(of.codes), self.dtype)
        products = torch._int_mm(codes, of.codes.T, out=out)
        torch.addcmul(self.hidden, products, of.factors, out=products)
        products.addcmul_(self.of_latent, self.of_vector[part, None])
        chosen = strongest(products, k)
        most = products.gather(1, chosen) * scale[:, None] + SMALLEST
        return chosen, torch.where(fit[:, None], most, math.inf)
