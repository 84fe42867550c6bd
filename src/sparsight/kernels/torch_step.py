"""The training step in plain torch operations, for any device and without a compiler."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from sparsight.kernels.auxiliary import Auxiliary, dense_auxiliary
from sparsight.kernels.bounds import (
    Int8Bounds,
    Int8Encoder,
    fast_bfloat16,
    select_surely,
)
from sparsight.kernels.interface import MATRICES, FusedStep, StepFigures, least_positive
from sparsight.kernels.memory import use_large_pages
from sparsight.kernels.selection import (
    enough_candidates,
    ragged_products,
    select_code,
    select_topk,
    tile_rows,
)

CHUNK = 1024
"""Number of latents whose gradients exist at the same time, on a CPU."""


class _Code(NamedTuple):
    """Entries, vector after vector, with the starts of vectors and the ends of their stages."""

    values: Float[Tensor, " entries"]
    latents: Int[Tensor, " entries"]
    starts: Int[Tensor, " batch_plus_one"]
    ends: Int[Tensor, "batch stages"]


class TorchStep(FusedStep):
    """See `FusedStep`."""

    precisions = ("float32", "bfloat16", "int8")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.W_enc.dtype != torch.float32:
            self.precision = "float32"
        self.name = f"torch-{self.precision}"
        # A GPU can hold all gradients; their norm then costs nothing.
        size = CHUNK if self.W_enc.device.type == "cpu" else self.n_latents
        self.chunks = [
            _Chunk(self, first, min(first + size, self.n_latents))
            for first in range(0, self.n_latents, size)
        ]
        self.of_b_dec = _Adam(self, ["b_dec"], slice(None))
        self.low: Int8Encoder | tuple[Tensor, Tensor] | None = None
        self.candidates: int | None = None
        self.scores = torch.empty(0)
        # Gradients of a chunk, kept because fresh memory causes page faults.
        self.sums = self.W_enc.new_empty(2, min(size, self.n_latents), self.d_in)
        use_large_pages(
            *(getattr(self, name) for name in MATRICES),
            *(each for name in MATRICES for each in self.moments[name]),
        )

    def _copy_encoder(self) -> None:
        if self.precision == "int8":
            self.low = Int8Encoder(self.W_enc)
        elif self.precision == "bfloat16":
            self.low = self.W_enc.bfloat16(), self.b_enc.bfloat16()
            use_large_pages(self.low[0])

    def _step(
        self,
        z: Float[Tensor, "batch d_in"],
        lr: float,
        number: int,
        dead: Int[Tensor, " dead"] | None,
    ) -> StepFigures:
        n, plan = len(z), self.plan
        x = z - self.b_dec
        code = self._code(x)
        weights = self.stage_weights(n)
        errors, squared = self._errors(x, code, weights)
        rows_of_errors, grads = self._code_gradients(code, errors)
        loss = sum(w * s for w, s in zip(plan.weights, squared, strict=True))
        loss = torch.as_tensor(loss) / (n * self.variance)
        own = self.own_values(code.values, n)
        active, least = (own > 0).sum(), least_positive(own)
        aux, aux_loss = None, loss.new_zeros(())
        if dead is not None and len(dead):
            aux, aux_loss = dense_auxiliary(self, x, self.residual(errors, weights), dead)
        loss = loss + plan.aux_alpha * aux_loss
        vectors = torch.repeat_interleave(
            torch.arange(n, device=x.device), code.starts.diff(), output_size=len(code.latents)
        )
        fired = torch.zeros(self.n_latents + 1, dtype=torch.bool, device=x.device)
        main = (code.values > 0) & (rows_of_errors < (plan.main + 1) * n)
        fired[torch.where(main, code.latents, self.n_latents)] = True
        self.since_fired.add_(n).masked_fill_(fired[:-1], 0)

        latents, order = code.latents.sort(stable=True)
        every = torch.arange(self.n_latents, device=x.device)
        entries = _Ordered(
            vectors[order], rows_of_errors[order], code.values[order], grads[order],
            torch.searchsorted(latents, every, right=True),
        )  # fmt: skip
        norm = self._update(x, errors.flatten(0, 1), entries, aux, lr, number)
        return StepFigures(squared[plan.main], loss, aux_loss, active, norm, least)

    def _code(self, x: Float[Tensor, "batch d_in"]) -> _Code:
        values, latents, starts = select_code(x, self.W_enc, self.b_enc, self.plan, self._select)
        return _Code(values, latents, starts, self.stage_ends(starts, latents))

    def _select(self, x: Float[Tensor, "batch d_in"], k: int) -> tuple[Tensor, Tensor]:
        low, W, b = self.low, self.W_enc, self.b_enc
        if isinstance(low, Int8Encoder):
            room = self._room(x, torch.int32)
            values, latents, self.candidates = select_surely(
                x, W, b, k, Int8Bounds(low, x, b), self.candidates, room
            )
            if self.candidates >= self.n_latents > enough_candidates(k, self.n_latents):
                self._leave_int8()
            return values, latents
        room = self._room(x, torch.bfloat16 if low else x.dtype)
        return select_topk(x, W, b, k, self.precision, low, room)

    def _room(self, x: Float[Tensor, "batch d_in"], dtype: torch.dtype) -> Tensor:
        """Return memory for the pre-activations of a tile."""
        wanted = tile_rows(x, self.n_latents) * self.n_latents
        if self.scores.numel() < wanted or self.scores.dtype != dtype:
            self.scores = torch.empty(wanted, dtype=dtype, device=x.device)
            use_large_pages(self.scores)
        return self.scores

    def _leave_int8(self) -> None:
        """Stop using int8, which does not fit: dimensions are huge, or many scores are close."""
        self.precision = "bfloat16" if fast_bfloat16(self.W_enc.device) else "float32"
        self.low = None
        self.name = f"torch-{self.precision}"
        self._copy_encoder()

    def _errors(
        self, x: Float[Tensor, "batch d_in"], code: _Code, weights: list[float]
    ) -> tuple[Float[Tensor, "stages batch d_in"], list[Float[Tensor, ""]]]:
        """Return the stages' weighted errors, with later stages added, and their squared sums."""
        n, stages = len(x), len(weights)
        errors = x.new_empty(stages, n, self.d_in)
        squared = []
        error = -x
        if stages == 1:
            bags = code.starts[:-1]
            summed = _weighted_sums(code.latents, code.values, bags, self.W_dec)
            error += summed
            squared.append(_square(error))
            torch.mul(error, weights[0], out=errors[0])
            return errors, squared
        # One bag per vector and stage: between the ends of two stages.
        bags = torch.cat([code.starts[:-1, None], code.ends[:, :-1]], dim=1).flatten()
        parts = _weighted_sums(code.latents, code.values, bags, self.W_dec).view(n, stages, -1)
        for stage, weight in enumerate(weights):
            error += parts[:, stage]
            squared.append(_square(error))
            torch.mul(error, weight, out=errors[stage])
        for stage in reversed(range(stages - 1)):
            errors[stage] += errors[stage + 1]
        return errors, squared

    def _code_gradients(
        self, code: _Code, errors: Float[Tensor, "stages batch d_in"]
    ) -> tuple[Int[Tensor, " entries"], Float[Tensor, " entries"]]:
        """Return the row of errors to which each entry belongs, and its gradient."""
        stages, n, _ = errors.shape
        device = errors.device
        if stages == 1:
            rows = torch.repeat_interleave(
                torch.arange(n, device=device), code.starts.diff(), output_size=len(code.latents)
            )
            grads = ragged_products(errors[0], self.W_dec, code.starts, code.latents)
            return rows, torch.where(code.values > 0, grads, 0)
        lengths = torch.diff(code.ends, dim=1, prepend=code.starts[:-1, None])
        row = torch.arange(n, device=device)[:, None] + n * torch.arange(stages, device=device)
        rows = torch.repeat_interleave(
            row.flatten(), lengths.flatten(), output_size=len(code.latents)
        )
        starts = functional.pad(lengths.flatten().cumsum(0), (1, 0))
        by_vector = errors.transpose(0, 1).reshape(n * stages, -1)
        grads = ragged_products(by_vector, self.W_dec, starts, code.latents)
        return rows, torch.where(code.values > 0, grads, 0)

    def _update(
        self,
        x: Float[Tensor, "batch d_in"],
        errors: Float[Tensor, "rows d_in"],
        entries: _Ordered,
        aux: Auxiliary | None,
        lr: float,
        number: int,
    ) -> Float[Tensor, ""]:
        of_bias = _sums_by_latent(entries.grads, entries.ends)
        if aux is not None:
            of_bias.index_add_(0, aux.latents, aux.b_enc)
        of_b_dec = errors[: len(x)].sum(dim=0) - of_bias @ self.W_enc
        along = self._along(entries, aux) if self.unit_norm else None
        small = of_b_dec.double().square().sum() + of_bias.double().square().sum()
        ends = [0, len(entries.vectors)]
        if len(self.chunks) > 1:
            ends = [0, *entries.ends[[chunk.last - 1 for chunk in self.chunks]].tolist()]
        spans = list(zip(self.chunks, ends, ends[1:], strict=False))
        if isinstance(self.low, Int8Encoder):
            self.low.set_unit()
        if len(self.chunks) == 1:
            self.chunks[0].differentiate(x, errors, entries, 0, ends[1], aux, along)
            norm = (self.chunks[0].square() + small).sqrt()
            clip = self._clip(norm)
        else:
            clip = None
            if self._may_need_clipping(x, errors, entries, aux, small):
                total = small
                for chunk, first, last in spans:
                    chunk.differentiate(x, errors, entries, first, last, aux, along)
                    total = total + chunk.square()
                clip = self._clip(total.sqrt())
            norm = small
        for chunk, first, last in spans:
            if len(self.chunks) > 1:
                chunk.differentiate(x, errors, entries, first, last, aux, along)
                norm = norm + chunk.square()
            chunk.update(of_bias, clip, lr, number)
        if len(self.chunks) > 1:
            norm = norm.sqrt()
        self.of_b_dec.step(
            {"b_dec": of_b_dec if clip is None else of_b_dec * clip.to(of_b_dec.dtype)}, lr, number
        )
        return norm

    def _along(self, entries: _Ordered, aux: Auxiliary | None) -> Float[Tensor, " n_latents"]:
        """Return the products of the decoder's rows with their gradients, from those of the code.

        An entry adds `value · error` to the gradient of its row, and `error · row` is the gradient
        of its pre-activation.
        """
        along = _sums_by_latent(entries.values * entries.grads, entries.ends)
        if aux is not None:
            along.index_add_(0, aux.latents, (aux.W_dec * self.W_dec[aux.latents]).sum(dim=1))
        return along

    def _clip(self, norm: Float[Tensor, ""]) -> Float[Tensor, ""] | None:
        if self.adam.max_norm is None:
            return None
        return (self.adam.max_norm / (norm + 1e-6)).clamp(max=1.0)

    def _may_need_clipping(
        self,
        x: Float[Tensor, "batch d_in"],
        errors: Float[Tensor, "rows d_in"],
        entries: _Ordered,
        aux: Auxiliary | None,
        small: Float[Tensor, ""],
    ) -> bool:
        """Return whether sums of norms, which norms of sums cannot exceed, reach the limit."""
        if self.adam.max_norm is None:
            return False
        of_x = entries.grads.abs() * x.norm(dim=1)[entries.vectors]
        of_errors = entries.values * errors.norm(dim=1)[entries.error_rows]
        enc, dec = (_sums_by_latent(each, entries.ends) for each in (of_x, of_errors))
        if aux is not None:
            enc = enc.index_add(0, aux.latents, aux.W_enc.norm(dim=1))
            dec = dec.index_add(0, aux.latents, aux.W_dec.norm(dim=1))
        bound = enc.double().square().sum() + dec.double().square().sum() + small
        return bool(bound > self.adam.max_norm**2)


