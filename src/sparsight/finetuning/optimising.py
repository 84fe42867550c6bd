"""The optimiser of fine-tuning with its groups, and gradient norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsight.finetuning.config import FinetuneConfig
from sparsight.finetuning.groups import Member
from sparsight.finetuning.optimisers import AdaBelief


def make_optimiser(
    trained: Sequence[Member], config: FinetuneConfig, width: int
) -> torch.optim.Optimizer:
    """Make the optimiser, with one group per part and per use of weight decay.

    Args:
        trained: the parameters to train.
        config: rates and other settings.
        width: width of the vision tower, for the default rate.
    """
    lr = config.learning_rate(width)
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for member in trained:
        groups.setdefault((member.part, member.decays), []).append(member.parameter)
    made = [
        {
            "params": parameters,
            "part": part,
            "peak": lr * getattr(config.rates, part),
            "lr": lr * getattr(config.rates, part),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (part, decays), parameters in groups.items()
    ]
    if config.optimiser == "adabelief":
        eps = 1e-14 if config.eps is None else config.eps
        return AdaBelief(made, lr, config.betas, eps, rectify=config.rectify)
    eps = 1e-8 if config.eps is None else config.eps
    return torch.optim.AdamW(made, lr, config.betas, eps)


@torch.no_grad()
def gradient_norms(trained: Sequence[Member]) -> dict[str, Tensor]:
    """Return the norm of each layer's gradient: `visual.0`, …, `text.0`, …, and the other parts."""
    layers: dict[str, list[Tensor]] = {}
    for member in trained:
        if member.parameter.grad is not None:
            layers.setdefault(member.layer, []).append(member.parameter.grad.float().norm())
    return {layer: torch.stack(norms).norm() for layer, norms in layers.items()}
