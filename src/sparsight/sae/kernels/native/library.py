"""The compiled kernels as functions of tensors; `load` says whether they run here."""

from __future__ import annotations

import ctypes
import math
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.errors import SparsightError
from sparsight.sae.kernels.memory import use_large_pages
from sparsight.sae.kernels.native import build
from sparsight.sae.kernels.selection import exact_above, select_exactly

CHUNKS = 64
"""Parts of the update whose sums are added in order, so that threads do not change the bits."""

ROWS_OF_A_TASK = 16
"""Vectors whose errors `reconstruct` sums."""

_KINDS = {"int8": 0, "bfloat16": 1}
_SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}


class _Dictionary(Structure):
    _fields_ = (
        ("kind", c_int64),
        ("n_latents", c_int64),
        ("d_in", c_int64),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("offset", c_void_p),
        ("bias", c_void_p),
        ("slack1", c_void_p),
        ("slack2", c_void_p),
    )


class _Reconstruction(Structure):
    _fields_ = (
        ("target", c_void_p),
        ("W_dec", c_void_p),
        ("starts", c_void_p),
        ("ends", c_void_p),
        ("latents", c_void_p),
        ("values", c_void_p),
        ("grads", c_void_p),
        ("error_rows", c_void_p),
        ("errors", c_void_p),
        ("weights", c_void_p),
        ("losses", c_void_p),
        ("target_norms", c_void_p),
        ("error_norms", c_void_p),
        ("error_sums", c_void_p),
        ("n_vectors", c_int64),
        ("n_stages", c_int64),
        ("d", c_int64),
        ("rows_of_a_task", c_int64),
    )


class _Update(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("starts", "vectors", "errors_of", "values", "grads")),
        *((name, c_void_p) for name in ("x", "errors")),
        *((name, c_void_p) for name in ("W_enc", "W_enc_m", "W_enc_v")),
        *((name, c_void_p) for name in ("b_enc", "b_enc_m", "b_enc_v")),
        *((name, c_void_p) for name in ("W_dec", "W_dec_m", "W_dec_v")),
        *((name, c_double) for name in ("step_size", "beta1", "beta2", "root_correction2")),
        *((name, c_double) for name in ("eps", "clip")),
        *((name, c_void_p) for name in ("since_fired", "partial_b_dec", "partial_square")),
        ("dictionary", POINTER(_Dictionary)),
        *((name, c_void_p) for name in ("extra", "extra_enc", "extra_dec", "extra_bias")),
        *((name, c_int64) for name in ("n", "d", "chunk", "n_main_errors", "n_vectors", "n_extra")),
        *((name, c_int64) for name in ("unit_norm", "apply")),
    )


class _Blocks(Structure):
    _fields_ = (
        ("n_rows", c_int64),
        ("n_columns", c_int64),
        ("starts", c_void_p),
        ("columns", c_void_p),
        ("entries", c_void_p),
        ("to_end", c_int64),
    )


@lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL, str] | None:
    """The quickest compiled variant that this processor runs, and its name; None without one."""
    for variant in build.VARIANTS:
        path = build.library(variant)
        if not path.exists():
            continue
        try:
            found = ctypes.CDLL(str(path))
        except OSError:  # of another system
            continue
        if _of_these_sources(found) and found.sparsight_runs_here():
            _share_threads(found)
            return found, variant
    return None


def multiplies_int8() -> bool:
    """Whether what is loaded multiplies in int8 faster than others do in float32."""
    loaded = load()
    return loaded is not None and loaded[1] != "portable"


def _share_threads(found: ctypes.CDLL) -> None:
    """Run on the threads of torch's OpenMP runtime, if it is one that speaks GNU's interface."""
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(torch_cpu)).GOMP_parallel  # of a library that it depends on
    except (OSError, AttributeError):
        return
    found.sparsight_use_openmp(parallel)


def _of_these_sources(found: ctypes.CDLL) -> bool:
    """Whether a library was compiled from the sources beside it: others have other structures."""
    if not hasattr(found, "sparsight_sources"):
        return False
    found.sparsight_sources.restype = c_char_p
    return bool(found.sparsight_sources() == build.fingerprint().encode())