class _Ordered(NamedTuple):
    """Entries in the order of their latents, and the end of each latent's entries."""

    vectors: Int[Tensor, " entries"]
    error_rows: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    grads: Float[Tensor, " entries"]
    ends: Int[Tensor, " n_latents"]


class _Adam:
    """`torch.optim.Adam` over parts of the parameters, with moments that are stored elsewhere."""

    def __init__(self, step: FusedStep, names: list[str], part: slice) -> None:
        self.parts = {name: getattr(step, name)[part] for name in names}
        self.optimiser = torch.optim.Adam(
            list(self.parts.values()), betas=step.adam.betas, eps=step.adam.eps, fused=True
        )
        for name, each in self.parts.items():
            mean, square = step.moments[name]
            self.optimiser.state[each] = {
                "step": torch.zeros((), dtype=torch.float32, device=each.device),
                "exp_avg": mean[part],
                "exp_avg_sq": square[part],
            }

    def step(self, gradients: dict[str, Tensor], lr: float, number: int) -> None:
        """Take one step with these gradients."""
        self.optimiser.param_groups[0]["lr"] = lr
        for name, each in self.parts.items():
            each.grad = gradients[name]
            self.optimiser.state[each]["step"].fill_(number - 1)
        self.optimiser.step()


class _Chunk:
    """A chunk of latents: their gradients, and their share of the update."""

    def __init__(self, step: TorchStep, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.whole = step
        self.optimiser = _Adam(step, [*MATRICES, "b_enc"], slice(first, last))
        self.sums = torch.empty(0)

    def differentiate(
        self,
        x: Float[Tensor, "batch d_in"],
        errors: Float[Tensor, "rows d_in"],
        entries: _Ordered,
        begin: int,
        end: int,
        aux: Auxiliary | None,
        along: Float[Tensor, " n_latents"] | None,
    ) -> None:
        """Sum the gradients of these latents' rows, whose entries are `begin` to `end`.

        The components `along` the decoder's rows are removed.
        """
        part = slice(begin, end)
        starts = functional.pad(entries.ends[self.first : self.last], (1, 0), value=begin) - begin
        self.sums = self.whole.sums[:, : self.last - self.first]
        of_enc, of_dec = self.sums
        _sum_rows(entries.vectors[part], entries.grads[part], starts, x, of_enc)
        _sum_rows(entries.error_rows[part], entries.values[part], starts, errors, of_dec)
        if aux is not None:
            inside = (aux.latents >= self.first) & (aux.latents < self.last)
            _add(of_enc, aux.latents, aux.W_enc, inside, self.first)
            _add(of_dec, aux.latents, aux.W_dec, inside, self.first)
        if along is not None:
            W_dec = self.optimiser.parts["W_dec"]
            of_dec.addcmul_(along[self.first : self.last, None], W_dec, value=-1)

    def square(self) -> Float[Tensor, ""]:
        """Return the squared norm of the gradients."""
        return _square(self.sums)

    def update(
        self,
        of_bias: Float[Tensor, " n_latents"],
        clip: Float[Tensor, ""] | None,
        lr: float,
        number: int,
    ) -> None:
        """Apply Adam, and update norms and the copy in low precision."""
        part = slice(self.first, self.last)
        of_enc, of_dec = self.sums
        gradients = {"W_enc": of_enc, "W_dec": of_dec, "b_enc": of_bias[part]}
        if clip is not None:
            gradients = {name: each * clip.to(each.dtype) for name, each in gradients.items()}
        self.optimiser.step(gradients, lr, number)
        parts = self.optimiser.parts
        if self.whole.unit_norm:
            W_dec = parts["W_dec"]
            W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_(min=1e-12))
        low = self.whole.low
        if isinstance(low, Int8Encoder):
            low.refresh(parts["W_enc"], self.first, room=of_enc)
        elif low is not None:
            low[0][part].copy_(parts["W_enc"])
            low[1][part].copy_(parts["b_enc"])


