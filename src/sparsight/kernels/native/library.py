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
from torch.nn import functional

from sparsight.errors import SparsightError
from sparsight.kernels.memory import use_large_pages
from sparsight.kernels.native import build
from sparsight.kernels.selection import exact_above, select_exactly

CHUNKS = 64
"""Number of parts of the update whose sums are added in order, so threads do not change bits."""

ROWS_OF_A_TASK = 16
"""Number of vectors whose errors `reconstruct` sums."""

ROW_PADDING = 16
"""The centre is padded with zeros to a multiple of this: the most numbers that a register holds."""

SAMPLE = 64
"""Number of vectors to which a dictionary is fitted."""

WIDE = 4.0
"""Multiple of the usual width of a dimension above which the dimension is narrowed."""

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
        ("norms", c_void_p),
        ("stretch", c_void_p),
        ("shrink", c_void_p),
        ("centre", c_void_p),
        ("centre_norm", c_double),
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


@lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL, str] | None:
    """Load the fastest compiled variant that this processor runs; None if there is none."""
    for variant in build.VARIANTS:
        path = build.library(variant)
        if not path.exists():
            continue
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:  # compiled for another system
            continue
        if _of_these_sources(loaded) and loaded.sparsight_runs_here():
            _share_threads(loaded)
            return loaded, variant
    return None


def multiplies_int8() -> bool:
    """Return whether the loaded library multiplies int8 faster than others multiply float32."""
    loaded = load()
    return loaded is not None and loaded[1] != "portable"


def _share_threads(loaded: ctypes.CDLL) -> None:
    """Run on the threads of torch's OpenMP runtime, if that has GNU's interface."""
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(torch_cpu)).GOMP_parallel  # from a library on which it depends
    except (OSError, AttributeError):
        return
    loaded.sparsight_use_openmp(parallel)


def _of_these_sources(loaded: ctypes.CDLL) -> bool:
    """Return whether a library was compiled from these sources: others have other structures."""
    if not hasattr(loaded, "sparsight_sources"):
        return False
    loaded.sparsight_sources.restype = c_char_p
    return bool(loaded.sparsight_sources() == build.fingerprint().encode())


def opened() -> ctypes.CDLL:
    """Return the compiled variant in use.

    Raises:
        SparsightError: there is none.
    """
    loaded = load()
    if loaded is None:
        raise SparsightError("The native kernels are not built, or do not run on this processor.")
    return loaded[0]


def function(name: str, dtype: torch.dtype) -> Any:
    """Return the kernels' function with this name for numbers of this dtype."""
    return getattr(opened(), f"sparsight_{name}_{_SUFFIXES[dtype]}")


def constant(name: str) -> int:
    """Return a size that the kernels export."""
    return c_int64.in_dll(opened(), f"sparsight_{name}").value


