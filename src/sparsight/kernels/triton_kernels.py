"""The kernels of `triton_step`. Rows of d_in numbers are loaded whole, padded to a power of two.

Dtypes are those of the tensors. Nothing is added atomically, so equal inputs give equal bits. Names
in capitals are known at compile time. With `TRITON_INTERPRET=1`, set before Triton is imported, the
kernels run on a CPU, slowly.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

GROUP = 16
"""Number of neighbouring latents whose strongest represents them in the first round."""

LATENTS_OF_A_PROGRAM = 8
"""Number of latents that are updated one after another, with one partial sum for `b_dec`."""


FLOAT8 = torch.float8_e4m3fn
LARGEST_FLOAT8 = tl.constexpr(448.0)
SMALLEST = tl.constexpr(1e-30)
"""Rows whose largest number is below this are coded as if it were this."""


class Tile(NamedTuple):
    """The tile of the product that selects; its programs run in blocks of `together` tiles of
    vectors, which share what the cache holds of the encoder."""

    vectors: int = 128
    latents: int = 128
    depth: int = 64
    together: int = 8
    warps: int = 8
    stages: int = 3


class Rows(NamedTuple):
    """How kernels that gather rows divide them."""

    width: int
    """d_in, padded to a power of two."""

    entries: int
    """Number of rows that are in flight at a time."""

    warps: int


FP_FUSION = {"enable_fp_fusion": True}
"""Option of each launch: fuse multiplication and addition, whatever Triton's default is."""


