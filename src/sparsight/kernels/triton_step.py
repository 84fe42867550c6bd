"""The training step in Triton's kernels: on a GPU, or slowly in Triton's interpreter.

A product in bfloat16 or float8 selects latents; it also returns the largest score of each group of
latents, so that a top-k reads only a small part of the scores. One kernel decodes a vector and
differentiates, another updates a latent. Nothing is fetched from the device, except for the size of
a batch's code with `per_batch`.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.graph import increment_version

from sparsight.kernels import triton_kernels
from sparsight.kernels.auxiliary import Auxiliary, dense_auxiliary
from sparsight.kernels.interface import FusedStep, StepFigures, least_positive
from sparsight.kernels.selection import enough_candidates, select_code, select_topk, tile_rows
from sparsight.kernels.triton_kernels import (
    FLOAT8,
    FP_FUSION,
    GROUP,
    INTERPRETED,
    LARGEST_FLOAT8,
    LATENTS_OF_A_PROGRAM,
    SMALLEST,
    Tile,
)

TILE = Tile()


class _Entries(NamedTuple):
    """Entries of the code, vector after vector, with what the step needs about them."""

    latents: Int[Tensor, " entries"]
    vectors: Int[Tensor, " entries"]
    error_rows: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    grads: Float[Tensor, " entries"]


class _Low(NamedTuple):
    """Rows in low precision, and their scales if that is float8."""

    rows: Float[Tensor, "n d_in"]
    scales: Float[Tensor, " n"] | Float[Tensor, ""]


class TritonStep(FusedStep):
    """See `FusedStep`; float32 or float64."""

    precisions = ("float32", "bfloat16", "float8")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.device, self.dtype = self.W_enc.device, self.W_enc.dtype
        self.name = f"triton-{self.precision}"
        rows = triton_kernels.rows_of(self.d_in)
        self.by_rows: dict[str, Any] = {
            "WIDTH": rows.width, "ENTRIES": rows.entries, "num_warps": rows.warps, **FP_FUSION
        }  # fmt: skip
        self.low: _Low | None = None
        self.encoder_squares = self._new(self.n_latents)
        programs = triton.cdiv(self.n_latents, LATENTS_OF_A_PROGRAM)
        self.partial_b_dec = self._new(programs, self.d_in)
        self.partial_squares = self._new(programs, dtype=torch.float64)
        self.weights = torch.tensor(self.plan.weights, dtype=torch.float64, device=self.device)
        (beta1, beta2), eps = self.adam.betas, self.adam.eps
        self.settings = torch.tensor(
            [0.0, beta1, 1 - beta1, beta2, 1 - beta2, 1.0, eps],
            dtype=self.dtype, device=self.device,
        )  # fmt: skip
        self.whole = torch.ones((), dtype=self.dtype, device=self.device)
        self.members = torch.arange(GROUP, device=self.device)
        self.scores = self._new(0, dtype=torch.bfloat16)

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def _copy_encoder(self) -> None:
        self.low = self._coded(self.W_enc)
        self.encoder_squares = self.W_enc.square().sum(dim=1)

    def _coded(self, rows: Float[Tensor, "n d_in"]) -> _Low | None:
        """Return rows in the precision of the selection; None if that is their own."""
        if self.precision == "bfloat16":
            return _Low(rows.bfloat16(), self.whole)
        if self.precision == "float8":
            rows = rows.float()
            scales = rows.abs().amax(dim=1).clamp(min=SMALLEST.value) / LARGEST_FLOAT8.value
            return _Low((rows / scales[:, None]).to(FLOAT8), scales)
        return None

    def _on_device(self) -> AbstractContextManager[Any]:
        """Make the step's device current, because Triton starts kernels there."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _step(
        self,
        z: Float[Tensor, "batch d_in"],
        lr: float,
        number: int,
        dead: Int[Tensor, " dead"] | None,
    ) -> StepFigures:
        with self._on_device():
            return self._step_here(z, lr, number, dead)

    def _step_here(
        self,
        z: Float[Tensor, "batch d_in"],
        lr: float,
        number: int,
        dead: Int[Tensor, " dead"] | None,
    ) -> StepFigures:
        n, plan = len(z), self.plan
        x = (z - self.b_dec).contiguous()
        values, latents, starts = select_code(x, self.W_enc, self.b_enc, plan, self._select)
        bounds = torch.cat([starts[:-1, None], self.stage_ends(starts, latents)], dim=1)
        vectors = torch.repeat_interleave(
            torch.arange(n, device=self.device), starts.diff(), output_size=len(latents)
        )
        entries = _Entries(
            latents, vectors, self._new(len(latents), dtype=torch.int32), values,
            self._new(len(latents)),
        )  # fmt: skip
        errors = self._new(plan.n_stages, n, self.d_in)
        squares = self._new(n, plan.n_stages)
        norms = self._new(n), self._new(plan.n_stages * n)
        triton_kernels.reconstruct[(n,)](
            x, self.W_dec, bounds, latents, values,
            (self.weights * (2 / (n * self.variance))).to(self.dtype),
            entries.grads, entries.error_rows, errors, squares, *norms, n, self.d_in,
            N_STAGES=plan.n_stages, NORMS=self.adam.max_norm is not None,
            **self.by_rows,
        )  # fmt: skip
        sums = squares.sum(dim=0, dtype=torch.float64)
        loss = (sums * self.weights).sum() / (n * self.variance)
        own = self.own_values(values, n)
        active, least = (own > 0).sum(), least_positive(own)
        aux, aux_loss = None, loss.new_zeros(())
        if dead is not None and len(dead):
            target = self.residual(errors, self.stage_weights(n))
            aux, aux_loss = dense_auxiliary(self, x, target, dead)
        loss = loss + plan.aux_alpha * aux_loss
        norm = self._update(x, errors.flatten(0, 1), entries, norms, aux, lr, number)
        return StepFigures(sums[plan.main], loss, aux_loss, active, norm, least)

    def _select(
        self, x: Float[Tensor, "batch d_in"], k: int
    ) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
        """Return the k largest scores of each vector, and their latents, ascending if needed."""
        if self.low is None:
            return select_topk(x, self.W_enc, self.b_enc, k, "float32")
        n_groups = triton.cdiv(self.n_latents, GROUP)
        wanted = self._enough_candidates(k)
        rows = min(len(x), tile_rows(x, n_groups * GROUP))
        if self.scores.shape != (rows, n_groups * GROUP):
            self.scores = self._new(rows, n_groups * GROUP, dtype=torch.bfloat16)
        of_tiles = [
            self._choose(x[first : first + rows], k, wanted, n_groups)
            for first in range(0, len(x), rows)
        ]
        if len(of_tiles) == 1:
            return of_tiles[0]
        values, latents = zip(*of_tiles, strict=True)
        return torch.cat(values), torch.cat(latents)

    def _enough_candidates(self, k: int) -> int:
        """Return how many of the largest scores in low precision contain the true k.

        In float8, whose errors are 16 times those of bfloat16, the true k were among the 1.9 k
        largest in tests with mixtures of directions, even with a few huge dimensions.
        """
        if self.precision == "float8":
            return min(self.n_latents, k + max(2 * k, 32))
        return enough_candidates(k, self.n_latents)

    def _choose(
        self, x: Float[Tensor, "rows d_in"], k: int, wanted: int, n_groups: int
    ) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
        """Select as `_select` does, for vectors whose scores fit into memory."""
        n, width, tile = len(x), n_groups * GROUP, TILE
        scores, maxima = self.scores[:n], self._new(n, n_groups, dtype=torch.bfloat16)
        tiles = triton.cdiv(n, tile.vectors) * triton.cdiv(width, tile.latents)
        of_x, of_W = self._coded(x), self.low
        assert of_x is not None and of_W is not None
        triton_kernels.score_groups[(tiles,)](
            of_x.rows, of_W.rows, of_x.scales, of_W.scales, self.b_enc, scores, maxima,
            n, self.n_latents, width, self.d_in, GROUP=GROUP, VECTORS=tile.vectors,
            LATENTS=tile.latents, DEPTH=tile.depth, TOGETHER=tile.together,
            SCALED=self.precision == "float8", AS_FLOAT=INTERPRETED,
            num_warps=tile.warps, num_stages=tile.stages, **FP_FUSION,
        )  # fmt: skip
        if n_groups > wanted:
            # The largest scores are in the groups with the largest maxima.
            groups = maxima.topk(wanted, dim=1, sorted=False).indices
            members = (groups[:, :, None] * GROUP + self.members).flatten(1)
            best = scores.gather(1, members).topk(wanted, dim=1, sorted=False).indices
            candidates = members.gather(1, best)
        else:
            candidates = scores.topk(wanted, dim=1, sorted=False).indices
        if width > self.n_latents:  # if no score is finite, padding may have been chosen
            candidates = candidates.clamp_(max=self.n_latents - 1)
        exact = self._new(n, wanted)
        triton_kernels.score_candidates[(n,)](
            x, self.W_enc, self.b_enc, candidates, exact, wanted, self.d_in,
            **self.by_rows,
        )  # fmt: skip
        values, kept = exact.topk(k, dim=1, sorted=False)
        latents = candidates.gather(1, kept)
        if self.plan.widths:
            latents, order = latents.sort(dim=1)
            values = values.gather(1, order)
        return values, latents

    def _update(
        self,
        x: Float[Tensor, "batch d_in"],
        errors: Float[Tensor, "rows d_in"],
        entries: _Entries,
        norms: tuple[Float[Tensor, " batch"], Float[Tensor, " rows"]],
        aux: Auxiliary | None,
        lr: float,
        number: int,
    ) -> Float[Tensor, ""]:
        (beta1, beta2), n = self.adam.betas, len(x)
        step_size, root = lr / (1 - beta1**number), math.sqrt(1 - beta2**number)
        self.settings[0].fill_(step_size)
        self.settings[5].fill_(root)
        latents, order = entries.latents.int().sort(stable=True)
        entries = _Entries(latents, *(each[order] for each in entries[1:]))
        starts = torch.searchsorted(
            latents,
            torch.arange(self.n_latents + 1, dtype=latents.dtype, device=self.device),
        )
        of_main = errors[:n].sum(dim=0)
        clip = self.whole
        if self.adam.max_norm is not None:
            # A pass that computes the norm; its programs end at once if clipping cannot be needed.
            needed = self._may_need_clipping(entries, starts, norms, of_main, aux)
            self._launch(x, errors, entries, starts, aux, clip, needed, apply=False)
            scale = (self.adam.max_norm / (self._norm(of_main)[0] + 1e-6)).clamp(max=1.0)
            clip = torch.where(needed, scale, 1.0).to(self.dtype)
        self._launch(x, errors, entries, starts, aux, clip, self.whole, apply=True)
        norm, of_b_dec = self._norm(of_main)
        of_b_dec *= clip
        mean, square = self.moments["b_dec"]
        mean.lerp_(of_b_dec, 1 - beta1)
        square.mul_(beta2).addcmul_(of_b_dec, of_b_dec, value=1 - beta2)
        divisor = square.sqrt().div_(root).add_(self.adam.eps)
        self.b_dec.addcdiv_(mean, divisor, value=-step_size)
        for each in (self.W_enc, self.b_enc, self.W_dec):
            increment_version(each)  # so that autograd notices changes made outside it
        return norm

    def _launch(
        self,
        x: Float[Tensor, "batch d_in"],
        errors: Float[Tensor, "rows d_in"],
        entries: _Entries,
        starts: Int[Tensor, " n_latents_plus_one"],
        aux: Auxiliary | None,
        clip: Float[Tensor, ""],
        needed: Tensor,
        *,
        apply: bool,
    ) -> None:
        """Update every latent, or only compute the sums."""
        n = len(x)
        # Kernels need some tensor for absent ones, but do not read it.
        of_aux = (starts, x, x, x)
        if aux is not None:
            rows = torch.full((self.n_latents,), -1, dtype=torch.int32, device=self.device)
            rows[aux.latents] = torch.arange(len(aux.latents), dtype=torch.int32, device=x.device)
            of_aux = (rows, aux.W_enc, aux.b_enc, aux.W_dec)
        triton_kernels.update_latents[(len(self.partial_squares),)](
            starts, *entries[1:], x, errors,
            self.W_enc, *self.moments["W_enc"], self.b_enc, *self.moments["b_enc"],
            self.W_dec, *self.moments["W_dec"],
            *(self.low or (self.W_enc, self.whole)), self.encoder_squares, self.since_fired,
            *of_aux, self.settings, clip, needed, self.partial_b_dec, self.partial_squares,
            self.n_latents, n, (self.plan.main + 1) * n, self.d_in,
            UNIT_NORM=self.unit_norm, AUX=aux is not None, LOW=self.low is not None,
            SCALED=self.precision == "float8", APPLY=apply,
            LATENTS=LATENTS_OF_A_PROGRAM, **self.by_rows,
        )  # fmt: skip

    def _norm(
        self, of_main: Float[Tensor, " d_in"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " d_in"]]:
        """Return the norm of the gradient, and its part at b_dec, from the sums of a pass."""
        of_b_dec = of_main - self.partial_b_dec.sum(dim=0)
        square = self.partial_squares.sum() + of_b_dec.double().square().sum()
        return square.sqrt(), of_b_dec

    def _may_need_clipping(
        self,
        entries: _Entries,
        starts: Int[Tensor, " n_latents_plus_one"],
        norms: tuple[Float[Tensor, " batch"], Float[Tensor, " rows"]],
        of_main: Float[Tensor, " d_in"],
        aux: Auxiliary | None,
    ) -> Bool[Tensor, ""]:
        """Return whether sums of norms, which norms of sums cannot exceed, reach the limit."""
        x_norms, error_norms = norms
        sizes = entries.grads.abs()
        of_enc, of_dec, of_bias = (
            torch.segment_reduce(each, "sum", offsets=starts, initial=0)
            for each in (
                sizes * x_norms[entries.vectors],
                entries.values * error_norms[entries.error_rows],
                sizes,
            )
        )
        if aux is not None:
            of_enc = of_enc.index_add(0, aux.latents, aux.W_enc.norm(dim=1))
            of_dec = of_dec.index_add(0, aux.latents, aux.W_dec.norm(dim=1))
            of_bias = of_bias.index_add(0, aux.latents, aux.b_enc.abs())
        of_b_dec = of_main.norm() + of_bias.sum() * self.encoder_squares.max().sqrt()
        squares = [each.double().square().sum() for each in (of_enc, of_dec, of_bias, of_b_dec)]
        # A small margin, because sums in another order may round up.
        return torch.stack(squares).sum() * 1.001 > (self.adam.max_norm or math.inf) ** 2
