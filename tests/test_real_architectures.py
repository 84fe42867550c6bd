"""From photographs to an index of latents, over each architecture that people bring.

Random weights in the shapes of the real thing: what the numbers mean is tested elsewhere, here the
whole chain must hold together, for a CLIP ViT-B/32 at its full size and for small relatives.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

import sparsight as sp
import tiny_models
from one_thread import one_thread

__all__ = ["one_thread"]

SITE = "blocks.-1.resid_post"
N_LATENTS = 64
LABELS = ("cat", "dog", "sun")
N_PHOTOS = 12
TALL, GREY, TURNED = 0, 1, 2


@dataclass(frozen=True)
class Shape:
    """What is known of a model before it is opened."""

    blocks: int
    d_in: int
    n_prefix: int
    grid: tuple[int, int]


SHAPES = {
    "vit_b_32": Shape(12, 768, 1, (7, 7)),
    "siglip": Shape(3, 32, 0, (4, 4)),
    "dinov2": Shape(3, 32, 1, (4, 4)),
    "dinov2_with_registers": Shape(3, 32, 4, (4, 4)),
    "vit": Shape(3, 32, 1, (4, 4)),
}
WITH_TEXT = ("vit_b_32", "siglip")


def save_vit_b_32(folder: Path) -> Path:
    """OpenAI's vision tower to the letter, 86 million weights; a text tower of two blocks."""
    vision, text = {"patch_size": 32}, tiny_models.text_tower()
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=512)
    ).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def save_photos(folder: Path) -> Path:
    """JPEGs of three labels, none of them square: one tall, one grey, one lying on its side."""
    random = np.random.default_rng(0)
    for i in range(N_PHOTOS):
        coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        size = (120, 200) if i == TALL else (200, 150)
        photo = coarse.resize(size, Image.Resampling.BICUBIC)
        exif = Image.Exif()
        if i == GREY:
            photo = photo.convert("L")
        if i == TURNED:
            exif[0x0112] = 6
        path = folder / LABELS[i // 4] / f"IMG_{i:04d}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path, "JPEG", quality=90, exif=exif)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> sp.ImageSource:
    return sp.open_images(save_photos(tmp_path_factory.mktemp("photos")))


@dataclass(frozen=True)
class Chain:
    """What each step of the chain gave."""

    model: sp.VisionModel
    store: sp.ActivationStore
    run: sp.Run
    metrics: dict
    index: sp.LatentIndex


@pytest.fixture(scope="module", params=SHAPES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def chain(
    family: str,
    photos: sp.ImageSource,
    one_thread: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Chain:
    """extract → train → evaluate → index, as the README has it."""
    folder = tmp_path_factory.mktemp(family)
    saved = folder / "model"
    save_vit_b_32(saved) if family == "vit_b_32" else tiny_models.build(family, saved)
    model = sp.load_model(str(saved), device="cpu")
    store = sp.extract(
        model, photos, sites=[SITE], out=folder / "store", batch_size=6, workers=0, quiet=True
    )
    config = sp.TrainConfig(
        sae=sp.SAEConfig(n_latents=N_LATENTS, sparsity=sp.TopK(k=8)),
        n_vectors=8 * 64,
        batch_size=64,
        lr=1e-3,
    )
    run = sp.train(store, config, out=folder / "run", device="cpu", quiet=True)
    report = sp.evaluate(run.sae(), store, model=model, workers=0, quiet=True)
    report.save(run.out)
    index = sp.build_index(run.sae(), store, out=run.out / "index", quiet=True)
    return Chain(model, store, run, report.metrics, index)


def test_the_store_has_every_photo_in_the_shape_of_the_model(
    family: str, chain: Chain, photos: sp.ImageSource
) -> None:
    shape, model, store = SHAPES[family], chain.model, chain.store
    assert (model.n_blocks, model.n_prefix, model.patch_grid) == (
        shape.blocks, shape.n_prefix, shape.grid,
    )  # fmt: skip
    site = f"blocks.{shape.blocks - 1}.resid_post"
    assert store.sites == (site,)
    n_tokens = shape.n_prefix + math.prod(shape.grid)
    (batch,) = store.ordered([site], N_PHOTOS)
    assert batch.activations[site].shape == (N_PHOTOS, n_tokens, shape.d_in)
    assert batch.activations[site].isfinite().all()
    rows = store.images.to_pylist()
    assert [row["id"] for row in rows] == [photos.info(i).id for i in range(N_PHOTOS)]
    assert [row["label"] for row in rows] == [LABELS[i // 4] for i in range(N_PHOTOS)]
    assert {row["status"] for row in rows} == {"ok"}
    sizes = [(row["width"], row["height"]) for row in rows]
    assert (sizes[TALL], sizes[TURNED]) == ((120, 200), (150, 200))
    assert set(sizes) - {sizes[TALL], sizes[TURNED]} == {(200, 150)}


def test_the_sae_fits_the_site_and_learns(family: str, chain: Chain) -> None:
    sae, lines = chain.run.sae(), chain.run.metrics()
    assert (sae.d_in, sae.n_latents) == (SHAPES[family].d_in, N_LATENTS)
    assert sae.metadata["model"]["weights_hash"] == chain.model.weights_hash
    assert sae.metadata["site"] == chain.store.sites[0]
    assert all(parameter.isfinite().all() for parameter in sae.parameters())
    assert 0 < lines[-1]["fvu"] < lines[0]["fvu"]


def test_every_number_is_finite_and_what_needs_words_says_when_there_are_none(
    family: str, chain: Chain
) -> None:
    shape, metrics = SHAPES[family], chain.metrics
    assert metrics["n_images"] == N_PHOTOS
    assert metrics["n_vectors"] == N_PHOTOS * (shape.n_prefix + math.prod(shape.grid))
    assert 0 < metrics["fvu"] < 2 and 0 < metrics["l0"] <= 8
    assert all(math.isfinite(number) for number in numbers(metrics))
    assert "calibration world" in metrics["omitted"]["truth"]
    if family in WITH_TEXT:
        shots = metrics["zero_shot"]
        assert {"original", "reconstructed"} <= shots.keys()
        assert all(0 <= shots[name]["top1"] <= 1 for name in shots)
        assert "no captions" in metrics["omitted"]["contrastive"]
    else:
        assert "zero_shot" not in metrics
        for part in ("zero_shot", "contrastive"):
            assert "no text tower" in metrics["omitted"][part]


def numbers(value: object) -> list[float]:
    """All numbers in nested mappings and lists."""
    if isinstance(value, dict):
        return [number for each in value.values() for number in numbers(each)]
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [value] if isinstance(value, int | float) else []


def test_examples_in_the_index_are_photos_of_the_folder(
    chain: Chain, photos: sp.ImageSource
) -> None:
    index = sp.LatentIndex.open(chain.run.out / "index", chain.run.sae())
    shown = [index.top(latent) for latent in range(N_LATENTS)]
    assert sum(map(bool, shown)) >= 8
    (batch,) = chain.store.ordered(chain.store.sites, N_PHOTOS)
    for latent, examples in enumerate(shown):
        strengths = [example.activation for example in examples]
        assert strengths == sorted(strengths, reverse=True)
        for example in examples[:1]:
            x = batch.activations[chain.store.sites[0]][example.image]
            dense = chain.run.sae().encode(x).dense()
            assert float(dense[:, latent].max()) == pytest.approx(example.activation, rel=1e-4)
            assert int(dense[:, latent].argmax()) == example.token
            info = index.info(example.image)
            assert info == photos.info(example.image) and Path(info.uri).is_file()
            assert index.picture(example.image) == photos.load(example.image)


def test_the_report_shows_photos_and_heatmaps(chain: Chain, tmp_path: Path) -> None:
    page = sp.write_report(
        chain.run.out, tmp_path / "r.html", model=chain.model, latents=2, quiet=True
    )
    html = page.read_text()
    assert "url(data:image/" in html and chain.store.sites[0] in html
    assert '<svg class="heat"' in html
    text = re.sub(r"data:[\w/+.-]+;base64,[\w+/=\s]+", "", html)
    assert "NaN" not in text
