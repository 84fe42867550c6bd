"""Activations to measure on, made once and kept in memory by every contender."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from contenders import Shape
from torch import Tensor

Data = Literal["mixture", "calibration"]

N_BATCHES = 4
N_DIRECTIONS = 4096
"""Seed of the mixture's directions."""

N_ACTIVE = 24
"""Mean number of directions per vector of the mixture."""

NOISE = 0.05
"""Norm of the noise, relative to that of the rest."""


def save_batches(data: Data, shape: Shape, folder: Path) -> str:
    """Write batches to a file for contenders; return its path."""
    batches = mixture(shape) if data == "mixture" else calibration(shape)
    path = folder / "batches.npy"
    np.save(path, batches.view(N_BATCHES, shape.batch_size, shape.d_in).numpy())
    return str(path)


def save_dictionary(shape: Shape, folder: Path) -> str:
    """Write the rows of a trained SAE of the mixture: approximately its directions.

    If there are more latents than directions, several latents share one.
    """
    generator = torch.Generator().manual_seed(2)
    rows = directions(shape.d_in)[torch.arange(shape.n_latents) % N_DIRECTIONS]
    rows = rows + 0.3 * torch.randn(rows.shape, generator=generator) / math.sqrt(shape.d_in)
    path = folder / "dictionary.npy"
    np.save(path, (rows / rows.norm(dim=1, keepdim=True)).numpy())
    return str(path)


def directions(d_in: int) -> Tensor:
    """The mixture's truth: random unit vectors."""
    rows = torch.randn(N_DIRECTIONS, d_in, generator=torch.Generator().manual_seed(0))
    return rows / rows.norm(dim=1, keepdim=True)


def mixture(shape: Shape) -> Tensor:
    """Make vectors of a few directions each; some directions are far more common than others.

    x = Σ a_i v_i + mean + noise, with a_i exponential, and direction i as common as 1 / sqrt(i).
    """
    generator = torch.Generator().manual_seed(1)
    n = N_BATCHES * shape.batch_size
    common = torch.arange(1, N_DIRECTIONS + 1).rsqrt()
    chosen = torch.multinomial(common, n * N_ACTIVE, replacement=True, generator=generator)
    strengths = torch.empty(n, N_ACTIVE).exponential_(generator=generator) + 0.5
    truth = directions(shape.d_in)
    x = torch.nn.functional.embedding_bag(
        chosen.view(n, N_ACTIVE), truth, per_sample_weights=strengths, mode="sum"
    )
    noise = torch.randn(n, shape.d_in, generator=generator)
    noise *= NOISE * x.norm(dim=1).mean() / math.sqrt(shape.d_in)
    mean = torch.randn(shape.d_in, generator=generator)
    return x + mean + noise


def calibration(shape: Shape) -> Tensor:
    """The last block of the calibration CLIP; neighbouring tokens side by side make the width."""
    import sparsight as sp

    model = sp.load_model("calibration")
    site = model.canonical_site("blocks.-1.resid_post")
    n = N_BATCHES * shape.batch_size
    with tempfile.TemporaryDirectory() as folder:
        n_images, found = 256, torch.empty(0, shape.d_in)
        while len(found) < n:
            store = sp.extract(
                model,
                sp.open_images(f"calibration:{n_images}:0"),
                sites=[site],
                out=Path(folder) / f"{n_images}",
            )
            x = torch.cat([batch.activations[site] for batch in store.ordered([site])])
            side_by_side = math.ceil(shape.d_in / x.shape[2])
            tokens = x.shape[1] // side_by_side * side_by_side
            wide = x[:, :tokens].reshape(-1, side_by_side * x.shape[2])
            found, n_images = wide[:, : shape.d_in], 4 * n_images
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return found[order[:n]].contiguous()
