from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from latent_parts import SITE, TensorActivations, make_sae
from sparsight.errors import UserError
from sparsight.images import ImageSource
from sparsight.latents import (
    activation_heatmaps,
    heat_image,
    overlay,
    patch_heatmaps,
    seen_pictures,
)
from sparsight.latents.heatmaps import latent_values
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel


def planted(row: int, column: int, latent: int, sae: SparseAutoencoder) -> torch.Tensor:
    """Activations [1, 17, 32] of CLS and 4 × 4 patches, one of which is the latent's direction."""
    x = torch.zeros(1, 17, 32)
    x[0, 1 + 4 * row + column] = 5 * sae.W_enc[latent]
    return x


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 3), (2, 1), (3, 3)])
def test_a_planted_patch_lights_its_own_cell(row: int, column: int, sae: SparseAutoencoder) -> None:
    heat = activation_heatmaps(sae, planted(row, column, 9, sae), [9], (4, 4))
    assert heat.shape == (1, 1, 4, 4)
    assert (heat[0, 0] > 0).nonzero().tolist() == [[row, column]]


def test_a_grid_that_is_not_square_has_its_rows_first(sae: SparseAutoencoder) -> None:
    x = torch.zeros(1, 15, 32)
    x[0, 7] = sae.W_enc[9]
    heat = activation_heatmaps(sae, x, [9], (3, 5))
    assert (heat[0, 0] > 0).nonzero().tolist() == [[1, 2]]


def test_heatmaps_from_the_model_equal_dense_codes(
    sae: SparseAutoencoder, model: VisionModel, source: ImageSource, activations: TensorActivations
) -> None:
    pixels = torch.stack([model.transform(source.load(i)) for i in range(5)])
    dense = sae.encode(activations.x[:5, 1:].flatten(0, 1)).dense().view(5, 4, 4, 96)
    latents = [int(dense.amax((0, 1, 2)).argmax()), 3, 90, 3]
    heat = patch_heatmaps(sae, model, pixels, latents)
    assert heat.shape == (5, 4, 4, 4)
    assert heat.max() > 0
    torch.testing.assert_close(heat, dense[..., latents].permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


def test_columns_of_a_code_equal_the_dense_ones_in_any_order(sae: SparseAutoencoder) -> None:
    code = sae.encode(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)))
    latents = [95, 0, 17, 17, 4]
    assert torch.equal(latent_values(code, latents), code.dense()[:, latents])
    with pytest.raises(UserError, match="No latent 96"):
        latent_values(code, [96])


def test_an_sae_of_one_vector_per_image_has_no_heatmap(model: VisionModel) -> None:
    pixels = torch.zeros(1, 3, 32, 32)
    with pytest.raises(UserError, match="one vector per image"):
        patch_heatmaps(make_sae(tokens="cls"), model, pixels, [0], site=SITE)
    with pytest.raises(UserError, match="site it was trained on"):
        patch_heatmaps(SparseAutoencoder(32), model, pixels, [0])


def test_seen_images_are_what_the_model_saw(model: VisionModel) -> None:
    random = np.random.default_rng(0)
    array = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = model.transform(Image.fromarray(array))[None]
    assert np.array_equal(np.asarray(seen_pictures(model, pixels)[0]), array)


def test_colours_are_clear_where_nothing_is_active_and_spotlights_where_it_is_strongest() -> None:
    grid = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    alpha = np.asarray(heat_image(grid))[..., 3]
    assert alpha[0, 0] == 0
    assert alpha[0, 1] < alpha[1, 0] < alpha[1, 1]
    alpha = np.asarray(heat_image(grid, look="spotlight"))[..., 3]
    assert alpha[0, 0] > alpha[0, 1] > alpha[1, 0] > alpha[1, 1] == 0
    half = np.asarray(heat_image(grid, look="spotlight", peak=8))[..., 3]
    assert half.min() > 0
    assert not np.asarray(heat_image(torch.zeros(2, 2)))[..., 3].any()


def test_an_overlay_of_a_small_image_keeps_its_pixels_and_lights_the_right_corner() -> None:
    array = np.random.default_rng(0).integers(60, 200, (64, 64, 3), dtype=np.uint8)
    grid = torch.zeros(8, 8)
    grid[1, 6] = 1
    laid = overlay(Image.fromarray(array), grid, min_size=224)
    assert laid.size == (256, 256)
    difference = np.abs(np.asarray(laid).astype(int) - array.repeat(4, 0).repeat(4, 1)).sum(2)
    assert not difference[96:].any()
    assert not difference[:, :160].any()
    row, column = np.unravel_index(difference.argmax(), difference.shape)
    assert 32 <= row < 64
    assert 192 <= column < 224


def test_a_large_image_keeps_its_size() -> None:
    assert overlay(Image.new("RGB", (300, 240)), torch.ones(7, 7)).size == (300, 240)
