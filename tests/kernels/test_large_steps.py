"""Fused steps in float32 at the sizes of real training, against plain dense autograd."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from step_parts import LR, TORCH_INT8, Ours, Problem, Reference
from torch import Tensor
from torch.nn.functional import normalize

from sparsight.kernels.bounds import Int8Bounds, Int8Encoder, select_surely
from sparsight.kernels.native import library
from sparsight.kernels.plan import Plan
from sparsight.kernels.selection import select_topk
from sparsight.sae.objectives import SAEPlan
from sparsight.sae.remedies import AuxK
from sparsight.sae.sparsity import TopK

K, N = 32, 10_000
SMALL, MEDIUM = (768, 6144, 512), (768, 24_576, 2048)
SHAPES = [
    pytest.param(*SMALL, id="small"),
    pytest.param(*MEDIUM, id="medium", marks=pytest.mark.slow),
]
LOW_PRECISION = [
    ("native", "int8"),
    ("native", "bfloat16"),
    TORCH_INT8,
    ("torch", "bfloat16"),
]


@lru_cache(maxsize=1)
def mixture(n: int, d_in: int, massive: bool) -> Tensor:
    """Return realistic vectors: mixtures of 20 directions each, with some noise."""
    generator = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(4096, d_in, generator=generator), dim=1)
    chosen = torch.randint(0, 4096, (n, 20), generator=generator)
    sizes = 3 * torch.rand(n, 20, generator=generator)
    z = torch.zeros(n, 4096).scatter_(1, chosen, sizes) @ directions
    z += 0.1 * torch.randn(n, d_in, generator=generator)
    z /= z.square().mean().sqrt()
    if massive:
        z[:, :4] *= 100
    return z


def problem(d_in: int, n_latents: int, batches: list[Tensor]) -> Problem:
    W = normalize(torch.randn(n_latents, d_in, generator=torch.Generator().manual_seed(1)), dim=1)
    zeros = {"b_enc": torch.zeros(n_latents), "b_dec": torch.zeros(d_in)}
    return Problem({"W_enc": W.clone(), "W_dec": W.clone(), **zeros}, batches)


@lru_cache(maxsize=1)
def dense_steps(
    aux_k: int, d_in: int, n_latents: int, batch: int, massive: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses of two steps of dense autograd, and the gradients of the first."""
    batches = mixture(2 * batch, d_in, massive).split(batch)
    plan, dead = plan_of(aux_k, n_latents)
    truth = Reference(plan, problem(d_in, n_latents, list(batches)))
    losses = [truth.step(batches[0], dead).loss.item()]
    # The first moments are a tenth of the gradients.
    gradients = {
        name: 10 * truth.adam.state[parameter]["exp_avg"]
        for name, parameter in truth.parameters.items()
    }
    return [*losses, truth.step(batches[1], dead).loss.item()], gradients


def plan_of(aux_k: int, n_latents: int) -> tuple[SAEPlan, Tensor | None]:
    dead = torch.arange(0, n_latents, 10) if aux_k else None
    return Plan(TopK(K), remedy=AuxK(alpha=1 / 32, k=aux_k) if aux_k else None), dead


# Kernels vary fastest, so that the reference is computed once for all of them.
@pytest.mark.parametrize(("kernels", "precision"), LOW_PRECISION)
@pytest.mark.parametrize("massive", [False, True], ids=["even", "massive"])
@pytest.mark.parametrize(("d_in", "n_latents", "batch"), SHAPES)
@pytest.mark.parametrize("aux_k", [0, 384], ids=["plain", "auxk"])
def test_gradients_and_losses_in_float32_match_the_dense_ones(
    kernels: str,
    precision: str,
    aux_k: int,
    d_in: int,
    n_latents: int,
    batch: int,
    massive: bool,
) -> None:
    losses, gradients = dense_steps(aux_k, d_in, n_latents, batch, massive)
    plan, dead = plan_of(aux_k, n_latents)
    batches = list(mixture(2 * batch, d_in, massive).split(batch))
    ours = Ours(kernels, precision, plan, problem(d_in, n_latents, batches))
    for number, (z, loss) in enumerate(zip(batches, losses, strict=True), start=1):
        mine = ours.fused.step(z, lr=LR, number=number, dead=dead)
        assert mine.loss.item() == pytest.approx(loss, abs=1e-6 * max(1.0, loss))
        if number == 1:
            for name, expected in gradients.items():
                off = 10 * ours.moments[name][0] - expected
                assert off.abs().max() <= 1e-6
                assert off.norm() <= 1e-5 * expected.norm()


@lru_cache(maxsize=1)
def dense_selection(d_in: int, n_latents: int, massive: bool) -> Tensor:
    """Return the latents of N vectors, in ascending order."""
    W = problem(d_in, n_latents, []).parameters["W_enc"]
    parts = mixture(N, d_in, massive).split(1000)
    return torch.cat([(x @ W.T).topk(K, dim=1).indices.sort(dim=1).values for x in parts])


@pytest.mark.parametrize(("kernels", "precision"), LOW_PRECISION)
@pytest.mark.parametrize("massive", [False, True], ids=["even", "massive"])
@pytest.mark.parametrize(
    ("d_in", "n_latents"),
    [
        pytest.param(*SMALL[:2], id="small"),
        pytest.param(*MEDIUM[:2], id="medium", marks=pytest.mark.slow),
    ],
)
def test_selected_sets_match_dense_scores(
    kernels: str, precision: str, d_in: int, n_latents: int, massive: bool
) -> None:
    """Scores that float32 cannot distinguish are excepted: their order depends on their sums."""
    parameters = problem(d_in, n_latents, []).parameters
    W, b, x = parameters["W_enc"], parameters["b_enc"], mixture(N, d_in, massive)
    if kernels == "native":
        latents = library.int32(N, K)
        library.Dictionary(W, b, precision).topk(x, W, b, K, out=(torch.empty(N, K), latents))
    elif precision == "int8":
        latents = select_surely(x, W, b, K, Int8Bounds(Int8Encoder(W), x, b))[1]
    else:
        latents = select_topk(x, W, b, K, precision)[1]
    truth, found = dense_selection(d_in, n_latents, massive), latents.long().sort(dim=1).values
    equal = (truth == found).all(dim=1)
    for row in (~equal).nonzero().flatten().tolist():
        exact = W.double() @ x[row].double()
        rounding = 4 * torch.finfo(torch.float32).eps * x[row].norm()
        equal[row] = exact[found[row]].min() >= exact[truth[row]].min() - rounding
    assert equal.sum() >= 0.9999 * N
