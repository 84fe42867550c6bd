"""Every architecture finds the directions that vectors were made of."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsight.activations import SiteStatistics
from sparsight.sae import (
    AbsTopK,
    Archetypal,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    Matryoshka,
    MatryoshkaK,
    ReLU,
    SAEConfig,
    SparseAutoencoder,
    TopK,
)
from sparsight.sae.kernels import choose
from sparsight.training import TrainConfig
from sparsight.training.schedule import learning_rate_factor
from sparsight.training.site import SiteTraining

D_IN, D_OUT, N_TRUE, ACTIVE = 32, 24, 48, 3
WIDTH = 2 * N_TRUE
STEPS, BATCH, LR = 400, 256, 5e-3
SLOW = pytest.mark.slow

FREE = {"unit_norm_decoder": False, "subtract_b_dec": False}

CASES: list[Any] = [
    pytest.param(SAEConfig(WIDTH, sparsity=ReLU()), {}, id="relu"),
    pytest.param(SAEConfig(WIDTH, sparsity=ReLU(weighted=True), **FREE), {}, id="weighted relu"),
    pytest.param(SAEConfig(WIDTH, sparsity=TopK(3)), {}, id="topk"),
    pytest.param(SAEConfig(WIDTH, sparsity=TopK(3), tied=True), {}, id="tied topk"),
    pytest.param(SAEConfig(WIDTH, sparsity=TopK(3, rectify=False)), {}, id="signed topk"),
    pytest.param(SAEConfig(WIDTH, sparsity=BatchTopK(3)), {}, id="batch topk"),
    pytest.param(SAEConfig(WIDTH, sparsity=AbsTopK(3)), {}, id="absolute topk"),
    pytest.param(SAEConfig(WIDTH, sparsity=GroupMax(6)), {}, id="group max"),
    pytest.param(SAEConfig(WIDTH, sparsity=JumpReLU()), {}, id="jumprelu"),
    pytest.param(
        SAEConfig(WIDTH, sparsity=JumpReLU(penalty_kind="tanh")), {}, id="jumprelu with tanh"
    ),
    pytest.param(SAEConfig(WIDTH, sparsity=JumpReLU(target_l0=3)), {}, id="jumprelu with target"),
    pytest.param(SAEConfig(WIDTH, sparsity=Gated()), {}, id="gated"),
    pytest.param(SAEConfig(WIDTH, sparsity=MatchingPursuit(3)), {}, id="matching pursuit"),
    pytest.param(SAEConfig(WIDTH, sparsity=TopK(3), dictionary=Archetypal()), {}, id="archetypal"),
    pytest.param(
        SAEConfig(WIDTH, sparsity=BatchTopK(3)),
        {"matryoshka": Matryoshka((0.25, 0.5, 1.0))},
        id="matryoshka",
    ),
    pytest.param(
        SAEConfig(WIDTH, sparsity=TopK(3)),
        {"matryoshka": Matryoshka(random=3)},
        id="matryoshka with random prefixes",
    ),
    pytest.param(
        SAEConfig(WIDTH, sparsity=TopK(3)),
        {"matryoshka": MatryoshkaK((3, 6, 12))},
        id="matryoshka by k",
    ),
    pytest.param(
        SAEConfig(WIDTH, sparsity=TopK(3), subtract_b_dec=False),
        {"target_site": "there"},
        id="transcoder",
    ),
]


def directions(d: int) -> Tensor:
    rows = torch.randn(N_TRUE, d, generator=torch.Generator().manual_seed(d))
    return rows / rows.norm(dim=1, keepdim=True)


@cache
def mixtures(n: int, seed: int, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Vectors made of three directions or so, off centre, and what a transcoder is to predict."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n, N_TRUE, generator=generator) < ACTIVE / N_TRUE
    strength = active * (0.5 + torch.rand(n, N_TRUE, generator=generator))
    if signed:
        strength *= 2 * torch.randint(0, 2, strength.shape, generator=generator) - 1
    noise = 0.01 * torch.randn(n, D_IN, generator=generator)
    return 5 * (strength @ directions(D_IN) + noise) + 3, 4 * strength @ directions(D_OUT) - 1


def learn(
    config: TrainConfig, x: Tensor, y: Tensor | None = None, steps: int = STEPS
) -> SparseAutoencoder:
    """Train on the vectors, one batch after another."""
    config = dataclasses.replace(config, n_vectors=steps * BATCH, batch_size=BATCH, lr=LR)
    fused = config.objective(D_IN) is not None
    kernels = choose("auto" if fused else "dense", "auto", torch.device("cpu"))
    target = () if y is None else (_statistics(y), y[:BATCH])
    site = SiteTraining(
        config, _statistics(x), x[:4096], {}, torch.device("cpu"), *kernels, *target
    )
    for step in range(steps):
        now = slice(step * BATCH % len(x), step * BATCH % len(x) + BATCH)
        factor = learning_rate_factor(step, steps, config.warmup, config.decay)
        site.step(x[now], step, factor, None if y is None else y[now])
    return site.finished().requires_grad_(False).eval()


def found(sae: SparseAutoencoder, truth: Tensor, signed: bool = False) -> float:
    """Share of the true directions that a decoder row agrees with, at a cosine of 0.9."""
    normaliser = sae.target_normaliser or sae.normaliser
    rows = sae.W_dec * normaliser.scale
    cosines = truth @ (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)).T
    cosines = cosines.abs() if signed else cosines
    return (cosines.amax(dim=1) >= 0.9).double().mean().item()


def fvu(sae: SparseAutoencoder, x: Tensor, y: Tensor | None = None) -> float:
    target = x if y is None else y
    error = (sae(x).x_hat - target).square().sum()
    return (error / (target - target.mean(dim=0)).square().sum()).item()


def _statistics(x: Tensor) -> SiteStatistics:
    return SiteStatistics(len(x), x.double().mean(dim=0), x.double().square().mean(dim=0))


@pytest.mark.parametrize(("config", "settings"), CASES)
def test_every_architecture_recovers_the_directions_of_sparse_mixtures(
    config: SAEConfig, settings: dict[str, Any]
) -> None:
    signed = isinstance(config.sparsity, AbsTopK)
    x, y = mixtures(STEPS * BATCH, 1, signed)
    transcoding = "target_site" in settings
    sae = learn(TrainConfig(config, **settings), x, y if transcoding else None)
    assert found(sae, directions(D_OUT if transcoding else D_IN), signed) >= 0.9
    x, y = mixtures(4096, 2, signed)
    assert fvu(sae, x, y if transcoding else None) < 0.25
    l0 = len(sae.encode(x).values) / len(x)
    assert l0 < 3 * ACTIVE  # of 96
