"""Random activations of latents over images, and a collection of embeddings, for tests of names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from latent_parts import SITE, TensorActivations, make_sae
from sparsight.images import ImageSource, load_batches, open_images
from sparsight.latents import Postings
from sparsight.naming.image_space import ImageSpace
from sparsight.naming.scores import LatentActivations
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel, load_model


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


def planted_colours(
    n_images: int, n_latents: int, colours: Sequence[str]
) -> tuple[VisionModel, ImageSource, TensorActivations, SparseAutoencoder]:
    """An untrained SAE whose first latents each see one colour of the background."""
    model, source = load_model("calibration", device="cpu"), open_images(f"calibration:{n_images}")
    batches = load_batches(source, model.transform, 32, workers=0)
    x = torch.cat([model.read(batch.pixels, [SITE])[SITE] for batch in batches])
    activations = TensorActivations(x, source, model)
    about = {"id": model.id, "weights_hash": model.weights_hash}
    sae = make_sae(192, n_latents, k=8, model=about, images=source.spec)
    shows = [source.scene(i).background for i in range(n_images)]  # type: ignore[attr-defined]
    image_means = x[:, 1:].mean(dim=1)
    for latent, colour in enumerate(colours):
        own = torch.tensor([each == colour for each in shows])
        direction = image_means[own].mean(dim=0) - image_means[~own].mean(dim=0)
        direction = direction / direction.norm()
        edge = (image_means[~own] @ direction).quantile(0.9)
        sae.W_enc[latent] = 20 * direction
        sae.b_enc[latent] = -20 * edge
        sae.W_dec[latent] = direction
    return model, source, activations, sae
