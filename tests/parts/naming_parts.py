"""Random activations of latents over images, and a collection of embeddings, for tests of names."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from latent_parts import make_sae
from sparsight.latents import Postings
from sparsight.naming.image_space import ImageSpace
from sparsight.naming.scores import LatentActivations


def rows_of(dense: np.ndarray) -> Postings:
    """Compressed rows of `[latents, images]`; zeros do not fire."""
    row, column = np.nonzero(dense)
    counts = np.bincount(row, minlength=len(dense))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    values = dense[row, column].astype(np.float32)
    return Postings(offsets, column.astype(np.int32), values, None, dense.shape[1])


def latents_of(dense: np.ndarray) -> LatentActivations:
    sae = make_sae(n_latents=len(dense), k=1)
    return LatentActivations(sae, np.arange(len(dense), dtype=np.int64), rows_of(dense))


def random_activations(n_latents: int, n_images: int, seed: int = 0) -> np.ndarray:
    """Activations of which some 30 % are not 0."""
    random = np.random.default_rng(seed)
    values = random.exponential(size=(n_latents, n_images)).astype(np.float32)
    return values * (random.random(values.shape) < 0.3)


def space_of(
    n_images: int, width: int = 6, unread: tuple[int, ...] = (), seed: int = 0
) -> ImageSpace:
    """Unit embeddings of all places but the unread ones."""
    generator = torch.Generator().manual_seed(0)
    matrix: Tensor = normalize(torch.randn(n_images, 6, generator=generator) + 0.5, dim=1)
    places = np.array([i for i in range(n_images) if i not in unread], dtype=np.int64)
    return ImageSpace(matrix[torch.from_numpy(places)], places, n_images)
