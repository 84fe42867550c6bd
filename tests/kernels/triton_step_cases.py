"""The step in Triton against dense autograd: on a GPU, or with `TRITON_INTERPRET=1` on a CPU.

`test_triton_steps.py` runs this file in a process of its own, for the variable counts when Triton
is imported. The interpreter takes milliseconds for a latent or a vector: hence few of both, and
few steps.
"""

from __future__ import annotations

import pytest
import torch
from step_parts import (
    LR,
    Ours,
    Problem,
    Reference,
    assert_same_gradients,
    assert_same_steps,
    dead_latents,
    make_problem,
    plans,
    with_aux,
)

from sparsight.kernels.triton_step import TritonStep

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N_LATENTS, BATCH = 40, 20
PLANS = plans(N_LATENTS)
DEAD = dead_latents(N_LATENTS).to(DEVICE)


def _problem(dtype: torch.dtype, massive: bool = False, n_latents: int = N_LATENTS) -> Problem:
    return make_problem(dtype, massive, n_latents, batch=BATCH).to(DEVICE)


@pytest.mark.parametrize("name", PLANS)
def test_gradients_and_steps_match_dense_autograd(name: str) -> None:
    ours = Ours("triton", "bfloat16", PLANS[name], _problem(torch.float64))
    problem = _problem(torch.float64)
    truth = Reference(PLANS[name], problem)
    assert_same_steps(ours, truth, problem.batches[:2], None)


@pytest.mark.parametrize("name", ["topk", "batch-matryoshka"])
def test_auxk_and_selection_in_full_precision_match_dense_autograd(name: str) -> None:
    plan = with_aux(PLANS[name])
    ours = Ours("triton", "float32", plan, _problem(torch.float64, massive=True))
    problem = _problem(torch.float64, massive=True)
    assert_same_steps(ours, Reference(plan, problem), problem.batches[:2], DEAD)


@pytest.mark.parametrize("clip", [1e-3, 10.0])
def test_clipping_uses_the_whole_gradient(clip: float) -> None:
    plan = with_aux(PLANS["multi-topk"])
    ours = Ours("triton", "bfloat16", plan, _problem(torch.float64), clip)
    problem = _problem(torch.float64)
    truth = Reference(plan, problem, clip)
    z = problem.batches[0]
    mine = ours.fused.step(z, lr=LR, number=1, dead=DEAD)
    truth.step(z, DEAD)
    torch.testing.assert_close(mine.grad_norm, truth.norm, rtol=1e-10, atol=0)
    assert_same_gradients(ours, truth)


def test_losses_of_steps_in_float32_match_dense_autograd() -> None:
    plan = with_aux(PLANS["matryoshka"])
    ours = Ours("triton", "bfloat16", plan, _problem(torch.float32))
    problem = _problem(torch.float32)
    truth = Reference(plan, problem)
    for number, z in enumerate(problem.batches[:2], start=1):
        mine = ours.fused.step(z, lr=LR, number=number, dead=DEAD)
        assert float(mine.loss) == pytest.approx(truth.step(z, DEAD).loss.item(), abs=1e-6)
    assert isinstance(ours.fused, TritonStep)
    # The interpreter truncates digits where a GPU rounds.
    assert ours.fused.low is not None
    low = ours.fused.low.rows.float()
    torch.testing.assert_close(low, ours.parameters["W_enc"], rtol=2**-7, atol=0)
    norms = ours.parameters["W_enc"].square().sum(dim=1)
    torch.testing.assert_close(ours.fused.encoder_squares, norms)


def test_a_step_counts_how_long_latents_have_been_silent() -> None:
    ours = Ours("triton", "bfloat16", PLANS["multi-topk"], _problem(torch.float64))
    with torch.no_grad():
        ours.parameters["b_enc"][:10] = -100.0
    ours.fused.step(_problem(torch.float64).batches[0], lr=LR, number=1)
    assert (ours.since_fired[:10] == BATCH).all()
    assert (ours.since_fired[10:] == 0).double().mean() > 0.9


@pytest.mark.parametrize("name", ["topk", "batch-matryoshka"])
def test_steps_with_selection_in_float8_match_dense_autograd(name: str) -> None:
    ours = Ours("triton", "float8", PLANS[name], _problem(torch.float64, massive=True))
    problem = _problem(torch.float64, massive=True)
    assert_same_steps(ours, Reference(PLANS[name], problem), problem.batches[:2], None)
    assert isinstance(ours.fused, TritonStep) and ours.fused.low is not None
    rows, scales = ours.fused.low
    W = ours.parameters["W_enc"].float()
    torch.testing.assert_close(scales, W.abs().amax(dim=1) / 448)
    # A half of the last place is a 16th; the interpreter cuts off, and loses the carry of what it
    # rounds up to a power of two. Near 0 places have an even width.
    found = rows.float() * scales[:, None]
    off = (found - W).abs()
    if DEVICE == "cpu":
        off = torch.minimum(off, (2 * found - W).abs()) / 2
    assert (off <= 1.01 * torch.maximum(W.abs() / 16, scales[:, None] / 1024)).all()


@pytest.mark.parametrize(
    ("precision", "massive"), [("bfloat16", False), ("float8", False), ("float8", True)]
)
@pytest.mark.parametrize(("n_latents", "d_in", "k"), [(1500, 70, 24), (1029, 26, 7), (30, 26, 30)])
def test_selection_is_exact(
    n_latents: int, d_in: int, k: int, precision: str, massive: bool
) -> None:
    problem = make_problem(torch.float32, massive, n_latents, d_in, BATCH).to(DEVICE)
    fused = Ours("triton", precision, PLANS["topk"], problem).fused
    assert isinstance(fused, TritonStep)
    fused._copy_encoder()
    x = problem.batches[0]
    values, latents = fused._select(x, k)
    scores = torch.addmm(fused.b_enc.double(), x.double(), fused.W_enc.double().T)
    truth = scores.topk(k, dim=1)
    assert torch.equal(latents.sort(dim=1).values, truth.indices.sort(dim=1).values)
    torch.testing.assert_close(values.double(), scores.gather(1, latents), rtol=1e-5, atol=1e-5)


def test_selection_in_several_tiles_matches_selection_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = _problem(torch.float32, n_latents=600)
    fused = Ours("triton", "bfloat16", PLANS["topk"], problem).fused
    assert isinstance(fused, TritonStep)
    fused._copy_encoder()
    whole = fused._select(problem.batches[0], 5)
    monkeypatch.setattr("sparsight.kernels.triton_step.tile_rows", lambda x, width: 16)
    parts = fused._select(problem.batches[0], 5)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.sort(dim=1).values, other.sort(dim=1).values)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_vectors_with_infinity_or_nan_do_not_break_selection() -> None:
    problem = _problem(torch.float32)
    z = problem.batches[0]
    z[3, 1], z[5, 2] = float("nan"), float("inf")
    ours = Ours("triton", "bfloat16", PLANS["topk"], problem)
    figures = ours.fused.step(z, lr=LR, number=1)
    assert not torch.isfinite(figures.loss)
