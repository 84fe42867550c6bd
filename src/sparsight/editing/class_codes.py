"""What an SAE's latents do on the images of each class; and random latents of equal density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.editing.changes import frozen
from sparsight.editing.edits import Positions
from sparsight.errors import UserError
from sparsight.images import ImageSource, load_batches
from sparsight.progress import progress
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel

BAND = 16
"""Latents of about equal density, among which random ones are drawn."""


@dataclass(frozen=True)
class ClassCodes:
    """Activations of latents, by class.

    Attributes:
        classes: labels, in the order of the rows.
        mean: over all vectors of the images of a class, those where a latent is not active
            included; 0 for a class without images.
        density: share of all vectors on which a latent is active.
        highest: its largest activation on any vector.
        n_images: of each class.
        failed: images that could not be read.
    """

    classes: tuple[str, ...]
    mean: Float[Tensor, "classes n_latents"]
    density: Float[Tensor, " n_latents"]
    highest: Float[Tensor, " n_latents"]
    n_images: Int[Tensor, " classes"]
    failed: int

    def strongest(self) -> Int[Tensor, "classes n_latents"]:
        """For each class all latents, those of the largest mean first."""
        return self.mean.argsort(dim=1, descending=True, stable=True)


@torch.no_grad()
def class_codes(
    model: VisionModel,
    images: ImageSource,
    sae: SparseAutoencoder,
    site: str,
    tokens: Positions,
    by_class: Mapping[str, Sequence[int]],
    *,
    batch_images: int = 64,
    workers: int | None = None,
    quiet: bool = True,
) -> ClassCodes:
    """Encode the images of each class once.

    Args:
        model: the model.
        images: the source.
        sae: its SAE.
        site: where the SAE reads.
        tokens: which vectors of an image count.
        by_class: places in `images`, by label.
        batch_images: images at a time.
        workers: processes that decode.
        quiet: no progress line.

    Raises:
        UserError: no image could be read.
    """
    view = frozen(sae).to(model.device)
    classes = tuple(by_class)
    class_of = {i: c for c, label in enumerate(classes) for i in by_class[label]}
    n = sae.n_latents
    device = view.W_dec.device
    total = torch.zeros(len(classes) * n, dtype=torch.float64, device=device)
    active = torch.zeros(n, dtype=torch.int64, device=device)
    highest = torch.zeros(n, dtype=view.W_dec.dtype, device=device)
    n_images = torch.zeros(len(classes), dtype=torch.int64)
    n_vectors, per_image, failed = 0, 1, 0
    wanted = sorted(class_of)
    with progress("codes", len(wanted), "images", quiet=quiet) as line:
        for batch in load_batches(
            images,
            model.transform,
            batch_images,
            indices=wanted,
            workers=workers,
            min_side=model.min_side,
        ):
            failed += len(batch.failures)
            line.advance(len(batch.indices) + len(batch.failures))
            if not batch.indices:
                continue
            x = model.read(batch.pixels, [site], tokens)[site]
            per_image = x.shape[1]
            code = view.encode(x.flatten(0, 1).to(view.W_dec.dtype))
            own = torch.tensor([class_of[i] for i in batch.indices], device=device)
            place = own[code.rows // per_image] * n + code.indices
            total.index_add_(0, place, code.values.double())
            active += torch.bincount(code.indices, minlength=n)
            highest.scatter_reduce_(0, code.indices, code.values, "amax")
            n_images += torch.bincount(own.cpu(), minlength=len(classes))
            n_vectors += len(code)
    if not n_vectors:
        raise UserError(f"{images.spec}: none of its images could be read ({failed} are broken).")
    vectors = (n_images * per_image).clamp(min=1).to(device)
    mean = total.view(len(classes), n) / vectors[:, None]
    return ClassCodes(
        classes,
        mean.float().cpu(),
        (active.double() / n_vectors).float().cpu(),
        highest.float().cpu(),
        n_images,
        failed,
    )


def matched_latents(
    density: Float[Tensor, " n_latents"], seed: int = 0
) -> Int[Tensor, " n_latents"]:
    """A partner for every latent that is active about as often, drawn at random: a control.

    Latents are sorted by density and cut into bands of 16; inside a band each gets another one, no
    two the same.

    Args:
        density: of each latent.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    jitter = torch.rand(len(density), generator=generator, dtype=torch.float64)
    # Ties, such as all that are never active, in random order.
    order = torch.argsort(jitter)
    order = order[density[order].argsort(stable=True)]
    partner = torch.empty(len(density), dtype=torch.int64)
    bands = max(1, len(density) // BAND)
    for band in order.tensor_split(bands):
        drawn = band[torch.randperm(len(band), generator=generator)]
        partner[drawn] = drawn.roll(1)
    return partner
