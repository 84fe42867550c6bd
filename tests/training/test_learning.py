"""Every architecture finds the directions of which vectors are mixtures."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsight.activations import SiteStatistics
from sparsight.kernels import choose
from sparsight.sae import (
    AbsTopK,
    Archetypal,
    AuxK,
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
from sparsight.training import TrainConfig
from sparsight.training.schedule import learning_rate_factor
from sparsight.training.site import SiteTraining

D_IN, D_OUT, N_TRUE, ACTIVE = 32, 24, 48, 3
WIDTH = 2 * N_TRUE
STEPS, BATCH, LR = 400, 256, 5e-3
SLOW = pytest.mark.slow
RELATIVES = (
    "tied topk", "weighted relu", "signed topk", "jumprelu with tanh", "jumprelu with target",
    "matryoshka with random prefixes", "matryoshka by k",
)  # fmt: skip
"""Similar to others, so they are not among the quick tests."""

FREE = {"unit_norm_decoder": False, "subtract_b_dec": False}

CASES: dict[str, tuple[SAEConfig, dict[str, Any]]] = {
    "relu": (SAEConfig(WIDTH, sparsity=ReLU()), {}),
    "weighted relu": (SAEConfig(WIDTH, sparsity=ReLU(weighted=True), **FREE), {}),
    "topk": (SAEConfig(WIDTH, sparsity=TopK(3)), {}),
    "tied topk": (SAEConfig(WIDTH, sparsity=TopK(3), tied=True), {}),
    "signed topk": (SAEConfig(WIDTH, sparsity=TopK(3, rectify=False)), {}),
    "batch topk": (
        SAEConfig(WIDTH, sparsity=BatchTopK(3)),
        {"remedy": AuxK(alpha=0.5, dead_after=2000)},
    ),
    "absolute topk": (SAEConfig(WIDTH, sparsity=AbsTopK(3)), {}),
    "group max": (SAEConfig(WIDTH, sparsity=GroupMax(6)), {}),
    "jumprelu": (SAEConfig(WIDTH, sparsity=JumpReLU()), {}),
    "jumprelu with tanh": (SAEConfig(WIDTH, sparsity=JumpReLU(penalty_kind="tanh")), {}),
    "jumprelu with target": (SAEConfig(WIDTH, sparsity=JumpReLU(target_l0=3)), {}),
    "gated": (SAEConfig(WIDTH, sparsity=Gated()), {}),
    "matching pursuit": (SAEConfig(WIDTH, sparsity=MatchingPursuit(3)), {}),
    "archetypal": (SAEConfig(WIDTH, sparsity=TopK(3), dictionary=Archetypal()), {}),
    "matryoshka": (
        SAEConfig(WIDTH, sparsity=TopK(3)),
        {"matryoshka": Matryoshka((0.5, 1.0))},
    ),
    "matryoshka with random prefixes": (
        SAEConfig(WIDTH, sparsity=TopK(3)),
        {"matryoshka": Matryoshka(random=3)},
    ),
    "matryoshka by k": (
        SAEConfig(WIDTH, sparsity=TopK(3)),
        {"matryoshka": MatryoshkaK((3, 6, 12))},
    ),
    "transcoder": (
        SAEConfig(WIDTH, sparsity=TopK(3), subtract_b_dec=False),
        {"target_site": "there"},
    ),
}


def directions(d: int) -> Tensor:
    rows = torch.randn(N_TRUE, d, generator=torch.Generator().manual_seed(d))
    return rows / rows.norm(dim=1, keepdim=True)


@cache
def mixtures(n: int, seed: int, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Return vectors made of about three directions, off centre, and a transcoder's target."""
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
    fused = config.fusable
    kernels = choose("auto" if fused else "dense", "auto", torch.device("cpu"))
    target = () if y is None else (_statistics(y), y[:4096])
    site = SiteTraining(
        config, _statistics(x), x[:4096], {}, torch.device("cpu"), *kernels, *target
    )
    for step in range(steps):
        now = slice(step * BATCH % len(x), step * BATCH % len(x) + BATCH)
        factor = learning_rate_factor(step, steps, config.warmup, config.decay)
        site.step(x[now], step, factor, None if y is None else y[now])
    return site.finished().requires_grad_(False).eval()


def found(sae: SparseAutoencoder, truth: Tensor, signed: bool = False) -> float:
    """Return the share of true directions that a decoder row matches, at a cosine of 0.9."""
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


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=SLOW if each in RELATIVES else ()) for each in CASES]
)
def test_every_architecture_recovers_the_directions_of_sparse_mixtures(name: str) -> None:
    config, settings = CASES[name]
    signed = isinstance(config.sparsity, AbsTopK)
    x, y = mixtures(STEPS * BATCH, 1, signed)
    transcoding = "target_site" in settings
    sae = learn(TrainConfig(config, **settings), x, y if transcoding else None)
    assert found(sae, directions(D_OUT if transcoding else D_IN), signed) >= 0.9
    x, y = mixtures(4096, 2, signed)
    assert fvu(sae, x, y if transcoding else None) < 0.25
    assert len(sae.encode(x).values) / len(x) < 3 * ACTIVE  # of 96


def test_a_batch_topk_uses_as_many_latents_alone_as_in_a_batch(tmp_path: Path) -> None:
    x, _ = mixtures(STEPS * BATCH, 1)
    sae = learn(TrainConfig(SAEConfig(WIDTH, sparsity=BatchTopK(3))), x)
    sae.save_pretrained(tmp_path)
    sae = SparseAutoencoder.from_pretrained(tmp_path)
    x, _ = mixtures(4096, 2)
    alone, together = (len(sae.train(training).encode(x).values) for training in (False, True))
    assert alone == pytest.approx(together, rel=0.05)
    assert together == pytest.approx(3 * len(x), rel=0.05)
    assert sum(len(sae.eval().encode(vector[None]).values) for vector in x[:64]) == len(
        sae.encode(x[:64]).values
    )


def test_a_higher_price_makes_codes_sparser() -> None:
    x, _ = mixtures(STEPS * BATCH, 1)
    for kind in (ReLU, Gated, JumpReLU):
        prices = (1.0, 4.0)
        l0 = []
        for price in prices:
            sae = learn(TrainConfig(SAEConfig(WIDTH, sparsity=kind(price))), x, steps=STEPS // 2)
            l0.append(len(sae.encode(x[:4096]).values) / 4096)
        assert l0[1] < 0.8 * l0[0], (kind, l0)


def test_a_jumprelu_reaches_its_target_number_of_latents() -> None:
    x, _ = mixtures(STEPS * BATCH, 1)
    for target in (3.0, 6.0):
        sae = learn(TrainConfig(SAEConfig(WIDTH, sparsity=JumpReLU(target_l0=target))), x)
        assert len(sae.encode(x[:4096]).values) / 4096 == pytest.approx(target, rel=0.1)


def test_a_skip_connection_learns_the_linear_part() -> None:
    x, y = mixtures(STEPS * BATCH, 1)
    errors = []
    for skip in (False, True):
        config = SAEConfig(WIDTH, sparsity=TopK(3), subtract_b_dec=False, skip=skip)
        sae = learn(TrainConfig(config, target_site="there"), x, y, STEPS // 2)
        errors.append(fvu(sae, *mixtures(4096, 2)))
    assert errors[1] < 0.8 * errors[0]
