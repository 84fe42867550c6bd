"""Images of examples as the model saw them, with the activations of latents at their patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from sparsight.errors import UserError
from sparsight.latents.heatmaps import has_heatmaps, patch_heatmaps, seen_pictures
from sparsight.latents.index import LatentIndex
from sparsight.latents.stored import Heat, StoredCodes, stored_heatmaps
from sparsight.progress import ProgressLine
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel
from sparsight.vision.geometry import seen_picture

LARGEST = 224
"""Longest side of an image on a page, in pixels."""

_BATCH = 32


@dataclass
class Seen:
    """Images of examples, as the model saw them if there is a model."""

    pictures: dict[int, Image.Image] = field(default_factory=dict)
    """Pixels by image, none larger than `LARGEST`."""
    grids: dict[tuple[int, int], Heat] = field(default_factory=dict)
    """Activations at the patches, by image and latent."""
    notes: list[str] = field(default_factory=list)
    """What could not be shown, and why."""


def see(
    index: LatentIndex,
    sae: SparseAutoencoder | None,
    model: VisionModel | None,
    wanted: Mapping[int, Sequence[int]],
    line: ProgressLine,
    stored: StoredCodes | None = None,
) -> Seen:
    """Load images; read their heatmaps, or run the model over them.

    Args:
        index: of the SAE.
        sae: the SAE; None without heatmaps.
        model: the model to run over the images if nothing is stored; without either, no heatmaps.
        wanted: latents to make heatmaps of, by image.
        line: progress line that counts images.
        stored: where heatmaps can be read.
    """
    seen = Seen()
    if not has_heatmaps(index.tokens, index.site):
        seen.notes.append(
            f"No heatmaps: this SAE reads one vector per image (tokens = {index.tokens})."
        )
    images = sorted(wanted)
    line.expect(len(images))
    for start in range(0, len(images), _BATCH):
        some = {image: wanted[image] for image in images[start : start + _BATCH]}
        _see_batch(seen, some, index, sae, model, stored)
        line.advance(len(some))
    return seen


def _see_batch(
    seen: Seen,
    wanted: Mapping[int, Sequence[int]],
    index: LatentIndex,
    sae: SparseAutoencoder | None,
    model: VisionModel | None,
    stored: StoredCodes | None,
) -> None:
    pictures: dict[int, Image.Image] = {}
    for image in wanted:
        try:
            pictures[image] = index.picture(image)
        except UserError as error:
            seen.notes.append(str(error))
    about = index.manifest["model"]
    if stored is not None or model is None:
        said = about.get("preprocessing") or {}
        pictures = {i: seen_picture(picture, said) or picture for i, picture in pictures.items()}
        if stored is not None:
            there = {image: wanted[image] for image in pictures}
            seen.grids |= stored_heatmaps(stored, there, tuple(about["patch_grid"]))
    elif pictures:
        pixels = torch.stack([model.transform(picture) for picture in pictures.values()])
        pictures = dict(zip(pictures, seen_pictures(model, pixels), strict=True))
        if sae is not None and has_heatmaps(index.tokens, index.site):
            latents = sorted({latent for image in pictures for latent in wanted[image]})
            heat = patch_heatmaps(sae, model, pixels, latents, site=index.site).cpu()
            column = {latent: place for place, latent in enumerate(latents)}
            for row, image in enumerate(pictures):
                for latent in wanted[image]:
                    seen.grids[image, latent] = heat[row, column[latent]]
    for image, picture in pictures.items():
        seen.pictures[image] = picture.copy()
        seen.pictures[image].thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
