"""Images made for latents: recipes, spectra, objective, judging, files."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sparsight as sp
from cutting import cut
from sparsight.errors import UserError
from sparsight.folders import settled
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel
from sparsight.visualisation import (
    Transforms,
    VisualisationSettings,
    assumed_statistics,
    measure_images,
    visualize,
)
from sparsight.visualisation.judging import HELD_OUT, Judge, to_images, to_levels
from sparsight.visualisation.objective import Objective, mean_similarity, vectors_with_gradients
from sparsight.visualisation.recipes import Phases, make_parameters
from sparsight.visualisation.settings import RECIPES, Recipe
from sparsight.visualisation.views import random_views

FEW = VisualisationSettings(recipe="pixels", steps=12, views=1)


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_raises_the_pre_activation(
    recipe: Recipe, calibration: VisionModel, sae: SparseAutoencoder, index: sp.LatentIndex,
    live: list[int],
) -> None:  # fmt: skip
    settings = VisualisationSettings(recipe=recipe, steps=30, views=1)
    (made,) = visualize(calibration, sae, live[0], index=index, settings=settings)
    assert np.mean(made.history[-5:]) > np.mean(made.history[:5])
    assert made.images[0].size == (64, 64) and made.best.plain > 0
    assert made.settings.lr is not None and made.settings.tv is not None


@pytest.mark.parametrize("recipe", ["maco", "pixels"])
def test_made_images_beat_the_best_real_ones_under_held_out_changes(
    recipe: Recipe,
    calibration: VisionModel,
    sae: SparseAutoencoder,
    index: sp.LatentIndex,
    live: list[int],
) -> None:
    settings = VisualisationSettings(recipe=recipe, steps=60, views=1)
    made = visualize(calibration, sae, live[:4], index=index, settings=settings)
    assert sum((each.held_out_ratio or 0) >= 1 for each in made) >= 3


def test_the_same_seed_gives_the_same_bits_whatever_else_is_made(
    calibration: VisionModel, sae: SparseAutoencoder, live: list[int]
) -> None:
    first, second = live[:2]
    alone = visualize(calibration, sae, second, settings=FEW)[0]
    beside = visualize(calibration, sae, [first, second], settings=FEW)[1]
    other = visualize(calibration, sae, second, settings=dataclasses.replace(FEW, seed=1))[0]
    assert alone.images[0].tobytes() == beside.images[0].tobytes() != other.images[0].tobytes()


@pytest.mark.parametrize("size", [(16, 16), (15, 17), (12, 9)])
def test_maco_keeps_the_magnitude_of_every_frequency(size: tuple[int, int]) -> None:
    statistics = assumed_statistics(*size)
    phases = Phases(statistics, size, generators(2))
    optimiser = phases.optimiser(1.0)
    aim = torch.rand(2, 3, *size, generator=generators(1)[0])
    before = phases.channels().detach()
    for _ in range(5):
        optimiser.zero_grad()
        (phases() - aim).square().sum().backward()
        optimiser.step()
    after = phases.channels().detach()
    assert float((after - before).abs().max()) > 0.01
    for channels in (before, after):
        found = torch.fft.rfft2(channels).abs()
        wanted = statistics.magnitude.expand_as(found)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (15, 17)])
def test_the_deviations_are_those_of_images_with_the_spectrum(size: tuple[int, int]) -> None:
    statistics = assumed_statistics(*size)
    channels = Phases(statistics, size, generators(1)).channels().detach()[0]
    found = channels.flatten(1).std(1, correction=0)
    torch.testing.assert_close(found, statistics.deviations, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found, torch.tensor([0.22, 0.06, 0.03]), rtol=1e-3, atol=1e-5)


def test_the_spectrum_is_the_mean_over_the_images(calibration: VisionModel) -> None:
    source = sp.open_images("calibration:5:3")
    found = measure_images(calibration, source)
    rgb = np.stack([np.asarray(source.load(i), dtype=np.float64) / 255 for i in range(5)])
    np.testing.assert_allclose(found.mean.numpy(), rgb.mean((0, 1, 2)), atol=1e-5)
    channels = rgb @ found.axes.double().numpy()
    magnitude = np.abs(np.fft.rfft2(channels, axes=(1, 2))).mean(0).transpose(2, 0, 1)
    magnitude[:, 0, 0] = 0
    np.testing.assert_allclose(found.magnitude.numpy(), magnitude, rtol=1e-4, atol=1e-3)
    colours = channels.reshape(-1, 3)
    covariance = np.cov(colours.T)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-6
    assert "5 images" in found.origin


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2_with_registers", "vit"])
def test_vectors_with_gradients_are_those_that_read_gives(family: str, tiny) -> None:
    model = tiny(family)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for site in model.sites:
        for tokens in ("all", "patches", "mean", "cls"):
            try:
                wanted = model.read(pixels, site, tokens)[site]
            except UserError:
                continue
            x = pixels.clone().requires_grad_(True)
            found = vectors_with_gradients(model, x, site, tokens)
            torch.testing.assert_close(found.detach(), wanted, msg=f"{site} {tokens}")
            (gradient,) = torch.autograd.grad(found.square().sum(), x)
            blind = site == "blocks.0.resid_pre" and tokens == "cls"  # it has met no patch yet
            assert bool(gradient.any()) != blind, (site, tokens)


@pytest.mark.parametrize("pool", ["max", "softmax", "mean", "cls"])
def test_the_objective_pools_the_pre_activations(
    pool, calibration: VisionModel, sae: SparseAutoencoder
) -> None:
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    site = "blocks.1.resid_post"
    objective = Objective(calibration, sae, site, "all", 5, pool, unit=2.0, press=True)
    with torch.no_grad():
        raised = objective(pixels)
    x = calibration.read(pixels, site)[site]
    every = sae.pre_activations(x.flatten(0, 1)).view(2, 65, 96)
    own = every[..., 5] / 2
    weights = (8 * own).softmax(1)
    wanted = {
        "max": own.amax(1),
        "softmax": (weights * own).sum(1),
        "mean": own[:, 1:].mean(1),
        "cls": own[:, 0],
    }[pool]
    torch.testing.assert_close(raised.strength, wanted)
    for row, (scores, place) in enumerate(zip(every, own.argmax(1), strict=True)):
        others = np.delete(scores[place].numpy(), 5)
        rivals = np.maximum(np.sort(others)[-16:], 0).mean()
        assert float(raised.rivals[row]) == pytest.approx(rivals, rel=1e-5)


def test_activation_and_rank_are_those_of_the_real_code(
    calibration: VisionModel, sae: SparseAutoencoder, live: list[int]
) -> None:
    site, source = "blocks.1.resid_post", sp.open_images("calibration:3:9")
    images = [source.load(i) for i in range(3)]
    for latent in live[:3]:
        for image, judged in zip(
            images, Judge(calibration, sae, site, "all")(images, latent), strict=True
        ):
            x = calibration.read(calibration.transform(image)[None], site)[site][0]
            strongest = sae.encode(x).dense().amax(0)
            assert judged.plain == pytest.approx(float(strongest[latent]), abs=1e-4)
            if judged.plain:
                assert judged.rank == 1 + int((strongest > judged.plain + 1e-4).sum())


def test_several_images_of_a_latent_differ_more_with_diversity(
    calibration: VisionModel, sae: SparseAutoencoder, live: list[int]
) -> None:
    def similarity(weight: float) -> float:
        settings = VisualisationSettings(n=3, steps=25, views=1, diversity=weight)
        made = visualize(calibration, sae, live[0], settings=settings)[0]
        objective = Objective(
            calibration, sae, "blocks.1.resid_post", "all", live[0], "max", unit=1.0
        )
        with torch.no_grad():
            pixels = torch.stack([calibration.transform(image) for image in made.images])
            return float(mean_similarity(objective(pixels).look))

    assert similarity(5.0) < similarity(0.0) - 0.05


def test_the_mean_similarity_is_that_of_all_pairs() -> None:
    rows = torch.nn.functional.normalize(torch.randn(4, 7), dim=1)
    pairs = [float(rows[i] @ rows[j]) for i, j in itertools.permutations(range(4), 2)]
    assert float(mean_similarity(rows)) == pytest.approx(np.mean(pairs), abs=1e-5)
    assert float(mean_similarity(rows[:1])) == 0


def test_views_without_transforms_are_the_image() -> None:
    images = torch.rand(2, 3, 20, 31)
    still = Transforms(shift=0.0, scale=0.0, rotate=0.0, crop=1.0, noise=0.0)
    views = random_views(images, still, torch.Generator().manual_seed(0))
    torch.testing.assert_close(views, images, rtol=1e-4, atol=1e-4)
    moved = random_views(images, Transforms(), torch.Generator().manual_seed(0))
    assert float((moved - images).abs().mean()) > 0.02


def test_each_held_out_change_keeps_the_size_and_changes_the_image() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    for name, change in HELD_OUT.items():
        changed = change(image)
        assert changed.size == image.size and changed.mode == "RGB", name
        assert changed.tobytes() != image.tobytes(), name
    shifted = np.asarray(HELD_OUT["shift"](image))
    np.testing.assert_array_equal(shifted[2:, 3:], noise[:-2, :-3])


def test_levels_and_images_are_each_others_inverse() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    images = [Image.fromarray(each) for each in noise]
    assert [each.tobytes() for each in to_images(to_levels(images))] == [
        each.tobytes() for each in images
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_starts_with_levels_in_range_at_any_size(recipe: Recipe) -> None:
    for size in ((64, 64), (30, 45)):
        images = make_parameters(recipe, assumed_statistics(*size), size, generators(2))().detach()
        assert images.shape == (2, 3, *size)
        assert float(images.min()) >= 0 and float(images.max()) <= 1
        assert float((images[0] - images[1]).abs().max()) > 0


def test_a_result_is_saved_with_its_scores_and_shown_in_a_notebook(
    calibration: VisionModel, sae: SparseAutoencoder, index: sp.LatentIndex, live: list[int],
    tmp_path: Path,
) -> None:  # fmt: skip
    settings = dataclasses.replace(FEW, n=2)
    (made,) = visualize(calibration, sae, live[0], index=index, settings=settings, out=tmp_path)
    folder = tmp_path / f"{live[0]}-pixels"
    assert {each.name for each in folder.iterdir()} == {
        "0.png", "1.png", "real.png", "visualisation.json",
    }  # fmt: skip
    found = json.loads((folder / "visualisation.json").read_text())
    assert found["images"][0]["activation"] == made.best.plain
    assert found["real"]["best"] == pytest.approx(index.row(live[0])["max_activation"], rel=1e-4)
    assert found["settings"]["steps"] == 12 and len(found["history"]) == 12
    assert Image.open(folder / "0.png").tobytes() == made.images[0].tobytes()
    assert made._repr_html_().count("<img") == 3
    held_out = [each.mean_held_out for each in made.judgements]
    assert held_out == sorted(held_out, reverse=True)


def test_a_save_that_is_killed_leaves_the_old_files_or_the_new_ones(
    calibration: VisionModel, sae: SparseAutoencoder, live: list[int], tmp_path: Path
) -> None:
    old, new = (
        visualize(calibration, sae, live[0], settings=dataclasses.replace(FEW, n=n, steps=2))[0]
        for n in (2, 1)
    )
    folder = tmp_path / "made"
    seen = set()
    for place in itertools.count(0, 3):
        old.save(folder)
        if not cut(lambda: new.save(folder), place, tmp_path):
            break
        names = {each.name for each in settled(folder).glob("[!.]*")}
        about = json.loads((folder / "visualisation.json").read_text())
        assert names == {each["file"] for each in about["images"]} | {"visualisation.json"}
        for each in about["images"]:
            Image.open(folder / each["file"]).load()
        seen.add(len(about["images"]))
    assert seen == {1, 2}
