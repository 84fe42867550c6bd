"""A small training problem, a back end's step on it, and the same step in plain autograd."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sparsight.kernels import Adam, FusedStep, Stage, training_step
from sparsight.kernels.bounds import supports_int8
from sparsight.kernels.native import build, library
from sparsight.kernels.plan import Plan
from sparsight.sae.objectives import SAEPlan, dense_loss
from sparsight.sae.remedies import AuxK
from sparsight.sae.sparsity import BatchTopK, TopK, Weights

D_IN, N_LATENTS, BATCH, K = 26, 200, 40, 5
LR, EPS, BETAS = 1e-3, 1e-8, (0.9, 0.999)
SHARES = (0.2, 0.3, 0.5)


def plans(n_latents: int = N_LATENTS) -> dict[str, SAEPlan]:
    widths = (n_latents // 4, n_latents // 2, n_latents)
    prefixes = tuple(Stage(weight, width=w) for weight, w in zip(SHARES, widths, strict=True))
    return {
        "topk": Plan(TopK(K)),
        "batch-topk": Plan(BatchTopK(K)),
        "multi-topk": Plan(TopK(K), (Stage(), Stage(1 / 8, k=4 * K))),
        "matryoshka": Plan(TopK(K), prefixes, main=2),
        "batch-matryoshka": Plan(BatchTopK(K), prefixes, main=2),
    }


PLANS = plans()

NEEDS_INT8 = pytest.mark.skipif(
    not supports_int8(torch.device("cpu")), reason="torch does not multiply int8 exactly here"
)
TORCH_INT8 = pytest.param("torch", "int8", marks=NEEDS_INT8)


def use_variant(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the native kernels that were compiled for one set of instructions, or skip the test."""
    path = build.library(variant)
    if not path.exists():
        pytest.skip(f"{variant} was not built: another processor or compiler")
    compiled = ctypes.CDLL(str(path))
    if not compiled.sparsight_runs_here():
        pytest.skip(f"{variant} does not run on this processor")
    monkeypatch.setattr(library, "load", lambda: (compiled, variant))


def with_aux(plan: SAEPlan, aux_k: int = 8) -> SAEPlan:
    return replace(plan, remedy=AuxK(alpha=1 / 32, k=aux_k))


def dead_latents(n_latents: int = N_LATENTS) -> Tensor:
    return torch.arange(3, n_latents, 6)


class Problem(NamedTuple):
    parameters: dict[str, Tensor]
    batches: list[Tensor]

    def to(self, device: str) -> Problem:
        return Problem(
            {name: each.to(device) for name, each in self.parameters.items()},
            [z.to(device) for z in self.batches],
        )


def make_problem(
    dtype: torch.dtype,
    massive: bool = False,
    n_latents: int = N_LATENTS,
    d_in: int = D_IN,
    batch: int = BATCH,
) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W = normal(n_latents, d_in)
    W_dec = W / W.norm(dim=1, keepdim=True)
    parameters = {"W_enc": 0.3 * W, "b_enc": 0.1 * normal(n_latents), "W_dec": W_dec}
    parameters["b_dec"] = 0.1 * normal(d_in)
    batches = [normal(batch, d_in) for _ in range(10)]
    if massive:
        for z in batches:
            z[:, :2] *= 100
    return Problem(
        {name: each.to(dtype).clone() for name, each in parameters.items()},
        [z.to(dtype) for z in batches],
    )


class Ours:
    def __init__(
        self,
        kernels: str,
        precision: str,
        plan: SAEPlan,
        problem: Problem,
        clip: float | None = None,
    ) -> None:
        self.parameters = problem.parameters
        self.moments = {
            name: (torch.zeros_like(each), torch.zeros_like(each))
            for name, each in self.parameters.items()
        }
        n_latents, d_in = self.parameters["W_enc"].shape
        self.since_fired = self.parameters["b_enc"].new_zeros(n_latents, dtype=torch.int64)
        step = training_step(
            kernels, self.parameters, self.moments, self.since_fired, plan,
            Adam(BETAS, EPS, clip), variance=float(d_in), unit_norm=True, precision=precision,
        )  # fmt: skip
        assert isinstance(step, FusedStep)
        self.fused = step


class Reference:
    """Take the same step in autograd."""

    def __init__(self, plan: SAEPlan, problem: Problem, clip: float | None = None) -> None:
        self.parameters = {name: each.requires_grad_() for name, each in problem.parameters.items()}
        self.adam = torch.optim.Adam(self.parameters.values(), lr=LR, betas=BETAS, eps=EPS)
        self.plan, self.clip = plan, clip
        self.variance = float(self.parameters["W_enc"].shape[1])
        self.norm = torch.zeros(())

    def step(self, z: Tensor, dead: Tensor | None):
        weights = Weights(**self.parameters, centre=self.parameters["b_dec"])
        found = dense_loss(weights, z, self.plan, self.variance, dead)
        self.adam.zero_grad()
        found.loss.backward()
        W_dec = self.parameters["W_dec"]
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec
        self.norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), math.inf if self.clip is None else self.clip
        )
        self.adam.step()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return found


def assert_same_steps(
    ours: Ours, truth: Reference, batches: list[Tensor], dead: Tensor | None
) -> None:
    """Compare figures, gradients and parameters of both, in float64, step by step."""
    for number, z in enumerate(batches, start=1):
        mine = ours.fused.step(z, lr=LR, number=number, dead=dead)
        found = truth.step(z, dead)
        torch.testing.assert_close(mine.loss.double(), found.loss.detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(mine.aux_loss, found.aux_loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(mine.squared_error, found.squared_error, rtol=1e-10, atol=0)
        torch.testing.assert_close(mine.grad_norm, truth.norm, rtol=1e-10, atol=0)
        assert mine.active == (found.code > 0).sum()
        assert mine.least.item() == pytest.approx(found.code[found.code > 0].min().item())
        assert_same_gradients(ours, truth)
        for each, parameter in truth.parameters.items():
            torch.testing.assert_close(
                ours.parameters[each], parameter.detach(), rtol=0, atol=1e-10
            )


def assert_same_gradients(ours: Ours, truth: Reference) -> None:
    for each, parameter in truth.parameters.items():
        # The first moment after a step is a tenth of the gradient.
        expected = truth.adam.state[parameter]["exp_avg"]
        atol = 1e-12 * expected.abs().max().item()
        torch.testing.assert_close(ours.moments[each][0], expected, rtol=1e-9, atol=atol)
