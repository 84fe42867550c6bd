"""Selection in low precision that finds the latents of full precision, in plain torch.

Latents are chosen by bounds of their scores, and the chosen ones scored again exactly. A bound adds
what rounding can hide at most: with x = x_q + x_r and w = w_q + w_r, codes and what is lost, x · w
differs from x_q · w_q by no more than ‖x_r‖ ‖w‖ + ‖x_q‖ ‖w_r‖ (Cauchy and Schwarz). That holds for
errors that are alike, as those of vectors with few different numbers are, too.
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
"""Vectors that tell how many candidates are enough."""

MOST_UNSURE = 0.02
"""Share of vectors in question from which on more candidates are taken."""

CACHED = 1 << 20
"""Numbers that are copied at a time, so that they are read from memory once."""

LARGEST_CODE = 127
"""Of rows and vectors in int8."""

LARGEST_FACTOR = 64
"""Of rows, when the unit is set."""

LARGEST_BIAS_FACTOR = 4095
"""Of vectors: each turns a bias in common units into one in its own."""

LARGEST_SUM = 2.0**31
"""Where int32 ends."""

SMALLEST = 1e-30
"""Scores and units below it lose their precision."""

MOST_UNLIKE = 2.0
"""Times the usual norm of the codes, beyond which a vector would widen the bounds of the others."""


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and supported is not None and bool(supported())


def fast_int8(device: torch.device) -> bool:
    """Whether torch multiplies int8 on a device exactly, and faster than bfloat16.

    Where a processor has AMX, oneDNN uses it for bfloat16, but not for `torch._int_mm`.
    """
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    quicker = tiles is not None and bool(tiles()) and fast_bfloat16(device)
    return supports_int8(device) and not quicker


def supports_int8(device: torch.device) -> bool:
    """Whether torch multiplies int8 on a device exactly, and faster than float32."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    if device.type != "cpu" or supported is None or not torch.backends.mkldnn.is_available():
        return False
    return bool(supported()) and _multiplies_exactly()


@lru_cache(maxsize=1)
def _multiplies_exactly() -> bool:
    """Without VNNI, or told to do without, oneDNN saturates sums of two products."""
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
    """As `select_topk`, but what rounding leaves in question is scored in full.

    A vector is in question where a latent that was passed over could reach its k-th score. Where
    many are, more latents are taken for candidates, until that would cost more than it saves.

    Args:
        x: vectors, the decoder's bias subtracted.
        W: encoder rows, in the precision of x.
        b: encoder bias, likewise.
        k: how many.
        bounds: chooses latents in low precision.
        candidates: how many it chooses at first, k or more; default as many as some vectors need.
        buffer: room for the pre-activations of a tile.
        decide: says which of near scores are taken where a vector is scored in full.

    Returns:
        Scores, latents in rising order, and how many candidates were taken at last: all latents
        where low precision did not pay.
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
    """How many it pays to score again."""
    return 8 * k + 64


def _needed(
    x: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "n_latents d_in"],
    b: Float[Tensor, " n_latents"],
    k: int,
    bounds: Bounds,
) -> int:
    """How many candidates leave few of the first vectors in question; all latents if none pays."""
    n_latents, least = len(W), enough_candidates(k, len(W))
    tried = _most_candidates(k)
    if least >= n_latents or tried >= n_latents or len(x) == 0:
        return n_latents if least >= n_latents else least
    some = x[:SAMPLE]
    chosen, most = bounds.candidates(slice(0, SAMPLE), tried, None)
    kth = strongest_of(some, W, b, chosen, k)[0].amin(dim=1)
    in_question = (~(most < kth[:, None])).sum(dim=1) + 1
    wanted = int(in_question.float().quantile(1 - MOST_UNSURE, interpolation="lower"))
    if wanted > tried:  # no more of the others than of these are sure
        wanted = int(in_question.float().quantile(0.5))
    return n_latents if wanted > tried else max(least, wanted + wanted // 8)


class Bounds(Protocol):
    """Chooses latents for some vectors and knows what it may have missed."""

    dtype: torch.dtype
    """Of its pre-activations."""

    def candidates(
        self, part: slice, k: int, room: Tensor | None
    ) -> tuple[Int[Tensor, "rows k"], Float[Tensor, "rows k"]]:
        """Latents, in any order, and what their scores cannot exceed, nor those of all others the
        least of these bounds.

        Args:
            part: of the vectors.
            k: how many latents.
            room: for pre-activations.
        """


class Bfloat16Bounds:
    """By scores in bfloat16; see `select_surely`.

    Numbers of x and of W lose 2⁻⁹ of themselves at most. Half a place, 2⁻⁸ of what is rounded, is
    what the product, its sum with the bias, and the bias itself are moved by. A GPU that adds up
    parts of a product may round those, too.
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
        found = scores.gather(1, chosen).float()
        return chosen, found + found.abs() / 127 + (self.of_row * x.norm(dim=1) + self.of_bias)[
            :, None
        ]


def _noise(d_in: int) -> float:
    """What sums of float32, in two orders, can be off, as a share of the product of two norms."""
    return 2 * (d_in + 64) * 2.0**-24


class Int8Encoder:
    """A copy of encoder rows, for torch's product of integers.

    A row is `unit · factor · codes` and a vector `scale · codes`: a product of codes, times the
    row's factor, is a score in units of `unit · scale`.

    Args:
        W: the rows, in float32.
    """

    def __init__(self, W: Float[Tensor, "n_latents d_in"]) -> None:
        W = W.detach()
        self.codes = torch.empty(W.shape, dtype=torch.int8)
        self.factors = torch.empty(len(W), dtype=torch.int32)
        # Of each row: its largest number; in codes its norm, and that of what is lost.
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
        """Take the unit that fits the rows as they were copied last; all are to be copied anew."""
        self.unit = float(self.largest.max()) / (LARGEST_CODE * LARGEST_FACTOR) or 1.0

    def refresh(
        self,
        rows: Float[Tensor, "rows d_in"],
        first: int = 0,
        room: Float[Tensor, "room d_in"] | None = None,
    ) -> None:
        """Copy rows that have changed.

        Args:
            rows: what they are now.
            first: where they begin.
            room: for as many numbers, whose content is lost.
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
    """The bounds of some vectors' scores, in int32; see `Bounds`.

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
        # One bound for all vectors: what none that fits exceeds.
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
        found = torch._int_mm(codes, of.codes.T, out=out)
        torch.addcmul(self.hidden, found, of.factors, out=found)
        found.addcmul_(self.of_latent, self.of_vector[part, None])
        chosen = strongest(found, k)
        most = found.gather(1, chosen) * scale[:, None] + SMALLEST
        return chosen, torch.where(fit[:, None], most, math.inf)
