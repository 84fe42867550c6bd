"""Decoder rows: of norm 1, or near the convex hull of data points.

The latter make an "Archetypal SAE" (Fel et al. 2025).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.sae.config import Archetypal

OWN_SHARE = 0.9
"""The share of its own anchor in the mixture of a row, at the start."""


def archetypal_start(
    config: Archetypal,
    n_latents: int,
    sample: Float[Tensor, "batch d_in"],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Choose anchors from a sample; each row starts near one, the rest of its mixture is random.

    Args:
        config: number of anchors.
        n_latents: number of rows.
        sample: activations in normalised space.
        generator: source of the random choices.

    Returns:
        `anchors [n_anchors, d_in]`, `mixture [n_latents, n_anchors]`,
        `relaxation [n_latents, d_in]`, `log_multiplier []`.
    """
    chosen = torch.randperm(len(sample), generator=generator)[: config.n_anchors]
    anchors = sample[chosen].clone()
    mixture = torch.rand(n_latents, len(anchors), generator=generator)
    mixture *= (1 - OWN_SHARE) / mixture.sum(dim=1, keepdim=True)
    rows = torch.arange(n_latents)
    mixture[rows, rows % len(anchors)] += OWN_SHARE
    # As long as a decoder row of norm 1, whatever the scale of the data.
    norm = (mixture @ anchors).norm(dim=1).mean().clamp(min=1e-12)
    return {
        "anchors": anchors,
        "mixture": mixture,
        "relaxation": torch.zeros(n_latents, sample.shape[1]),
        "log_multiplier": -norm.log(),
    }


def archetypal_rows(parts: Mapping[str, Tensor]) -> Float[Tensor, "n_latents d_in"]:
    """Return exp(log_multiplier) (mixture · anchors + relaxation)."""
    rows = parts["mixture"] @ parts["anchors"] + parts["relaxation"]
    return rows * parts["log_multiplier"].exp()


@torch.no_grad()
def keep_archetypal(parts: Mapping[str, Tensor], delta: float) -> None:
    """Make mixtures non-negative with sum 1 again, and relaxations no longer than `delta`."""
    mixture, relaxation = parts["mixture"], parts["relaxation"]
    mixture.clamp_(min=0).div_(mixture.sum(dim=1, keepdim=True).clamp(min=1e-12))
    norm = relaxation.norm(dim=1, keepdim=True).clamp(min=1e-12)
    relaxation.mul_((delta / norm).clamp(max=1))


def unit_rows(x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
    """Scale every row to norm 1; rows of zeros stay."""
    out: Tensor = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return out
