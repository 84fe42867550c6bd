"""The training step in compiled code."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.graph import increment_version

from sparsight.kernels.auxiliary import Auxiliary
from sparsight.kernels.interface import MATRICES, FusedStep, StepFigures, least_positive
from sparsight.kernels.memory import use_large_pages
from sparsight.kernels.native import library
from sparsight.kernels.native.blocks import LatentsByVectors, VectorsByLatents
from sparsight.kernels.selection import batch_topk, exact_above, select_topk

MOST_GIVEN_UP = 0.01
"""Largest share of vectors that int8 selection may leave to full scoring; beyond it, int8 ends."""


class NativeStep(FusedStep):
    """See `FusedStep`; float32 or float64, on the CPU."""

    precisions = ("float32", "bfloat16", "int8")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dtype = self.W_enc.dtype
        self.chunk = 16 * -(-self.n_latents // (16 * library.CHUNKS))
        n_chunks = -(-self.n_latents // self.chunk)
        self.partial_b_dec = torch.empty(n_chunks, self.d_in, dtype=self.dtype)
        self.partial_square = torch.empty(n_chunks, dtype=torch.float64)
        self.starts_by_latent = library.int32(self.n_latents + 1)
        self.dictionary: library.Dictionary | None = None
        self.fits = False
        self.memory: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        use_large_pages(
            *(getattr(self, name) for name in MATRICES),
            *(each for name in MATRICES for each in self.moments[name]),
        )
        loaded = library.load()
        self.name = f"native-{self.precision}" + (f" ({loaded[1]})" if loaded else "")

    def _copy_encoder(self) -> None:
        self.dictionary = None  # until there are vectors to which it can be fitted

    def _copy_encoder_for(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Renew the copy of the encoder, fitted to these vectors."""
        if self.precision == "int8" or self.precision == "bfloat16":
            self.dictionary = library.Dictionary(self.W_enc, self.b_enc, self.precision, x)
        self.fits = False

    def _step(
        self,
        z: Float[Tensor, "batch d_in"],
        lr: float,
        number: int,
        dead: Int[Tensor, " dead"] | None,
    ) -> StepFigures:
        n, plan = len(z), self.plan
        x = torch.sub(z, self.b_dec, out=self._buffer("x", n, self.d_in))
        if self.dictionary is None:
            self._copy_encoder_for(x)
        room = n * plan.selected
        latents = self._buffer("latents", room, dtype=torch.int32)
        values, grads = self._buffer("values", room), self._buffer("grads", room)
        error_rows = self._buffer("error_rows", room, dtype=torch.int32)
        vectors = self._buffer("vectors", room, dtype=torch.int32)
        errors = self._buffer("errors", plan.n_stages * n, self.d_in)

        if plan.per_batch:
            starts = self._select_of_batch(x, values, latents)
        else:
            of_vector = (n, plan.selected)
            self._select(
                x, plan.selected, plan.k if plan.larger_k else 0,
                (values.view(of_vector), latents.view(of_vector)),
            )  # fmt: skip
            starts = torch.arange(0, room + 1, plan.selected)
        used = int(starts[-1])
        ends = self.stage_ends(starts, latents[:used])
        rows = torch.arange(n, dtype=torch.int32)
        vectors[:used] = torch.repeat_interleave(rows, starts.diff(), output_size=used)
        weights = self.stage_weights(n)
        squared = library.reconstruct(
            x, self.W_dec, starts, ends, latents, values, weights,
            grads=grads, error_rows=error_rows, errors=errors,
            target_norms=self._buffer("x_norms", n, dtype=torch.float64),
            error_norms=self._buffer("error_norms", len(errors), dtype=torch.float64),
            error_sums=self._buffer("error_sums", -(-n // library.ROWS_OF_A_TASK), self.d_in),
        )  # fmt: skip
        sums = squared.sum(dim=0)
        loss = (sums * torch.tensor(plan.weights, dtype=torch.float64)).sum()
        loss = loss / (n * self.variance)
        own = self.own_values(values[:used], n)
        active, least = (own > 0).sum(), least_positive(own)
        aux, aux_loss = None, torch.zeros((), dtype=torch.float64)
        if dead is not None and len(dead) > 0:
            error, spread = self._left_over(errors, weights, sums)
            if spread > 0:
                aux, aux_loss = self._auxiliary(x, error, dead, spread)
        loss = loss + plan.aux_alpha * aux_loss
        norm = self._update(x, errors, vectors, used, aux, lr, number)
        return StepFigures(sums[plan.main], loss, aux_loss, active, norm, least)

    def _fit_again(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Fit the copy to changed vectors; if the last fit did not help, stop using int8."""
        if not self.fits:
            self.precision = "bfloat16"
            self.name = self.name.replace("int8", "bfloat16")
        self._copy_encoder_for(x)

    def _select(
        self, x: Float[Tensor, "batch d_in"], k: int, k_inner: int, out: tuple[Tensor, Tensor]
    ) -> None:
        if self.dictionary is not None:
            _, given_up = self.dictionary.topk(
                x, self.W_enc, self.b_enc, k, k_inner=k_inner, out=out
            )
            if given_up <= MOST_GIVEN_UP * len(x):
                self.fits = True
            elif self.precision == "int8":
                self._fit_again(x)
            return
        values, latents = out
        values[:], latents[:] = select_topk(x, self.W_enc, self.b_enc, k, "float32")
        if k_inner:
            order = values.argsort(dim=1, descending=True)
            values[:], latents[:] = values.gather(1, order), latents.gather(1, order)

    def _select_of_batch(
        self, x: Float[Tensor, "batch d_in"], values: Tensor, latents: Tensor
    ) -> Int[Tensor, " batch_plus_one"]:
        """Fill in the k · batch largest entries of all; return the start of each vector's."""
        n, wanted = len(x), len(x) * self.plan.k
        scores, of, counts = self._from_threshold(x, wanted)
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep[scores.topk(wanted, sorted=False).indices] = True
        values[:wanted], latents[:wanted] = scores[keep], of[keep]
        rows = torch.repeat_interleave(torch.arange(n), counts, output_size=len(scores))[keep]
        starts = torch.zeros(n + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(rows, minlength=n), dim=0, out=starts[1:])
        return starts

    def _from_threshold(
        self, x: Float[Tensor, "batch d_in"], wanted: int
    ) -> tuple[Float[Tensor, " found"], Int[Tensor, " found"], Int[Tensor, " batch"]]:
        """Return at least the `wanted` largest scores, by a threshold from a sample of vectors."""
        n = len(x)
        sample = x[:: max(1, n // 128)].contiguous()
        k = min(self.n_latents, 4 * self.plan.k)
        selected = (sample.new_empty(len(sample), k), library.int32(len(sample), k))
        self._select(sample, k, 0, selected)
        ordered = selected[0].flatten().sort(descending=True).values
        excess = 1.2
        while True:
            rank = math.ceil(excess * wanted * len(sample) / n)
            threshold = ordered[rank - 1].item() if rank <= len(ordered) else -math.inf
            if not math.isfinite(threshold):
                return batch_topk(x, self.W_enc, self.b_enc, self.plan.k, self._strongest)
            scores, of, counts = self._all_from(x, threshold)
            if len(scores) >= wanted:
                return scores, of, counts
            excess *= 1.5

    def _strongest(self, x: Float[Tensor, "batch d_in"], k: int) -> tuple[Tensor, Tensor]:
        out = (x.new_empty(len(x), k), library.int32(len(x), k))
        self._select(x, k, 0, out)
        return out

    def _all_from(
        self, x: Float[Tensor, "batch d_in"], threshold: float
    ) -> tuple[Float[Tensor, " found"], Int[Tensor, " found"], Int[Tensor, " batch"]]:
        if self.dictionary is None:
            return exact_above(x, self.W_enc, self.b_enc, threshold)
        room = 8 * self.plan.k
        return self.dictionary.above(x, self.W_enc, self.b_enc, threshold, room)

    def _left_over(
        self,
        errors: Float[Tensor, "rows d_in"],
        weights: list[float],
        squared: Float[Tensor, " stages"],
    ) -> tuple[Float[Tensor, "batch d_in"], float]:
        """Return ẑ − z, and its squared distance from its mean."""
        if len(weights) > 1:
            error = -self.residual(errors.view(len(weights), -1, self.d_in), weights)
            return error, (error - error.mean(dim=0)).double().square().sum().item()
        error = torch.mul(errors, 1 / weights[0], out=self._buffer("aux_error", *errors.shape))
        mean = self.buffers["error_sums"].sum(dim=0, dtype=torch.float64) / weights[0] / len(error)
        spread = (squared[0] - len(error) * mean.square().sum()).item()
        noise = 64 * torch.finfo(self.dtype).eps * float(squared[0])
        return error, spread if spread > noise else 0.0

    def _auxiliary(
        self,
        x: Float[Tensor, "batch d_in"],
        error: Float[Tensor, "batch d_in"],
        dead: Int[Tensor, " dead"],
        spread: float,
    ) -> tuple[Auxiliary, Float[Tensor, ""]]:
        """Compute `dense_auxiliary` with only the latents that are active; changes `error`."""
        n, k = len(x), min(self.plan.aux_k, len(dead))
        W_enc, W_dec, of_enc, of_dec = (
            self._buffer(name, len(dead), self.d_in)
            for name in ("aux_W_enc", "aux_W_dec", "aux_of_enc", "aux_of_dec")
        )
        b_enc = self.b_enc[dead]
        torch.index_select(self.W_enc, 0, dead, out=W_enc)
        torch.index_select(self.W_dec, 0, dead, out=W_dec)
        values, grads = self._buffer("aux_values", n, k), self._buffer("aux_grads", n, k)
        latents = self._buffer("aux_latents", n, k, dtype=torch.int32)
        low: Literal["bfloat16", "int8"] = "bfloat16" if self.precision == "bfloat16" else "int8"
        dictionary = library.Dictionary(W_enc, b_enc, low, x)
        dictionary.topk(x, W_enc, b_enc, k, threshold=0.0, out=(values, latents))
        values.relu_()  # fully scored ones may be negative
        matrix = VectorsByLatents(latents, len(dead))
        matrix.sums(values.flatten(), W_dec, error, add=True)
        norms = torch.linalg.vector_norm(error, dim=1)
        error.mul_(2 * self.plan.aux_alpha / spread)
        matrix.products(error, W_dec, values, grads)
        room = self._buffer("aux_entries", 2, n * k, dtype=torch.int32)
        turned = LatentsByVectors(latents, len(dead), room)
        ordered = self._buffer("aux_ordered", n * k)
        of_code, of_bias = turned.ordered(grads, ordered)
        turned.sums(of_code, x, of_enc)
        turned.sums(turned.ordered(values, ordered)[0], error, of_dec)
        aux = Auxiliary(dead.to(torch.int32), of_enc, of_bias, of_dec)
        return aux, norms.double().square().sum() / spread

    def _update(
        self,
        x: Float[Tensor, "batch d_in"],
        errors: Float[Tensor, "rows d_in"],
        vectors: Int[Tensor, " room"],
        used: int,
        aux: Auxiliary | None,
        lr: float,
        number: int,
    ) -> Float[Tensor, ""]:
        n, adam = len(x), self.adam
        inputs = (
            vectors,
            self.buffers["error_rows"],
            self.buffers["values"],
            self.buffers["grads"],
        )
        ordered = tuple(
            self._buffer(f"ordered_{i}", len(vectors), dtype=each.dtype)
            for i, each in enumerate(inputs)
        )
        bound, grad_sum = library.by_latent(
            self.buffers["latents"][:used], self.n_latents, inputs, ordered,
            self.starts_by_latent, self.buffers["x_norms"], self.buffers["error_norms"],
        )  # fmt: skip
        of_vectors, of_errors, values, grads = ordered
        tensors = {
            "starts": self.starts_by_latent, "vectors": of_vectors, "errors_of": of_errors,
            "values": values, "grads": grads, "x": x, "errors": errors,
            "since_fired": self.since_fired, "partial_b_dec": self.partial_b_dec,
            "partial_square": self.partial_square, "b_enc": self.b_enc,
        }  # fmt: skip
        if aux is not None:
            tensors |= {
                "extra": aux.latents, "extra_enc": aux.W_enc,
                "extra_dec": aux.W_dec, "extra_bias": aux.b_enc,
            }  # fmt: skip
            sizes = [torch.linalg.vector_norm(each).item() for each in aux[1:]]
            bound = (math.sqrt(bound) + math.hypot(*sizes)) ** 2
            grad_sum += aux.b_enc.abs().sum().item()
        for name in (*MATRICES, "b_enc"):
            tensors[name] = getattr(self, name)
            tensors[f"{name}_m"], tensors[f"{name}_v"] = self.moments[name]
        numbers = {
            "step_size": lr / (1 - adam.betas[0] ** number), "beta1": adam.betas[0],
            "beta2": adam.betas[1], "root_correction2": math.sqrt(1 - adam.betas[1] ** number),
            "eps": adam.eps, "clip": 1.0, "n": self.n_latents, "d": self.d_in,
            "chunk": self.chunk, "n_main_errors": (self.plan.main + 1) * n,
            "n_vectors": n, "n_extra": len(aux.latents) if aux is not None else 0,
            "unit_norm": int(self.unit_norm), "apply": 1,
        }  # fmt: skip
        of_main = self.buffers["error_sums"].sum(dim=0)
        # The norm is known only after the update. If it cannot reach the limit, as in all but the
        # first few steps, that does not matter; otherwise an extra pass computes it first.
        at_b_dec = float(of_main.norm()) + grad_sum * self._largest_encoder_norm()
        if adam.max_norm is not None and bound + at_b_dec**2 > adam.max_norm**2:
            library.update(self.dtype, tensors, numbers | {"apply": 0}, None)
            numbers["clip"] = min(1.0, adam.max_norm / (self._norm(of_main)[0].item() + 1e-6))
        library.update(self.dtype, tensors, numbers, self.dictionary)
        norm, of_b_dec = self._norm(of_main)
        of_b_dec *= numbers["clip"]
        mean, square = self.moments["b_dec"]
        mean.lerp_(of_b_dec, 1 - adam.betas[0])
        square.mul_(adam.betas[1]).addcmul_(of_b_dec, of_b_dec, value=1 - adam.betas[1])
        divisor = square.sqrt().div_(numbers["root_correction2"]).add_(adam.eps)
        self.b_dec.addcdiv_(mean, divisor, value=-numbers["step_size"])
        for each in (self.W_enc, self.b_enc, self.W_dec):
            increment_version(each)  # so that autograd notices changes made outside it
        return norm

    def _norm(self, of_main: Float[Tensor, " d_in"]) -> tuple[Tensor, Tensor]:
        """Return the norm of the gradient, and its part at b_dec, from the sums of an update."""
        of_b_dec = of_main - self.partial_b_dec.sum(dim=0)
        square = self.partial_square.sum() + of_b_dec.double().square().sum()
        return square.sqrt(), of_b_dec

    def _largest_encoder_norm(self) -> float:
        if self.dictionary is not None:
            return float(self.dictionary.norms.max())
        return float(torch.linalg.matrix_norm(self.W_enc))

    def _buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor whose memory is kept from step to step while it is large enough."""
        n = math.prod(shape)
        kept = self.memory.get(name)
        if kept is None or len(kept) < n:
            kept = torch.empty(n + n // 8, dtype=dtype or self.dtype)
            use_large_pages(kept)
            self.memory[name] = kept
        self.buffers[name] = kept[:n].view(shape)
        return self.buffers[name]
