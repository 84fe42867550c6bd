"""Read the activations of latents, or of a site's coordinates, on images with words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.attacks.pairs import AttackPairs
from sparsight.attacks.passes import PairPass
from sparsight.attacks.salience_table import KINDS
from sparsight.errors import SparsightError, UserError
from sparsight.sae import SparseAutoencoder
from sparsight.vision import PassSettings, VisionModel

Statistic = Literal["mean", "max"]
"""The statistic over an image's positions."""


@dataclass
class Seen:
    """Activations on the images that loaded in every kind: one row per image."""

    values: dict[str, npt.NDArray[np.float64]]
    active: dict[str, npt.NDArray[np.float64]]
    """Number of vectors on which each latent is active, by kind."""
    vectors: int
    failed: dict[str, int]


@torch.no_grad()
def activations_on_pairs(
    model: VisionModel,
    pairs: AttackPairs,
    sae: SparseAutoencoder | None,
    site: str,
    tokens: str,
    statistic: Statistic,
    settings: PassSettings,
) -> Seen:
    """Read each latent's activation on the images of every kind.

    Raises:
        UserError: fewer than two images load in every kind.
        SparsightError: an activation is not finite.
    """
    reduce = latent_reducer(model, sae, site, tokens, statistic)
    width = model.d_in(site) if sae is None else sae.n_latents
    n = len(pairs)
    values = {kind: np.zeros((n, width), np.float32) for kind in KINDS}
    counts = {kind: np.zeros((n, width), np.int32) for kind in KINDS}
    with PairPass(model, pairs, KINDS, "text salience", settings) as seen:
        for kind, batch in seen:
            value, count = reduce(batch.pixels)
            if not bool(value.isfinite().all()):
                raise SparsightError(
                    f"{model.id}, {site}: activations on {kind} images are not finite."
                )
            values[kind][batch.indices] = value.cpu().numpy()
            counts[kind][batch.indices] = count.cpu().numpy()
    loaded = seen.loaded
    if loaded.sum() < 2:
        raise UserError(
            f"{pairs.clean.spec}: {int(loaded.sum())} of {n:,} images load in every kind; at least "
            "two are needed."
        )
    return Seen(
        values={kind: rows[loaded].astype(np.float64) for kind, rows in values.items()},
        active={kind: rows[loaded].sum(axis=0, dtype=np.float64) for kind, rows in counts.items()},
        vectors=int(loaded.sum()) * len(KINDS) * model.token_count(site, tokens),  # type: ignore[arg-type]
        failed=seen.failed,
    )


def latent_reducer(
    model: VisionModel,
    sae: SparseAutoencoder | None,
    site: str,
    tokens: str,
    statistic: Statistic,
) -> Callable[[Tensor], tuple[Float[Tensor, "batch width"], Tensor]]:
    """Return a function that reduces each latent's activations over an image's positions.

    It maps preprocessed images to the mean or maximum, and to the number of positions on which the
    latent is active. Without an SAE, it reduces the site's own coordinates.
    """

    def reduce(pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = model.read(pixels, [site], tokens)[site].float()  # type: ignore[arg-type]
        batch, positions = x.shape[:2]
        if sae is None:
            value = x.mean(dim=1) if statistic == "mean" else x.amax(dim=1)
            return value, (x > 0).sum(dim=1)
        code = sae.encode(x.flatten(0, 1).to(sae.W_dec.device))
        image = code.rows // positions
        value = torch.zeros(batch, sae.n_latents, device=code.values.device)
        count = torch.zeros_like(value)
        where = (image, code.indices)
        count.index_put_(where, (code.values != 0).float(), accumulate=True)
        if statistic == "mean":
            value.index_put_(where, code.values.float(), accumulate=True)
            return value / positions, count
        flat = image * sae.n_latents + code.indices
        value.view(-1).scatter_reduce_(0, flat, code.values.float(), "amax", include_self=True)
        return value, count

    return reduce