def rows_of(d_in: int) -> Rows:
    """Return how to divide rows of d_in numbers: about 32 per thread and gathered block."""
    width = max(16, triton.next_power_of_2(d_in))
    warps = 4 if width <= 1024 else 8 if width <= 4096 else 16
    return Rows(width, max(1, min(16, 1024 * warps // width)), warps)


@triton.jit
@no_type_check
def score_groups(
    x,  # [n_vectors, d] bfloat16, or with SCALED float8
    W,  # [n_latents, d], likewise
    x_scales,  # [n_vectors] float32, with SCALED: what a vector's numbers are to be multiplied by
    W_scales,  # [n_latents] float32, with SCALED: what a latent's are
    b,  # [n_latents]
    scores,  # [n_vectors, width] bfloat16, out; -infinity behind the last latent
    maxima,  # [n_vectors, width / GROUP] bfloat16, out: the largest score of each group
    n_vectors,
    n_latents,
    width,
    d,
    GROUP: tl.constexpr,
    VECTORS: tl.constexpr,
    LATENTS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    SCALED: tl.constexpr,
    AS_FLOAT: tl.constexpr,
):
    """Compute a tile of `W x + b`, rounded, and the largest score of each group."""
    program = tl.program_id(0)
    tiles_down, tiles_across = tl.cdiv(n_vectors, VECTORS), tl.cdiv(width, LATENTS)
    block = program // (TOGETHER * tiles_across)
    height = tl.minimum(tiles_down - block * TOGETHER, TOGETHER)
    inside_block = program % (TOGETHER * tiles_across)
    down, across = block * TOGETHER + inside_block % height, inside_block // height

    rows = (down * VECTORS + tl.arange(0, VECTORS)).to(tl.int64)
    latents = (across * LATENTS + tl.arange(0, LATENTS)).to(tl.int64)
    steps = tl.arange(0, DEPTH)
    real_rows, real_latents = rows < n_vectors, latents < n_latents
    total = tl.zeros((VECTORS, LATENTS), tl.float32)
    for first in range(0, d, DEPTH):
        columns = first + steps
        real = columns < d
        of_x = tl.load(
            x + rows[:, None] * d + columns[None, :],
            mask=real_rows[:, None] & real[None, :],
            other=0.0,
        )
        of_W = tl.load(
            W + latents[None, :] * d + columns[:, None],
            mask=real_latents[None, :] & real[:, None],
            other=0.0,
        )
        if AS_FLOAT:  # the interpreter multiplies neither bfloat16 nor float8
            of_x, of_W = of_x.to(tl.float32), of_W.to(tl.float32)
        total = tl.dot(of_x, of_W, total)
    if SCALED:
        total *= tl.load(x_scales + rows, mask=real_rows, other=0.0)[:, None]
        total *= tl.load(W_scales + latents, mask=real_latents, other=0.0)[None, :]
    total += tl.load(b + latents, mask=real_latents, other=0.0).to(tl.float32)[None, :]
    total = tl.where(real_latents[None, :], total, float("-inf"))
    rounded = total.to(tl.bfloat16)
    tl.store(
        scores + rows[:, None] * width + latents[None, :],
        rounded,
        mask=real_rows[:, None] & (latents < width)[None, :],
    )
    grouped = tl.reshape(rounded.to(tl.float32), (VECTORS, LATENTS // GROUP, GROUP))
    groups = across * (LATENTS // GROUP) + tl.arange(0, LATENTS // GROUP)
    n_groups = width // GROUP
    tl.store(
        maxima + rows[:, None] * n_groups + groups[None, :],
        tl.max(grouped, axis=2).to(tl.bfloat16),
        mask=real_rows[:, None] & (groups < n_groups)[None, :],
    )


@triton.jit
@no_type_check
def score_candidates(
    x,  # [n_vectors, d]
    W,  # [n_latents, d]
    b,  # [n_latents]
    latents,  # [n_vectors, n_candidates]
    scores,  # [n_vectors, n_candidates], out
    n_candidates,
    d,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Compute exact scores of one vector's candidates."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    real = columns < d
    vector = tl.load(x + row * d + columns, mask=real, other=0.0)
    for first in range(0, n_candidates, ENTRIES):
        places = first + tl.arange(0, ENTRIES)
        there = places < n_candidates
        at = row * n_candidates + places
        of = tl.load(latents + at, mask=there, other=0).to(tl.int64)
        rows = tl.load(
            W + of[:, None] * d + columns[None, :], mask=there[:, None] & real[None, :], other=0.0
        )
        bias = tl.load(b + of, mask=there, other=0.0)
        tl.store(scores + at, tl.sum(rows * vector[None, :], axis=1) + bias, mask=there)


@triton.jit
@no_type_check
def reconstruct(
    x,  # [n_vectors, d]
    W_dec,  # [n_latents, d]
    bounds,  # [n_vectors, N_STAGES + 1]: where a vector's entries begin and each stage's end
    latents,  # [entries]
    values,  # [entries], not negative
    weights,  # [N_STAGES]: factors of x̂ − x in the gradient of the loss
    grads,  # [entries], out: gradients of the pre-activations
    error_rows,  # [entries], out: the row of `errors` that an entry answers to
    errors,  # [N_STAGES, n_vectors, d], out: weighted, those of later stages added
    squares,  # [n_vectors, N_STAGES], out: squared errors
    x_norms,  # [n_vectors], out, with NORMS
    error_norms,  # [N_STAGES, n_vectors], out, with NORMS
    n_vectors,
    d,
    N_STAGES: tl.constexpr,
    NORMS: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Decode one vector, stage by stage; compute its errors and the gradients of its code."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    real = columns < d
    target = tl.load(x + row * d + columns, mask=real, other=0.0)
    if NORMS:
        tl.store(x_norms + row, tl.sqrt(tl.sum(target * target, axis=0)))
    error = -target
    for stage in range(N_STAGES):
        begin = tl.load(bounds + row * (N_STAGES + 1) + stage)
        end = tl.load(bounds + row * (N_STAGES + 1) + stage + 1)
        for first in range(begin, end, ENTRIES):
            places = first + tl.arange(0, ENTRIES)
            there = places < end
            of = tl.load(latents + places, mask=there, other=0).to(tl.int64)
            rows = tl.load(
                W_dec + of[:, None] * d + columns[None, :],
                mask=there[:, None] & real[None, :],
                other=0.0,
            )
            active = tl.load(values + places, mask=there, other=0.0)
            error += tl.sum(rows * active[:, None], axis=0)
        tl.store(squares + row * N_STAGES + stage, tl.sum(error * error, axis=0))

    # Backwards, while the rows are in the cache: an entry serves all stages from its own on. The
    # rows that are read for the gradients also remove their stage from the error again.
    gradient = tl.zeros((WIDTH,), error.dtype)
    for back in range(N_STAGES):
        stage = N_STAGES - 1 - back
        error_row = stage * n_vectors + row
        gradient += tl.load(weights + stage) * error
        tl.store(errors + error_row * d + columns, gradient, mask=real)
        if NORMS:
            tl.store(error_norms + error_row, tl.sqrt(tl.sum(gradient * gradient, axis=0)))
        begin = tl.load(bounds + row * (N_STAGES + 1) + stage)
        end = tl.load(bounds + row * (N_STAGES + 1) + stage + 1)
        for first in range(begin, end, ENTRIES):
            places = first + tl.arange(0, ENTRIES)
            there = places < end
            of = tl.load(latents + places, mask=there, other=0).to(tl.int64)
            rows = tl.load(
                W_dec + of[:, None] * d + columns[None, :],
                mask=there[:, None] & real[None, :],
                other=0.0,
            )
            active = tl.load(values + places, mask=there, other=0.0)
            slope = tl.sum(rows * gradient[None, :], axis=1)
            tl.store(grads + places, tl.where(active > 0, slope, 0.0), mask=there)
            tl.store(error_rows + places, (error_row + places * 0).to(tl.int32), mask=there)
            if N_STAGES > 1:
                error -= tl.sum(rows * active[:, None], axis=0)


@triton.jit
@no_type_check
def _adam(parameter, mean, square, gradient, settings):
    """Return a parameter and its moments after a step; see `update_latents` for the settings."""
    mean = tl.load(settings + 1) * mean + tl.load(settings + 2) * gradient
    square = tl.load(settings + 3) * square + tl.load(settings + 4) * gradient * gradient
    divisor = tl.sqrt(square) / tl.load(settings + 5) + tl.load(settings + 6)
    return parameter - tl.load(settings + 0) * mean / divisor, mean, square


@triton.jit
@no_type_check
def update_latents(
    starts,  # [n_latents + 1]: where a latent's entries begin
    vectors,  # [entries], by latent: rows of x
    error_rows,  # [entries], by latent: rows of errors
    values,  # [entries], by latent
    grads,  # [entries], by latent
    x,  # [n_vectors, d]
    errors,  # [rows, d]
    W_enc,  # [n_latents, d], as its two moments
    W_enc_mean,
    W_enc_square,
    b_enc,  # [n_latents], as its two moments
    b_enc_mean,
    b_enc_square,
    W_dec,  # [n_latents, d], as its two moments
    W_dec_mean,
    W_dec_square,
    low,  # [n_latents, d] bfloat16, or with SCALED float8, out, with LOW: the encoder
    low_scales,  # [n_latents] float32, out, with LOW and SCALED: of its rows
    encoder_squares,  # [n_latents], out: squared norms of the encoder's rows
    since_fired,  # [n_latents]
    aux_rows,  # [n_latents], with AUX: a latent's row of the next three, or -1
    aux_enc,  # [dead, d]
    aux_bias,  # [dead]
    aux_dec,  # [dead, d]
    settings,  # step size, beta1, 1 - beta1, beta2, 1 - beta2, root of 1 - beta2^t, eps
    clip,  # factor of the gradient
    needed,  # without APPLY: 0 leaves the sums at 0
    partial_b_dec,  # [programs, d], out: Σ gradient of b_enc · row of W_enc
    partial_squares,  # [programs] float64, out: of the gradients
    n_latents,
    n_vectors,
    n_main_errors,
    d,
    UNIT_NORM: tl.constexpr,
    AUX: tl.constexpr,
    LOW: tl.constexpr,
    SCALED: tl.constexpr,
    APPLY: tl.constexpr,
    LATENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Compute gradients, projection, Adam, norm and copy of latents; without APPLY only sums."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    real = columns < d
    kind = x.dtype.element_ty
    zeros = tl.zeros((WIDTH,), kind)
    no_bias, none_fired = tl.zeros((ENTRIES,), kind), tl.zeros((ENTRIES,), tl.int32)
    of_b_dec, squares = zeros, zeros
    first_latent = program * LATENTS
    last_latent = tl.minimum(first_latent + LATENTS, n_latents)
    if not APPLY:
        last_latent = tl.where(tl.load(needed) != 0, last_latent, first_latent)
    for latent in range(first_latent, last_latent):
        of_enc, of_dec, of_bias_parts, fired_parts = zeros, zeros, no_bias, none_fired
        end = tl.load(starts + latent + 1)
        for first in range(tl.load(starts + latent), end, ENTRIES):
            places = first + tl.arange(0, ENTRIES)
            there = places < end
            block = there[:, None] & real[None, :]
            vector = tl.load(vectors + places, mask=there, other=0).to(tl.int64)
            error_row = tl.load(error_rows + places, mask=there, other=0).to(tl.int64)
            grad = tl.load(grads + places, mask=there, other=0.0)
            value = tl.load(values + places, mask=there, other=0.0)
            of_x = tl.load(x + vector[:, None] * d + columns[None, :], mask=block, other=0.0)
            of_enc += tl.sum(of_x * grad[:, None], axis=0)
            error = tl.load(
                errors + error_row[:, None] * d + columns[None, :], mask=block, other=0.0
            )
            of_dec += tl.sum(error * value[:, None], axis=0)
            of_bias_parts += grad
            fired_parts |= ((value > 0) & (error_row < n_main_errors)).to(tl.int32)
        of_bias = tl.sum(of_bias_parts, axis=0)
        if AUX:
            aux_row = tl.load(aux_rows + latent).to(tl.int64)
            of_dead = columns < tl.where(aux_row >= 0, d, 0)
            bias = tl.load(aux_bias + tl.maximum(aux_row, 0))
            of_bias += tl.where(aux_row >= 0, bias, 0.0)
            of_enc += tl.load(aux_enc + aux_row * d + columns, mask=of_dead, other=0.0)
            of_dec += tl.load(aux_dec + aux_row * d + columns, mask=of_dead, other=0.0)
        at = latent * d + columns
        enc = tl.load(W_enc + at, mask=real, other=0.0)
        dec = tl.load(W_dec + at, mask=real, other=0.0)
        of_b_dec += of_bias * enc
        if UNIT_NORM:
            of_dec -= tl.sum(of_dec * dec, axis=0) * dec
        squares += of_enc * of_enc + of_dec * of_dec
        squares += tl.where(columns == 0, of_bias * of_bias, 0.0)
        if APPLY:
            scale = tl.load(clip)
            silent = tl.load(since_fired + latent) + n_vectors
            fired = tl.max(fired_parts, axis=0)
            tl.store(since_fired + latent, tl.where(fired > 0, 0, silent))

            mean = tl.load(W_enc_mean + at, mask=real, other=0.0)
            square = tl.load(W_enc_square + at, mask=real, other=0.0)
            enc, mean, square = _adam(enc, mean, square, scale * of_enc, settings)
            tl.store(W_enc + at, enc, mask=real)
            tl.store(W_enc_mean + at, mean, mask=real)
            tl.store(W_enc_square + at, square, mask=real)
            tl.store(encoder_squares + latent, tl.sum(enc * enc, axis=0))
            if LOW:
                row = enc.to(tl.float32)
                if SCALED:
                    scale_of_row = (
                        tl.maximum(tl.max(tl.abs(row), axis=0), SMALLEST) / LARGEST_FLOAT8
                    )
                    tl.store(low_scales + latent, scale_of_row)
                    row = row / scale_of_row
                tl.store(low + at, row.to(low.dtype.element_ty), mask=real)

            mean = tl.load(W_dec_mean + at, mask=real, other=0.0)
            square = tl.load(W_dec_square + at, mask=real, other=0.0)
            dec, mean, square = _adam(dec, mean, square, scale * of_dec, settings)
            if UNIT_NORM:
                dec = dec / tl.maximum(tl.sqrt(tl.sum(dec * dec, axis=0)), 1e-12)
            tl.store(W_dec + at, dec, mask=real)
            tl.store(W_dec_mean + at, mean, mask=real)
            tl.store(W_dec_square + at, square, mask=real)

            bias, bias_mean, bias_square = _adam(
                tl.load(b_enc + latent),
                tl.load(b_enc_mean + latent),
                tl.load(b_enc_square + latent),
                scale * of_bias,
                settings,
            )
            tl.store(b_enc + latent, bias)
            tl.store(b_enc_mean + latent, bias_mean)
            tl.store(b_enc_square + latent, bias_square)
    tl.store(partial_b_dec + program * d + columns, of_b_dec, mask=real)
    tl.store(partial_squares + program, tl.sum(squares, axis=0).to(tl.float64))


INTERPRETED = not isinstance(update_latents, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, on any device."""