def at(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's numbers; None for None."""
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
        precision: precision of the copy.
        like: some of the vectors, or similar ones. What they have in common, and their widest
            dimensions, then take no precision from the rest. The selected latents do not depend on
            it.
    """

    def __init__(
        self,
        W: Float[Tensor, "n_latents d_in"],
        b: Float[Tensor, " n_latents"],
        precision: Literal["int8", "bfloat16"],
        like: Float[Tensor, "some d_in"] | None = None,
    ) -> None:
        n, d = W.shape
        tile = constant("tile_latents")
        padded = -(-n // tile) * tile
        groups = -(-d // 4) if precision == "int8" else -(-d // 2)
        groups = -(-groups // constant("tile_groups")) * constant("tile_groups")
        self.tensors = (
            torch.empty(padded * groups * 4, dtype=torch.uint8),
            torch.empty(padded),
            torch.empty(padded, dtype=torch.int32),
            *(torch.empty(padded) for _ in range(4)),
        )
        use_large_pages(self.tensors[0])
        self.frame: tuple[Tensor, ...] = ()
        self.struct = _Dictionary(_KINDS[precision], n, d, *(at(each) for each in self.tensors))
        if like is not None and len(like):
            stretch, centre = _frame(like)
            middle = functional.pad(centre * stretch, (0, -len(centre) % ROW_PADDING))
            self.frame = stretch, 1 / stretch, middle
            if bool((stretch != 1).any()):
                self.struct.stretch, self.struct.shrink = map(at, self.frame[:2])
            self.struct.centre = at(self.frame[2])
            self.struct.centre_norm = float(torch.linalg.vector_norm(self.frame[2].double()))
        self.refresh(W, b)

    @property
    def norms(self) -> Float[Tensor, " n"]:
        """The norms of the encoder rows."""
        return self.tensors[6][: self.struct.n_latents]

    def refresh(self, W: Float[Tensor, "n_latents d_in"], b: Float[Tensor, " n_latents"]) -> None:
        """Copy the encoder again."""
        function("pack", W.dtype)(
            byref(self.struct), c_void_p(at(W)), c_void_p(at(b)),
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
        """Select the k largest of `W x + b` for each vector, or, if k is 0, all from `threshold`
        on.

        Scores are exact; latents are in ascending order, with `k_inner` the largest `k_inner`
        first.

        Args:
            x: vectors, with the decoder's bias subtracted.
            W: encoder rows, as they were copied.
            b: encoder bias.
            k: number of latents.
            k_inner: how many of them come first.
            threshold: the lowest score that is selected.
            out: scores and latents (int32) of each vector; if there are fewer than k, the rest is
                -1.

        Returns:
            The number of latents found per vector; -1 if rounding left too many uncertain, more
            were found than `out` has room for, or a score is not finite.
        """
        values, latents = out
        counts = torch.empty(len(x), dtype=torch.int32)
        function("select", x.dtype)(
            byref(self.struct), c_void_p(at(x)), c_int64(len(x)), c_void_p(at(W)),
            c_void_p(at(b)), c_int64(k), c_int64(k_inner), _real(x.dtype, threshold),
            c_int64(values.shape[1]), c_void_p(at(values)), c_void_p(at(latents)),
            c_void_p(at(counts)), c_int(torch.get_num_threads()),
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
        """Select like `select`, and score in full the vectors that it gives up, at any threshold.

        How a vector is scored changes no bit.

        Latents are in ascending order, except those of `k_inner`, which come first.

        Returns:
            The number of latents per vector, and how many vectors were scored in full.
        """
        values, latents = out
        counts = self.select(x, W, b, k=k, k_inner=k_inner, threshold=threshold, out=out)
        failed = (counts < 0).nonzero()[:, 0]
        if len(failed):
            rest = x[failed]
            selected = select_exactly(rest, W, b, k, decide=scores)[1]
            starts = torch.arange(0, selected.numel() + 1, k)
            their_scores = scores(rest, W, b, starts, selected.flatten()).view_as(selected)
            if k_inner:
                their_scores, order = their_scores.sort(dim=1, descending=True)
                selected = selected.gather(1, order)
            values[failed], latents[failed] = their_scores, selected.to(torch.int32)
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
        """Return all scores from a threshold on, their latents, and how many each vector has.

        Args:
            x: vectors, with the decoder's bias subtracted.
            W: encoder rows, as they were copied.
            b: encoder bias.
            threshold: the lowest score that is selected.
            room: number of scores per vector above which a vector is scored in full.
        """
        room = min(room, len(W))
        values, latents = x.new_empty(len(x), room), int32(len(x), room)
        counts = self.select(x, W, b, threshold=threshold, out=(values, latents)).long()
        failed = (counts < 0).nonzero()[:, 0]
        counts[failed] = 0
        taken = torch.arange(room) < counts[:, None]
        found, of = values[taken], latents[taken].long()
        if len(failed):
            rest = x[failed]
            _, latents, extra = exact_above(rest, W, b, threshold, scores)
            starts = functional.pad(extra.cumsum(0), (1, 0))
            of_rest = scores(rest, W, b, starts, latents)
            return _merge(found, of, counts, failed, (of_rest, latents, extra))
        return found, of, counts


def scores(
    x: Float[Tensor, "batch d_in"],
    W: Float[Tensor, "n_latents d_in"],
    b: Float[Tensor, " n_latents"],
    starts: Int[Tensor, " batch_plus_one"],
    latents: Int[Tensor, " entries"],
) -> Float[Tensor, " entries"]:
    """Score each vector's own latents, with the same bits as a `Dictionary`.

    Args:
        x: vectors, with the decoder's bias subtracted.
        W: encoder rows.
        b: encoder bias.
        starts: where a vector's latents begin.
        latents: the latents of all vectors.
    """
    x, W, b, of = (each.contiguous() for each in (x, W, b, latents.to(torch.int32)))
    out = x.new_empty(len(of))
    function("score", x.dtype)(
        *(c_void_p(at(each)) for each in (x, W, b, starts.contiguous(), of)),
        c_int64(len(x)), c_int64(x.shape[1]), c_void_p(at(out)), c_int(torch.get_num_threads()),
    )  # fmt: skip
    return out


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
    """Decode in stages, and compute the gradients of Σ weight / 2 · ‖x̂ − target‖².

    Args:
        target: what is reconstructed.
        W_dec: decoder rows.
        starts: where a vector's entries begin.
        ends: where each of its stages ends; a stage uses all entries up to its end.
        latents: latents of the entries, int32.
        values: in: pre-activations; out: activations.
        weights: weights of the stages.
        grads: out: gradients of the pre-activations.
        error_rows: out: for each entry, the row of `errors` that its decoder row's gradient needs.
        errors: out: weighted errors, with those of later stages added.
        target_norms: out: norms of the targets, float64.
        error_norms: out: norms of the rows of `errors`, float64.
        error_sums: out: sums of the first stage's errors over `ROWS_OF_A_TASK` vectors each.

    Returns:
        Squared errors, float64.
    """
    losses = torch.empty(ends.shape, dtype=torch.float64)
    scaled = torch.tensor(weights, dtype=torch.float64)
    struct = _Reconstruction(
        *map(at, (target, W_dec, starts, ends, latents, values, grads, error_rows, errors)),
        *map(at, (scaled, losses, target_norms, error_norms, error_sums)),
        len(target), len(weights), target.shape[1], ROWS_OF_A_TASK,
    )  # fmt: skip
    function("reconstruct", target.dtype)(byref(struct), c_int(torch.get_num_threads()))
    return losses


def by_latent(
    latents: Int[Tensor, " entries"],
    n_latents: int,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    starts: Int[Tensor, " n_plus_one"],
    vector_norms: Float[Tensor, " batch"],
    error_norms: Float[Tensor, " rows"],
) -> tuple[float, float]:
    """Order the entries' vectors, error rows (int32), values and gradients by latent.

    Returns:
        An upper bound of the squared norm of the gradients of all latents, and the sum of the
        absolute gradients of the code.
    """
    find = function("by_latent", inputs[2].dtype)
    find.restype = c_double
    gradient_sum = c_double()
    square = find(
        c_void_p(at(latents)), c_int64(len(latents)), c_int64(n_latents), c_void_p(at(starts)),
        *(c_void_p(at(each)) for each in (*inputs, *outputs, vector_norms, error_norms)),
        byref(gradient_sum), c_int(torch.get_num_threads()),
    )  # fmt: skip
    return float(square), gradient_sum.value


def update(
    dtype: torch.dtype,
    tensors: dict[str, Tensor],
    numbers: dict[str, float],
    dictionary: Dictionary | None,
) -> None:
    """Run one step of Adam for all latents; see `Update` in update.inc for the names."""
    fields = {name: at(each) for name, each in tensors.items()} | numbers
    if dictionary is not None:
        fields["dictionary"] = ctypes.pointer(dictionary.struct)  # type: ignore[assignment]
    struct = _Update(**fields)
    function("update", dtype)(byref(struct), c_int(torch.get_num_threads()))


def _frame(
    like: Float[Tensor, "some d_in"],
) -> tuple[Float[Tensor, " d_in"], Float[Tensor, " d_in"]]:
    """Return the scale that makes the vectors' dimensions about equally wide, and their centre.

    The widest dimensions are narrowed by the root of their excess, and encoder rows become wider
    there by as much. Medians are used, because a single vector may be of any size.
    """
    sample = like[:: max(1, len(like) // SAMPLE)].float()
    centre = sample.nanmedian(dim=0).values.nan_to_num(0, 0, 0).clamp(-1e9, 1e9)
    width = (sample - centre).abs().nanmedian(dim=0).values
    excess = width / width.nanmedian()
    narrowed = excess.isfinite() & (excess > WIDE)
    exponents = torch.where(narrowed, excess, 1).log2().div(-2).round().clamp(min=-20)
    return torch.exp2(exponents), centre


def int32(*shape: int) -> Tensor:
    """Return an empty tensor of the dtype in which the kernels count latents and rows."""
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
