"""Small real parts: a tiny CLIP with random weights, and SAEs that fit it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsight.sae import Normaliser, SAEConfig, SparseAutoencoder, TopK
from sparsight.vision import VisionModel

SITE = "blocks.1.resid_post"


def activations(model: VisionModel, pixels: Tensor, site: str = SITE) -> Tensor:
    """All vectors of a site, `[n, d_in]`."""
    return model.read(pixels, [site])[site].flatten(0, 1).float()


def make_sae(
    d_in: int,
    config: SAEConfig | None = None,
    *,
    x: Tensor | None = None,
    metadata: dict[str, Any] | None = None,
    seed: int = 0,
) -> SparseAutoencoder:
    """An untrained SAE with every parameter away from 0, its normaliser fitted to `x`."""
    config = config or SAEConfig(64, sparsity=TopK(8))
    normaliser = None
    if x is not None:
        mean, second = x.double().mean(dim=0), x.double().square().mean(dim=0)
        normaliser = Normaliser.fit(config.normaliser, mean, second)
    sae = SparseAutoencoder(d_in, config, normaliser=normaliser, seed=seed, metadata=metadata)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.startswith("b_"):
                parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))
    return sae


def belonging(model: VisionModel, site: str = SITE, tokens: str = "all") -> dict[str, Any]:
    """What an SAE of `model` has in its metadata."""
    about = {"id": model.id, "weights_hash": model.weights_hash}
    return {"model": about, "site": site, "tokens": tokens}


def bits(x: Tensor) -> Tensor:
    """The bits of each number: -0.0 is not 0.0 here."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
