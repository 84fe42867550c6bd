"""AdaBelief and AdamW, and the learning rate over a run.

AdaBelief is fifty lines here rather than a dependency: the package `adabelief-pytorch` has had no
release since 2021, prints to the terminal, and keeps numbers of the rectification in lists inside
its groups, which do not survive a safe checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

ScheduleName = Literal["cosine", "one_cycle", "constant"]

RECTIFIED_FROM = 5
"""Length of the simple moving average from which RAdam trusts the variance."""

ONE_CYCLE_START = 25.0
ONE_CYCLE_END = 1e4


class AdaBelief(torch.optim.Optimizer):
    """AdaBelief (Zhuang et al. 2020, algorithm 2) with decoupled weight decay.

    `m ← β₁ m + (1 − β₁) g`, `s ← β₂ s + (1 − β₂)(g − m)² + ε`, and with bias corrections
    `θ ← θ − lr · wd · θ − lr · m̂ / (√ŝ + ε)`.

    With `rectify` the step is that of RAdam (Liu et al. 2020, algorithm 2), as in the authors' own
    code: plain momentum until the moving average has seen enough steps to trust the variance. Those
    steps are not divided by √ŝ, so the warm-up of a small rate matters little and gradients should
    be clipped.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the two averages.
        eps: added in both places; it limits the steps where gradients hardly vary.
        weight_decay: share of a weight that a step at `lr` 1 would remove.
        rectify: whether to rectify, see above.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-14,
        weight_decay: float = 0.0,
        rectify: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rectify": rectify,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_var"] = torch.zeros_like(parameter)
        state["step"] += 1
        n, (beta1, beta2), lr, eps = int(state["step"]), group["betas"], group["lr"], group["eps"]
        mean, spread = state["exp_avg"], state["exp_avg_var"]
        parameter.mul_(1 - lr * group["weight_decay"])
        mean.lerp_(parameter.grad, 1 - beta1)
        surprise = parameter.grad - mean
        spread.mul_(beta2).addcmul_(surprise, surprise, value=1 - beta2).add_(eps)
        step = lr / (1 - beta1**n)
        if not group["rectify"]:
            scale = spread.sqrt().div_(math.sqrt(1 - beta2**n)).add_(eps)
            parameter.addcdiv_(mean, scale, value=-step)
            return
        factor = rectification(n, beta2)
        if factor is None:
            parameter.add_(mean, alpha=-step)
        else:
            corrected = factor * math.sqrt(1 - beta2**n)
            parameter.addcdiv_(mean, spread.sqrt().add_(eps), value=-step * corrected)


def rectification(step: int, beta2: float) -> float | None:
    """Return RAdam's factor r_t; None while the variance cannot be trusted (ρ_t below 5)."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if length < RECTIFIED_FROM:
        return None
    return math.sqrt(
        (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    )


def rate_factor(name: ScheduleName, step: int, n_steps: int, warmup: float) -> float:
    """Return the share of its peak learning rate that every group uses.

    - `cosine`: a linear rise, then half a cosine down to 0.
    - `one_cycle`: half a cosine up from 1/25, then half a cosine down to 1/250,000 (Smith 2018, as
      `torch.optim.lr_scheduler.OneCycleLR` has it).
    - `constant`: a linear rise, then 1.

    Args:
        name: name of the schedule.
        step: number of optimiser steps before this one.
        n_steps: number of optimiser steps of the run.
        warmup: share of the run in which the rate rises.
    """
    if name == "one_cycle":
        top = warmup * n_steps - 1
        low, end = 1 / ONE_CYCLE_START, 1 / (ONE_CYCLE_START * ONE_CYCLE_END)
        if step <= top:
            return _cosine(low, 1.0, step / top if top > 0 else 1.0)
        return _cosine(1.0, end, (step - top) / max(n_steps - 1 - top, 1e-9))
    rise = warmup * n_steps
    up = min(1.0, (step + 1) / rise) if rise >= 1 else 1.0
    if name == "constant" or step < rise:
        return up
    return up * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(n_steps - rise, 1)))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))
