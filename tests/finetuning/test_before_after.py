"""Figures before and after fine-tuning, and the page that shows them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sparsight as sp
from finetuning_samples import NoisePictures, tiny_clip
from sparsight.attacks import make_pairs
from sparsight.errors import UserError
from sparsight.finetuning import FinetuneConfig, captioned, finetune, report
from sparsight.finetuning.latents import drift
from sparsight.finetuning.measures import (
    discriminant,
    in_batch_accuracy,
    modality_gap,
    retrieval,
)
from sparsight.finetuning.report import (
    FIGURES,
    PAGE,
    read_figures,
    report_finetuning,
    write_page,
)
from sparsight.finetuning.subjects import Subjects
from sparsight.images import ImageError, ImageInfo
from sparsight.sae import SAEConfig, TopK
from sparsight.training import TrainConfig, train


@pytest.fixture(scope="module")
def model():
    return sp.load_model("calibration", device="cpu")


class Labelled(NoisePictures):
    """Noise with two labels."""

    def info(self, index):
        label = ("cat", "dog")[index % 2]
        return ImageInfo(id=str(index), uri=f"noise/{index}", label=label)


class Gone(Labelled):
    """Images that are listed but cannot be read."""

    def load(self, index, min_side=None):
        raise ImageError("the disk is gone")


def test_in_batch_accuracy_has_its_own_name_and_a_seed(tmp_path):
    """It has at most 48 ways, bare names, unnormalised dot products and repeated labels."""
    model = tiny_clip(tmp_path)
    source = Labelled(30, [])
    found = in_batch_accuracy(model, source, batch_size=8, seed=3)
    order = np.random.default_rng(3).permutation(30).tolist()
    hits = 0
    for start in range(0, 30, 8):
        batch = order[start : start + 8]
        pixels = torch.stack([model.transform(source.load(i)) for i in batch])
        names = [source.info(i).label for i in batch]
        with torch.no_grad():
            products = model.embed_images(pixels) @ model.embed_texts(names).T
        hits += sum(names[j] == own for j, own in zip(products.argmax(1), names, strict=True))
    assert (found["accuracy"], found["n"], found["ways"]) == (hits / 30, 30, 2.0)
    assert found == in_batch_accuracy(model, source, batch_size=8, seed=3)
    with pytest.raises(UserError, match="none of its images has a label"):
        in_batch_accuracy(model, NoisePictures(4, [("a cat",)]))
    with pytest.raises(UserError, match=r"none of its 4 images could be read.*the disk is gone"):
        in_batch_accuracy(model, Gone(4, [("a cat",)]))


def test_recall_counts_equal_captions_as_matches():
    images = torch.eye(4)
    texts = torch.eye(4)[[1, 0, 2, 3]]
    apart = retrieval(images, texts, ["a", "b", "c", "d"])
    assert apart["image_to_text"]["1"]["recall"] == 0.5
    assert apart["text_to_image"]["5"]["recall"] == 1.0
    same = retrieval(images, texts, ["a", "a", "c", "d"])
    assert same["image_to_text"]["1"]["recall"] == 1.0
    assert same["different_captions"] == 3


def test_the_modality_gap_is_the_distance_of_the_means_and_linear_separability():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=draw)
    shift = torch.tensor([5.0, 0, 0, 0, 0, 0])
    images, texts = F.normalize(x + shift, dim=1), F.normalize(x - shift, dim=1)
    apart = modality_gap(images, texts)
    expected = (images.double().mean(0) - texts.double().mean(0)).norm()
    assert apart["distance"] == pytest.approx(float(expected))
    assert apart["separability"] > 0.99
    mixed = modality_gap(F.normalize(x, dim=1), F.normalize(x.flip(0), dim=1))
    assert mixed["separability"] == pytest.approx(0.5, abs=0.08)
    assert mixed["distance"] < 1e-6


def test_the_discriminant_is_fishers():
    rng = np.random.default_rng(0)
    one, two = (rng.normal(mean, (1.0, 3.0), (500, 2)) for mean in ((0, 0), (2, 2)))
    weights, threshold = discriminant(one, two)
    # A dimension that is three times as wide counts a ninth.
    assert weights[0] / weights[1] == pytest.approx(9, rel=0.3)
    assert (one @ weights > threshold).mean() > 0.8


def test_latents_that_swapped_places_are_matched_and_silent_ones_counted():
    draw = torch.Generator().manual_seed(0)
    before = torch.rand(6, 200, generator=draw)
    before[5] = 0
    after = before[[1, 0, 2, 3, 4, 5]] + 0.01 * torch.rand(6, 200, generator=draw)
    after[4] = 0
    found = drift(before, after)
    assert (found["n_alive"], found["fell_silent"], found["moved"]) == (5, 1, 2)
    assert found["matched"] == pytest.approx(4 / 5, abs=0.05)
    assert found["own"] == pytest.approx(2 / 5, abs=0.1)


@pytest.fixture(scope="module")
def told(model, tmp_path_factory):
    """A short run on the calibration CLIP with all figures measured."""
    out = tmp_path_factory.mktemp("tuned")
    scenes = sp.open_images("calibration:60:61")
    sae = train(
        (model, scenes),
        TrainConfig(sae=SAEConfig(256, sparsity=TopK(8)), n_vectors=4096, batch_size=512),
        out / "sae",
        sites=["blocks.2.resid_post"],
        quiet=True,
    ).sae()
    run = finetune(
        model,
        scenes,
        FinetuneConfig(steps=2, batch_size=8, log_every=1),
        out / "run",
        attack=make_pairs(sp.open_images("calibration:30:62:single"), seed=1),
        workers=0,
        quiet=True,
    )
    subjects = Subjects(
        make_pairs(sp.open_images("calibration:24:63:single"), seed=2),
        images=scenes,
        captioned=captioned(scenes, "captions"),
        sae=sae,
        max_images=60,
        workers=0,
    )
    return run, subjects, report_finetuning(run, model, subjects, quiet=True)


def test_both_models_are_measured_on_the_same_images(told):
    *_, found = told
    assert found["n"] == 24
    assert set(found["attack"]) == {"clean", "attacked", "same", "control"}
    clean, attacked = found["attack"]["clean"], found["attack"]["attacked"]
    cost = clean["before"]["accuracy"] - attacked["before"]["accuracy"]
    assert found["words_cost"] == pytest.approx(cost)
    back = attacked["after"]["accuracy"] - attacked["before"]["accuracy"]
    assert found["won_back"] == pytest.approx(back / cost)
    assert attacked["change"]["value"] == pytest.approx(back)
    low, high = found["won_back_interval"]
    assert low <= found["won_back"] <= high
    for family in ("zero_shot", "in_batch_accuracy", "retrieval", "modality_gap", "logit_scale"):
        assert set(found[family]) == {"before", "after"}
    latents = found["latents"]
    assert latents["kept"] + latents["lost"] == latents["found_before"]
    assert set(latents["truth"]) == {"before", "after"}
    assert latents["drift"]["own"] > 0.5


def test_both_models_see_the_same_pixels_if_jpegs_are_scaled(told, monkeypatch):
    run, subjects, _ = told

    class Compared(Exception):
        pass

    def noted(before, after, *_, **__):
        assert before.min_side == after.min_side == 128
        raise Compared

    monkeypatch.setattr(report, "compare", noted)
    with pytest.raises(Compared):
        scaled = sp.load_model("calibration", device="cpu", scale_jpegs=True)
        report_finetuning(run, scaled, subjects, quiet=True)


def test_the_page_shows_the_figures_and_is_self_contained(told):
    run, _, found = told
    page = (run.out / PAGE).read_text()
    assert read_figures(run)["won_back"] == pytest.approx(found["won_back"])
    shown = f"{100 * found['attack']['attacked']['after']['accuracy']:.1f} %"
    assert page.count(shown) >= 3
    assert "Fine-tuning won back" in page
    assert "in-batch" in page
    assert page.count("<svg") == 4 + bool(found["latents"]["latents"])
    assert page.count('class="example"') == 14
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert str(run.out.parent) not in page


def test_a_page_says_what_did_not_load(told):
    run, subjects, found = told
    assert "Did not load" not in (run.out / PAGE).read_text()
    write_page(run, {**found, "failed": {"attacked": 3}}, subjects)
    page = (run.out / PAGE).read_text()
    assert "Did not load" in page
    assert "3 test images" in page


def test_a_page_names_what_was_not_measured(told, model):
    run, subjects, _ = told
    found = report_finetuning(run, model, Subjects(subjects.pairs, workers=0), quiet=True)
    page = (run.out / PAGE).read_text()
    assert "latents" not in found
    assert page.count("not measured") == 3


def test_an_sae_of_another_model_is_refused(told, tmp_path):
    run, subjects, _ = told
    with pytest.raises(UserError, match="trained on calibration"):
        report_finetuning(run, run.model("cpu"), subjects, quiet=True)


def test_figures_of_another_version_are_refused(told):
    run, _, _ = told
    text = (run.out / FIGURES).read_text()
    (run.out / FIGURES).write_text(text.replace('"format_version": 1', '"format_version": 7'))
    with pytest.raises(UserError, match="another version"):
        read_figures(run)
    (run.out / FIGURES).write_text(text)
