"""Activations of an SAE's latents by class, and random latents of equal density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.editing.changes import frozen
from sparsight.editing.edits import Positions
from sparsight.errors import UserError
from sparsight.images import ImageSource
from sparsight.sae import SparseAutoencoder
from sparsight.vision import ImagePass, PassSettings, VisionModel

BAND = 16
"""Number of latents of similar density from which random ones are drawn."""


@dataclass(frozen=True)
class ClassCodes:
    """Activations of latents, by class.

    Attributes:
        classes: labels, in the order of the rows.
        mean: mean activation over all vectors of the images of a class, including those on which
            the latent is not active; 0 for a class without images.
        density: share of all vectors on which a latent is active.
        highest: largest activation of a latent on any vector.
        n_images: number of images of each class.
        failed: number of images that could not be read.
    """

    classes: tuple[str, ...]
    mean: Float[Tensor, "classes n_latents"]
    density: Float[Tensor, " n_latents"]
    highest: Float[Tensor, " n_latents"]
    n_images: Int[Tensor, " classes"]
    failed: int

    def strongest(self) -> Int[Tensor, "classes n_latents"]:
        """Return all latents for each class, those with the largest mean first."""
        return self.mean.argsort(dim=1, descending=True, stable=True)


@torch.no_grad()
def class_codes(
    model: VisionModel,
    images: ImageSource,
    sae: SparseAutoencoder,
    site: str,
    tokens: Positions,
    by_class: Mapping[str, Sequence[int]],
    settings: PassSettings | None = None,
) -> ClassCodes:
    """Encode the images of each class once.

    Args:
        model: the model.
        images: the source.
        sae: its SAE.
        site: where the SAE reads.
        tokens: which vectors of an image count.
        by_class: places in `images`, by label.
        settings: settings of the pass over the images.

    Raises:
        UserError: no image could be read.
    """
    view = frozen(sae).to(model.device)
    classes = tuple(by_class)
    class_of = {i: c for c, label in enumerate(classes) for i in by_class[label]}
    if not class_of:
        raise UserError(f"{images.spec}: no images to read latents on.")
    sums = _Sums(view, len(classes))
    with ImagePass(model, images, "codes", settings, classes=class_of) as seen:
        for batch in seen:
            x = model.read(batch.pixels, [site], tokens)[site]
            sums.add(x, seen.classes_of(batch))
    return sums.result(classes, len(seen.failures))


class _Sums:
    """Sums of the latents' activations so far, over all positions of the images."""

    def __init__(self, sae: SparseAutoencoder, n_classes: int) -> None:
        self.sae, self.n_classes = sae, n_classes
        n, device = sae.n_latents, sae.W_dec.device
        self.total = torch.zeros(n_classes * n, dtype=torch.float64, device=device)
        self.active = torch.zeros(n, dtype=torch.int64, device=device)
        self.highest = torch.zeros(n, dtype=sae.W_dec.dtype, device=device)
        self.n_images = torch.zeros(n_classes, dtype=torch.int64)
        self.n_vectors, self.per_image = 0, 1

    def add(self, x: Float[Tensor, "batch tokens d_in"], classes: Int[Tensor, " batch"]) -> None:
        """Encode a batch and add it."""
        n = self.sae.n_latents
        self.per_image = x.shape[1]
        code = self.sae.encode(x.flatten(0, 1).to(self.sae.W_dec.dtype))
        own = classes.to(self.total.device)
        place = own[code.rows // self.per_image] * n + code.indices
        self.total.index_add_(0, place, code.values.double())
        self.active += torch.bincount(code.indices, minlength=n)
        self.highest.scatter_reduce_(0, code.indices, code.values, "amax")
        self.n_images += torch.bincount(classes, minlength=self.n_classes)
        self.n_vectors += len(code)

    def result(self, classes: tuple[str, ...], failed: int) -> ClassCodes:
        """Return the means, densities and largest activations."""
        vectors = (self.n_images * self.per_image).clamp(min=1).to(self.total.device)
        mean = self.total.view(self.n_classes, self.sae.n_latents) / vectors[:, None]
        return ClassCodes(
            classes,
            mean.float().cpu(),
            (self.active.double() / self.n_vectors).float().cpu(),
            self.highest.float().cpu(),
            self.n_images,
            failed,
        )


def matched_latents(
    density: Float[Tensor, " n_latents"], seed: int = 0
) -> Int[Tensor, " n_latents"]:
    """Draw for every latent, as a control, a random partner that is active about as often.

    Latents are sorted by density and split into bands of 16; within a band, each latent gets a
    different partner that is not the latent itself.

    Args:
        density: density of each latent.
        seed: seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    jitter = torch.rand(len(density), generator=generator, dtype=torch.float64)
    # Ties, such as latents that are never active, in random order.
    order = torch.argsort(jitter)
    order = order[density[order].argsort(stable=True)]
    partner = torch.empty(len(density), dtype=torch.int64)
    bands = max(1, len(density) // BAND)
    for band in order.tensor_split(bands):
        drawn = band[torch.randperm(len(band), generator=generator)]
        partner[drawn] = drawn.roll(1)
    return partner