def _loaded() -> ctypes.CDLL:
    loaded = load()
    if loaded is None:
        raise SparsightError("The native kernels are not built, or do not run on this processor.")
    return loaded[0]


def _function(name: str, dtype: torch.dtype) -> Any:
    return getattr(_loaded(), f"sparsight_{name}_{_SUFFIXES[dtype]}")


def _constant(name: str) -> int:
    return c_int64.in_dll(_loaded(), f"sparsight_{name}").value


def _at(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.data_ptr()


def _real(dtype: torch.dtype, value: float) -> c_float | c_double:
    return c_float(value) if dtype == torch.float32 else c_double(value)


class Dictionary:
    """An encoder in low precision, from which latents are selected.

    Args:
        W: encoder rows, float32 or float64.
        b: encoder bias.
        precision: of the copy.
    """

    def __init__(
        self,
        W: Float[Tensor, "n_latents d_in"],
        b: Float[Tensor, " n_latents"],
        precision: Literal["int8", "bfloat16"],
    ) -> None:
        n, d = W.shape
        tile = _constant("tile_latents")
        padded = -(-n // tile) * tile
        groups = -(-d // 4) if precision == "int8" else -(-d // 2)
        self.tensors = (
            torch.empty(padded * groups * 4, dtype=torch.uint8),
            torch.empty(padded),
            torch.empty(padded, dtype=torch.int32),
            *(torch.empty(padded) for _ in range(3)),
        )
        use_large_pages(self.tensors[0])
        self.struct = _Dictionary(_KINDS[precision], n, d, *(_at(each) for each in self.tensors))
        self.refresh(W, b)

    @property
    def norms(self) -> Float[Tensor, " n"]:
        """Norms of the encoder rows; of an int8 copy only."""
        return self.tensors[4][: self.struct.n_latents]

    def refresh(self, W: Float[Tensor, "n_latents d_in"], b: Float[Tensor, " n_latents"]) -> None:
        """Copy the encoder anew."""
        _function("pack", W.dtype)(
            byref(self.struct), c_void_p(_at(W)), c_void_p(_at(b)),
            c_int(torch.get_num_threads()),
        )  # fmt: skip

    def select(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "n_latents d_in"],
        b: Float[Tensor, " n_latents"],
        *,
        k: int = 0,
        k_inner: int = 0,
        threshold: float = -math.inf,
        out: tuple[Float[Tensor, "batch room"], Int[Tensor, "batch room"]],
    ) -> Int[Tensor, " batch"]:
        """The k largest of `W x + b` for each vector, or all where k is 0, from `threshold` on.

        Scores are exact; latents come in rising order, with `k_inner` the largest `k_inner` first.

        Args:
            x: vectors, the decoder's bias subtracted.
            W: encoder rows, as they were copied.
            b: encoder bias.
            k: how many.
            k_inner: how many of them come first.
            threshold: the least score that is wanted.
            out: scores and latents (int32) of each vector; latents that are missing from k are -1.

        Returns:
            How many were found; -1 where rounding left too many in question, more were found than
            `out` has room for, or a score is not finite.
        """
        values, latents = out
        counts = torch.empty(len(x), dtype=torch.int32)
        _function("select", x.dtype)(
            byref(self.struct), c_void_p(_at(x)), c_int64(len(x)), c_void_p(_at(W)),
            c_void_p(_at(b)), c_int64(k), c_int64(k_inner), _real(x.dtype, threshold),
            c_int64(values.shape[1]), c_void_p(_at(values)), c_void_p(_at(latents)),
            c_void_p(_at(counts)), c_int(torch.get_num_threads()),
        )  # fmt: skip
        return counts

    def topk(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "n_latents d_in"],
        b: Float[Tensor, " n_latents"],
        k: int,
        *,
        k_inner: int = 0,
        threshold: float = -math.inf,
        out: tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]],
    ) -> tuple[Int[Tensor, " batch"], int]:
        """As `select`, with vectors that it gives up scored in full, whatever the threshold.

        Latents rise, but for those of `k_inner`, which come first.

        Returns:
            How many each vector has, and how many vectors were scored in full.
        """
        values, latents = out
        counts = self.select(x, W, b, k=k, k_inner=k_inner, threshold=threshold, out=out)
        failed = (counts < 0).nonzero()[:, 0]
        if len(failed):
            scores, found = select_exactly(x[failed], W, b, k)
            if k_inner:
                scores, order = scores.sort(dim=1, descending=True)
                found = found.gather(1, order)
            values[failed], latents[failed] = scores, found.to(torch.int32)
            counts[failed] = k
        return counts, len(failed)

    def above(
        self,
        x: Float[Tensor, "batch d_in"],
        W: Float[Tensor, "n_latents d_in"],
        b: Float[Tensor, " n_latents"],
        threshold: float,
        room: int = 512,
    ) -> tuple[Float[Tensor, " found"], Int[Tensor, " found"], Int[Tensor, " batch"]]:
        """All scores from a threshold on, their latents, and how many each vector has.

        Args:
            x: vectors, the decoder's bias subtracted.
            W: encoder rows, as they were copied.
            b: encoder bias.
            threshold: the least score that is wanted.
            room: scores of a vector beyond which it is scored in full.
        """
        room = min(room, len(W))
        values, latents = x.new_empty(len(x), room), int32(len(x), room)
        counts = self.select(x, W, b, threshold=threshold, out=(values, latents)).long()
        failed = (counts < 0).nonzero()[:, 0]
        counts[failed] = 0
        taken = torch.arange(room) < counts[:, None]
        found, of = values[taken], latents[taken].long()
        if len(failed):
            extra = exact_above(x[failed], W, b, threshold)
            return _merge(found, of, counts, failed, extra)
        return found, of, counts