def _add(
    out: Tensor, latents: Tensor, rows: Tensor, inside: Bool[Tensor, " dead"], first: int
) -> None:
    out.index_add_(0, latents[inside] - first, rows[inside])


def _weighted_sums(
    indices: Int[Tensor, " entries"],
    weights: Float[Tensor, " entries"],
    starts: Int[Tensor, " bags"],
    rows: Float[Tensor, "n d_in"],
) -> Float[Tensor, "bags d_in"]:
    """Return the weighted sum of the rows that each bag of entries names."""
    return functional.embedding_bag(indices, rows, starts, per_sample_weights=weights, mode="sum")


def _sum_rows(
    indices: Int[Tensor, " entries"],
    weights: Float[Tensor, " entries"],
    starts: Int[Tensor, " bags_plus_one"],
    rows: Float[Tensor, "n d_in"],
    out: Float[Tensor, "bags d_in"],
) -> None:
    """Sum as `_weighted_sums` does, into existing memory."""
    if rows.device.type == "cpu" and torch.backends.mkl.is_available():
        size = (len(out), len(rows))
        bags = torch.sparse_csr_tensor(starts, indices, weights, size, check_invariants=False)
        torch.addmm(out, bags, rows, beta=0, out=out)
    else:
        out.copy_(_weighted_sums(indices, weights, starts[:-1], rows))


def _square(x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, ""]:
    """Return the sum of squares: per row in its own precision, over rows in float64."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norms.double().square().sum()


def _sums_by_latent(
    values: Float[Tensor, " entries"], ends: Int[Tensor, " n_latents"]
) -> Float[Tensor, " n_latents"]:
    starts = functional.pad(ends[:-1], (1, 0))
    return torch.segment_reduce(values, "sum", offsets=torch.cat([starts, ends[-1:]]), initial=0)
