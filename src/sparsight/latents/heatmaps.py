"""Where in an image one latent is active: the grid of patches, and how to overlay it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from sparsight.errors import UserError
from sparsight.pages.style import HEAT_COLOURS
from sparsight.sae import SparseAutoencoder, SparseCode
from sparsight.vision import VisionModel

Look = Literal["colours", "spotlight"]

STRONGEST_ALPHA = 0.85
VEIL = (0.05, 0.05, 0.09)
VEIL_ALPHA = 0.72


def has_heatmaps(tokens: str, site: str) -> bool:
    """Return whether an SAE of these tokens and this site has activations at single patches."""
    return tokens in ("all", "patches") and site != "embedding"


@torch.no_grad()
def patch_heatmaps(
    sae: SparseAutoencoder,
    model: VisionModel,
    pixels: Float[Tensor, "batch 3 height width"],
    latents: Sequence[int],
    *,
    site: str | None = None,
) -> Float[Tensor, "batch latents rows columns"]:
    """Return the activation of `latents` at every patch of preprocessed images.

    Args:
        sae: trained on `all` tokens or on `patches`.
        model: the model that the SAE was trained on.
        pixels: results of `model.transform`, stacked.
        latents: numbers of latents.
        site: where to read; default: the SAE's own site.

    Raises:
        UserError: the SAE was trained on one vector per image, or a latent does not exist.
    """
    site = site or sae.metadata.get("site")
    if site is None:
        raise UserError("The SAE does not name the site it was trained on; give site=….")
    tokens = sae.metadata.get("tokens", "all")
    if not has_heatmaps(tokens, site):
        raise UserError(
            f"This SAE was trained on one vector per image (tokens={tokens!r} at {site}), which "
            f"has "
            "no position in the image. Heatmaps need an SAE of 'all' tokens or 'patches'."
        )
    x = model.read(pixels, [site], "patches")[site].float()
    return activation_heatmaps(sae, x, latents, model.patch_grid)


@torch.no_grad()
def activation_heatmaps(
    sae: SparseAutoencoder,
    x: Float[Tensor, "batch tokens d_in"],
    latents: Sequence[int],
    patch_grid: tuple[int, int],
) -> Float[Tensor, "batch latents rows columns"]:
    """Do the same with stored activations: the last rows × columns tokens are the patches."""
    rows, columns = patch_grid
    if x.shape[1] < rows * columns:
        raise UserError(f"{x.shape[1]} tokens per image cannot fill {rows} × {columns} patches.")
    patches = x[:, x.shape[1] - rows * columns :].to(sae.W_enc.device)
    values = latent_values(sae.encode(patches.flatten(0, 1)), latents)
    grid = values.view(len(x), rows, columns, len(latents))
    return grid.permute(0, 3, 1, 2).contiguous()


def latent_values(code: SparseCode, latents: Sequence[int]) -> Float[Tensor, "rows latents"]:
    """Return columns of a code as a dense matrix, without making the others dense."""
    bad = [latent for latent in latents if not 0 <= latent < code.n_latents]
    if bad:
        raise UserError(f"No latent {bad[0]}; the SAE has latents 0 to {code.n_latents - 1}.")
    device = code.values.device
    wanted, place = torch.tensor(list(latents), device=device).unique(return_inverse=True)
    column = torch.full((code.n_latents,), -1, dtype=torch.int64, device=device)
    column[wanted] = torch.arange(len(wanted), device=device)
    column = column[code.indices]
    there = column >= 0
    dense = torch.zeros(len(code), len(wanted), device=device)
    dense[code.rows[there], column[there]] = code.values[there].float()
    return dense[:, place]


def seen_pictures(
    model: VisionModel, pixels: Float[Tensor, "batch 3 height width"]
) -> list[Image.Image]:
    """Return the images as the model saw them (resized, cropped), so that patches align exactly.

    It undoes the affine part of the preprocessing, which a black and a white image reveal.
    """
    black, white = black_and_white(model)
    scale = (white - black).clamp(min=1e-6)[:, None, None]
    levels = (pixels.cpu().double() - black[:, None, None]) / scale
    array = (levels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return [Image.fromarray(image) for image in array.numpy()]


def black_and_white(model: VisionModel) -> tuple[Float[Tensor, 3], Float[Tensor, 3]]:
    """Return a black and a white pixel as the model's preprocessing makes them, in float64."""
    _, height, width = model.input_shape
    black, white = (
        model.transform(Image.new("RGB", (width, height), (level,) * 3)).mean(
            (1, 2), dtype=torch.float64
        )
        for level in (0, 255)
    )
    return black, white


def heat_image(
    grid: Float[Tensor, "rows columns"] | npt.NDArray[np.float32],
    *,
    look: Look = "colours",
    peak: float | None = None,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """Make an RGBA layer to overlay on an image.

    Args:
        grid: activations, row 0 at the top.
        look: `colours`: a perceptually uniform map, clear where nothing is active; or `spotlight`:
            dark where nothing is active, clear where the latent is strongest, so that the image
            keeps its colours.
        peak: the activation that is shown strongest; default: the grid's maximum.
        size: width and height in pixels, interpolated bilinearly; default: one pixel per patch.
    """
    values = np.asarray(grid, dtype=np.float32)
    peak = float(values.max()) if peak is None else peak
    share = np.clip(values / peak, 0, 1) if peak > 0 else np.zeros_like(values)
    if size is not None:
        layer = Image.fromarray(share).resize(size, Image.Resampling.BILINEAR)
        share = np.clip(np.asarray(layer), 0, 1)
    if look == "spotlight":
        rgba = np.empty((*share.shape, 4), dtype=np.float64)
        rgba[..., :3] = VEIL
        rgba[..., 3] = VEIL_ALPHA * (1 - share**0.6)
    else:
        # The darkest quarter of the map is left out: on an image it looks like shadow.
        rgba = colormaps[HEAT_COLOURS](0.25 + 0.75 * share)
        rgba[..., 3] = STRONGEST_ALPHA * np.sqrt(share)
    return Image.fromarray((rgba * 255).round().astype(np.uint8), "RGBA")


def overlay(
    picture: Image.Image,
    grid: Float[Tensor, "rows columns"] | npt.NDArray[np.float32],
    *,
    look: Look = "colours",
    peak: float | None = None,
    min_size: int = 224,
) -> Image.Image:
    """Overlay the grid on the image as the model saw it.

    Images smaller than `min_size` are enlarged by a whole factor without smoothing, so that a
    64-pixel scene stays crisp under a smooth heatmap.
    """
    factor = max(1, -(-min_size // max(picture.size)))
    size = (picture.width * factor, picture.height * factor)
    large = picture.convert("RGB").resize(size, Image.Resampling.NEAREST).convert("RGBA")
    heat = heat_image(grid, look=look, peak=peak, size=size)
    return Image.alpha_composite(large, heat).convert("RGB")