def reconstruct(
    target: Float[Tensor, "batch d_in"],
    W_dec: Float[Tensor, "n_latents d_in"],
    starts: Int[Tensor, " batch_plus_one"],
    ends: Int[Tensor, "batch stages"],
    latents: Int[Tensor, " entries"],
    values: Float[Tensor, " entries"],
    weights: list[float],
    *,
    grads: Float[Tensor, " entries"],
    error_rows: Int[Tensor, " entries"],
    errors: Float[Tensor, "rows d_in"],
    target_norms: Float[Tensor, " batch"],
    error_norms: Float[Tensor, " rows"],
    error_sums: Float[Tensor, "tasks d_in"],
) -> Float[Tensor, "batch stages"]:
    """Decode in stages, and give the gradients of Σ weight / 2 · ‖x̂ − target‖².

    Args:
        target: what is reconstructed.
        W_dec: decoder rows.
        starts: where a vector's entries begin.
        ends: where each of its stages ends; a stage uses all entries up to its end.
        latents: of the entries, int32.
        values: in: pre-activations; out: activations.
        weights: of the stages.
        grads: out: gradients of the pre-activations.
        error_rows: out: for each entry the row of `errors` that its decoder row's gradient needs.
        errors: out: weighted errors, those of later stages added.
        target_norms: out: norms of the targets, float64.
        error_norms: out: norms of the rows of `errors`, float64.
        error_sums: out: sums of the first stage's errors over `ROWS_OF_A_TASK` vectors each.

    Returns:
        Squared errors, float64.
    """
    losses = torch.empty(ends.shape, dtype=torch.float64)
    scaled = torch.tensor(weights, dtype=torch.float64)
    struct = _Reconstruction(
        *map(_at, (target, W_dec, starts, ends, latents, values, grads, error_rows, errors)),
        *map(_at, (scaled, losses, target_norms, error_norms, error_sums)),
        len(target), len(weights), target.shape[1], ROWS_OF_A_TASK,
    )  # fmt: skip
    _function("reconstruct", target.dtype)(byref(struct), c_int(torch.get_num_threads()))
    return losses


