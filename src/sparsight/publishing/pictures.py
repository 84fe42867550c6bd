"""Pictures of latents for a model card: one PNG each, with the images that it responds to."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from sparsight.latents.cards import TOP_SHOWN
from sparsight.latents.choosing import choose_latents
from sparsight.latents.heatmaps import overlay
from sparsight.latents.run_files import RunFiles
from sparsight.latents.seeing import Seen, see
from sparsight.latents.stored import StoredCodes
from sparsight.pages.data_uris import is_crisp
from sparsight.progress import progress
from sparsight.vision import VisionModel

FOLDER = "pictures"
TILE, GAP = 128, 4
"""Pixels."""


@dataclass(frozen=True)
class LatentPicture:
    """The picture of one latent.

    Attributes:
        row: the latent's row of the index.
        file: its path beside the card.
        png: the picture.
        heatmaps: whether it has a second row, with heatmaps.
    """

    row: Mapping[str, Any]
    file: str
    png: bytes
    heatmaps: bool


@dataclass(frozen=True)
class LatentPictures:
    """The pictures of one SAE.

    Attributes:
        pictures: one per latent.
        how_chosen: a sentence that says how the latents were chosen.
        notes: what could not be shown, and why.
    """

    pictures: Sequence[LatentPicture]
    how_chosen: str
    notes: Sequence[str]


def latent_pictures(
    run: RunFiles,
    model: VisionModel | str | None,
    *,
    n: int,
    seed: int,
    quiet: bool,
    stored: StoredCodes | None = None,
) -> LatentPictures | None:
    """Paint up to `n` latents; None if the run has no index, or `n` is 0.

    These are the latents that are easiest to understand, among those with enough images to fill a
    row.

    Args:
        run: the SAE and its index.
        model: the model that computed its activations, or the reason why it is not available; None
            if no heatmaps are possible.
        n: number of latents.
        seed: seed of the choice.
        quiet: show no progress bar.
        stored: where heatmaps can be read, so that no model needs to run.
    """
    index = run.index
    if index is None or n == 0:
        return None
    chosen, how = choose_latents(index, run.sae, n, seed, random=0, least_images=TOP_SHOWN)
    shown = {latent: index.top(latent)[:TOP_SHOWN] for latent, _ in chosen}
    wanted: dict[int, list[int]] = {}
    for latent, examples in shown.items():
        for image in {example.image for example in examples}:
            wanted.setdefault(image, []).append(latent)
    with progress(f"push: {run.name}", None, "images", quiet=quiet) as line:
        seen = see(index, run.sae, None if isinstance(model, str) else model, wanted, line, stored)
    if isinstance(model, str):
        seen.notes.insert(0, f"No heatmaps: {model}")
    pictures = []
    for latent, examples in shown.items():
        png, heatmaps = _paint(latent, [example.image for example in examples], seen)
        file = f"{FOLDER}/latent-{latent:06d}.png"
        pictures.append(LatentPicture(index.row(latent), file, png, heatmaps))
    return LatentPictures(pictures, how, seen.notes)


def _paint(latent: int, images: Sequence[int], seen: Seen) -> tuple[bytes, bool]:
    """Paint a row of images and, if there are any, the same images under heatmaps below it."""
    grids = {image: seen.grids[image, latent] for image in images if (image, latent) in seen.grids}
    peak = max((float(grid.max()) for grid in grids.values()), default=0.0)
    tiles = [[_tile(seen.pictures.get(image)) for image in images]]
    if peak > 0:
        tiles.append([_lit(seen.pictures[image], grids.get(image), peak) for image in images])
    step = TILE + GAP
    size = (len(images) * step - GAP, len(tiles) * step - GAP)
    sheet = Image.new("RGBA", size)  # transparent, so that the gaps show the page
    for y, row in enumerate(tiles):
        for x, tile in enumerate(row):
            sheet.paste(tile, (x * step, y * step))
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue(), len(tiles) > 1


def _tile(picture: Image.Image | None) -> Image.Image:
    """Crop an image to a square; a grey one if the image is no longer there."""
    if picture is None:
        return Image.new("RGB", (TILE, TILE), (128, 128, 128))
    method = Image.Resampling.NEAREST if is_crisp(picture) else Image.Resampling.LANCZOS
    return ImageOps.fit(picture.convert("RGB"), (TILE, TILE), method)


def _lit(
    picture: Image.Image | None, grid: Float[Tensor, "rows columns"] | None, peak: float
) -> Image.Image:
    """Crop an image to a square that is dark where the latent is not active."""
    if picture is None:
        return _tile(None)
    grid = torch.zeros(1, 1) if grid is None else grid
    return _tile(overlay(picture, grid, look="spotlight", peak=peak, min_size=TILE))
