"""AdaBelief against its recursion in float64, schedules against torch's."""

from __future__ import annotations

import math

import pytest
import torch

from sparsight.finetuning.optimisers import AdaBelief, rate_factor


def recursion(weights, gradients, lr, betas, eps, decay, rectify):
    """Zhuang et al. 2020, algorithm 2; with `rectify` Liu et al. 2020; one number."""
    w, m, s = weights, 0.0, 0.0
    beta1, beta2 = betas
    longest = 2 / (1 - beta2) - 1
    for t, g in enumerate(gradients, start=1):
        w -= lr * decay * w
        m = beta1 * m + (1 - beta1) * g
        s = beta2 * s + (1 - beta2) * (g - m) ** 2 + eps
        m_hat, s_hat = m / (1 - beta1**t), s / (1 - beta2**t)
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        if not rectify:
            w -= lr * m_hat / (math.sqrt(s_hat) + eps)
        elif length >= 5:
            r = math.sqrt(
                ((length - 4) * (length - 2) * longest) / ((longest - 4) * (longest - 2) * length)
            )
            w -= lr * r * m_hat * math.sqrt(1 - beta2**t) / (math.sqrt(s) + eps)
        else:
            w -= lr * m_hat
    return w


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.9)])
def test_adabelief_follows_its_recursion(rectify, betas):
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(3, generator=draw, dtype=torch.float64)
    gradients = torch.randn(40, 3, generator=draw, dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    optimiser = AdaBelief([weight], 1e-2, betas, eps=1e-14, weight_decay=0.1, rectify=rectify)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimiser.step()
    expected = [
        recursion(float(start[i]), gradients[:, i].tolist(), 1e-2, betas, 1e-14, 0.1, rectify)
        for i in range(3)
    ]
    torch.testing.assert_close(weight.detach(), torch.tensor(expected, dtype=torch.float64))


def test_adabelief_steps_far_where_gradients_agree_and_little_where_they_do_not():
    steady, wild = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimiser = AdaBelief([steady, wild], lr=1e-3, eps=1e-16, rectify=False)
    for step in range(60):
        steady.grad, wild.grad = torch.ones(1), torch.tensor([1.0 if step % 2 else -1.0])
        optimiser.step()
    assert abs(steady.item()) > 10 * abs(wild.item())


@pytest.mark.parametrize(("n_steps", "warmup"), [(50, 0.3), (7, 0.3), (200, 0.1)])
def test_one_cycle_is_torchs_over_the_same_number_of_steps(n_steps, warmup):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=1.0, total_steps=n_steps, pct_start=warmup, cycle_momentum=False
    )
    for step in range(n_steps):
        found = rate_factor("one_cycle", step, n_steps, warmup)
        assert found == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-6, abs=1e-12)
        optimiser.step()
        if step + 1 < n_steps:
            theirs.step()


@pytest.mark.parametrize("name", ["cosine", "one_cycle"])
def test_a_schedule_ends_where_it_should_with_the_last_step(name):
    """Counting batches as steps leaves the rate at 81 % of its peak, as in the published script."""
    factors = [rate_factor(name, step, 40, 0.25) for step in range(40)]
    assert factors[-1] < 0.01
    assert max(factors) == pytest.approx(1.0)
    top = factors.index(max(factors))
    assert 8 <= top <= 10
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)


def test_a_constant_schedule_only_warms_up():
    factors = [rate_factor("constant", step, 10, 0.2) for step in range(10)]
    assert factors == [0.5, *[1.0] * 9]