class _CodeInBlocks:
    """A code with many entries a vector, as a sparse matrix whose sums share rows; see blocks.h."""

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
        blocks = -(-n_columns // _constant("block"))
        by_vector = order == "by_vector"
        self.starts = int32((blocks + 1) * n_rows if by_vector else blocks * n_rows + 1)
        self.struct = _Blocks(
            n_rows, n_columns, *map(_at, (self.starts, columns, entries)),
            n_rows if by_vector else 1,
        )  # fmt: skip
        self.kept = columns, entries  # while the struct points to them
        getattr(_loaded(), f"sparsight_blocks_{order}")(
            c_void_p(_at(latents)), *map(c_int64, (*latents.shape, n_latents)),
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
        """For each row the sum of its entries' rows of `base`, weighted; `add` adds it to `out`.

        Args:
            weights: in the order of the entries.
            base: a row for each column of the matrix.
            out: changed in place.
            add: keep what is in `out`.
        """
        _function("block_sums", out.dtype)(
            byref(self.struct), c_void_p(_at(weights)), c_void_p(_at(base)),
            c_int64(out.shape[1]), c_int(add), c_void_p(_at(out)),
            c_int(torch.get_num_threads()),
        )  # fmt: skip
        return out


class VectorsByLatents(_CodeInBlocks):
    """A code as it stands, with vectors for rows.

    Args:
        latents: of each vector's entries, int32, rising; behind the last -1.
        n_latents: how many there are.
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
        """For each entry the dot product of its row of `x` with its row of `base`, if its value is
        above 0, else 0."""
        _function("block_products", x.dtype)(
            byref(self.struct), c_void_p(_at(x)), c_void_p(_at(base)), c_int64(x.shape[1]),
            c_void_p(_at(values)), c_void_p(_at(out)), c_int(torch.get_num_threads()),
        )  # fmt: skip


class LatentsByVectors(_CodeInBlocks):
    """A code with latents for rows, in an order of its own.

    Args:
        latents: of each vector's entries, int32; -1 where there is none.
        n_latents: how many there are.
        room: for the columns and the places of the entries.
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
        """Numbers of the code's entries in the order of this matrix, and their sums by latents.

        Args:
            of_code: the numbers.
            room: for as many.
        """
        out = torch.empty_like(of_code).flatten() if room is None else room
        sums = of_code.new_empty(self.struct.n_rows)
        _function("block_order", of_code.dtype)(
            byref(self.struct), *(c_void_p(_at(each)) for each in (of_code, out, sums)),
            c_int(torch.get_num_threads()),
        )  # fmt: skip
        return out, sums


def by_latent(
    latents: Int[Tensor, " entries"],
    n_latents: int,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    starts: Int[Tensor, " n_plus_one"],
    vector_norms: Float[Tensor, " batch"],
    error_norms: Float[Tensor, " rows"],
) -> tuple[float, float]:
    """Order vectors, error rows (int32), values and gradients of entries by their latents.

    Returns:
        What the squared norm of the gradients of all latents cannot exceed, and the sum of the
        sizes of the code's gradients.
    """
    function = _function("by_latent", inputs[2].dtype)
    function.restype = c_double
    gradient_sum = c_double()
    square = function(
        c_void_p(_at(latents)), c_int64(len(latents)), c_int64(n_latents), c_void_p(_at(starts)),
        *(c_void_p(_at(each)) for each in (*inputs, *outputs, vector_norms, error_norms)),
        byref(gradient_sum), c_int(torch.get_num_threads()),
    )  # fmt: skip
    return float(square), gradient_sum.value


def update(
    dtype: torch.dtype,
    tensors: dict[str, Tensor],
    numbers: dict[str, float],
    dictionary: Dictionary | None,
) -> None:
    """One step of Adam for all latents; see `Update` in update.inc for the names."""
    fields = {name: _at(each) for name, each in tensors.items()} | numbers
    if dictionary is not None:
        fields["dictionary"] = ctypes.pointer(dictionary.struct)  # type: ignore[assignment]
    struct = _Update(**fields)
    _function("update", dtype)(byref(struct), c_int(torch.get_num_threads()))


def int32(*shape: int) -> Tensor:
    """An empty tensor of the type that the kernels count latents and rows in."""
    return torch.empty(*shape, dtype=torch.int32)


def _merge(
    found: Tensor, of: Tensor, counts: Tensor, rows: Tensor, extra: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Put the entries of some rows, which have none yet, between those of the others."""
    values, latents, extra_counts = extra
    all_rows = torch.arange(len(counts))
    order = torch.cat(
        [torch.repeat_interleave(all_rows, counts), torch.repeat_interleave(rows, extra_counts)]
    ).argsort(stable=True)
    counts = counts.index_put((rows,), extra_counts)
    merged = torch.cat([of, latents])[order]
    return torch.cat([found, values])[order], merged, counts
