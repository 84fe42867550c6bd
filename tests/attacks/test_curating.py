"""Attack sets on disk, and CLIP's opinion of images."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sparsight.attacks import (
    Target,
    clip_opinion,
    curate,
    find_text_salient,
    make_pairs,
)
from sparsight.errors import SparsightError, UserError
from sparsight.images import load_batches, open_images, written
from sparsight.vision.soft_text import SoftText

SITE = "blocks.1.mlp_post"


@pytest.fixture(scope="module")
def target(calibration):
    pairs = make_pairs(open_images("calibration:12:990001:single"))
    return Target(find_text_salient(calibration, pairs, site=SITE, contrast="attack", workers=0))


@pytest.fixture(scope="module")
def scenes():
    return open_images("calibration:40:7")


def test_images_with_writing_come_first(calibration, target, scenes, tmp_path):
    made = curate(calibration, scenes, target, tmp_path / "set", n=8, workers=0)
    again = open_images(tmp_path / "set")
    assert len(again) == made.n == 8 and made.n_seen == 40
    ids = [json.loads(line) for line in (tmp_path / "set/metadata.jsonl").open()]
    numbers = [int(each["id"].split("/")[1]) for each in ids]
    assert all(scenes.scene(i).writing is not None for i in numbers)
    for i, number in enumerate(numbers):
        assert again.info(i).label == scenes.info(number).label
        assert again.info(i).caption == f"a photo of a {scenes.info(number).label}."
        assert (np.asarray(again.load(i)) == np.asarray(scenes.load(number))).all()
    scores = [each["score"] for each in ids]
    assert scores == sorted(scores, reverse=True)
    assert (made.highest, made.lowest) == (scores[0], scores[-1])


def test_scores_are_mean_activations_in_units_of_attacked_images(
    calibration, target, scenes, tmp_path
):
    curate(calibration, scenes, target, tmp_path / "set", n=5, workers=0)
    (batch,) = load_batches(scenes, calibration.transform, 40, workers=0)
    x = calibration.read(batch.pixels, [SITE])[SITE].mean(dim=1).double()[:, target.chosen]
    unit = torch.tensor(np.abs(target.table.mean["attacked"][target.chosen]))
    expected = (x / unit).mean(dim=1)
    table = pq.read_table(tmp_path / "set/scores.parquet")
    np.testing.assert_allclose(table["score"].to_numpy(), expected, rtol=1e-4)
    assert table["image"].to_pylist() == [scenes.info(i).id for i in range(40)]
    assert sorted(rank for rank in table["rank"].to_pylist() if rank is not None) == [*range(5)]


def test_the_shard_holds_the_same_images_and_captions(calibration, target, scenes, tmp_path):
    curate(calibration, scenes, target, tmp_path / "set", n=4, captions="own", workers=0)
    folder, shard = open_images(tmp_path / "set"), open_images(tmp_path / "set/attack.tar")
    assert len(folder) == len(shard) == 4
    for i in range(4):
        assert folder.info(i).captions[0] == shard.info(i).captions[0]
        assert folder.info(i).label == shard.info(i).label
        assert (np.asarray(folder.load(i)) == np.asarray(shard.load(i))).all()
    with tarfile.open(tmp_path / "set/attack.tar") as tar:
        assert tar.getnames()[:3] == ["00000.png", "00000.txt", "00000.json"]


def test_the_manifest_records_the_origin_of_everything(calibration, target, scenes, tmp_path):
    curate(calibration, scenes, target, tmp_path / "set", n=4, workers=0)
    about = json.loads((tmp_path / "set/manifest.json").read_text())
    assert about["model"]["weights_hash"] == calibration.weights_hash
    assert about["targets"][0]["site"] == SITE
    assert about["targets"][0]["chosen"] == target.chosen
    assert about["images"] == {
        "spec": scenes.spec, "fingerprint": scenes.fingerprint(), "n": 40
    }  # fmt: skip
    assert (about["captions"], about["n"], about["failed"]) == ("labels", 4, 0)


def test_the_same_set_is_written_with_the_same_bytes(calibration, target, scenes, tmp_path):
    for name in ("one", "two"):
        curate(
            calibration, scenes, target, tmp_path / name, n=3, captions="opinion", words=2,
            workers=0,
        )  # fmt: skip
    files = sorted(
        path.relative_to(tmp_path / "one")
        for path in (tmp_path / "one").rglob("*")
        if path.is_file()
    )
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_captions_may_be_the_likeliest_class(calibration, target, tmp_path):
    source = written(open_images("calibration:6:7:single"), "clean")
    curate(
        calibration, source, target, tmp_path / "set", n=6, captions="zero-shot",
        sentence="an image of a {}.", workers=0,
    )  # fmt: skip
    made = open_images(tmp_path / "set")
    right = [made.info(i).caption == f"an image of a {made.info(i).label}." for i in range(6)]
    assert sum(right) >= 5


def test_an_existing_folder_is_left_alone(calibration, target, scenes, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        curate(calibration, scenes, target, tmp_path / "set", workers=0)
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["mine.txt"]


def test_a_failure_halfway_leaves_nothing(calibration, target, scenes, tmp_path, monkeypatch):
    from sparsight.attacks import curating

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(curating, "write_json", full)
    with pytest.raises(SparsightError, match="No space left"):
        curate(calibration, scenes, target, tmp_path / "set", n=2, workers=0)
    assert list(tmp_path.iterdir()) == []


def test_broken_images_are_counted_and_many_stop_the_run(calibration, target, tmp_path):
    for i in range(3):
        Image.new("RGB", (64, 64), (i * 80, 200, 9)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    source = open_images(tmp_path)
    with pytest.raises(SparsightError, match=r"1 of 4 images could not be read.*3\.png"):
        curate(calibration, source, target, tmp_path / "set", captions="opinion", workers=0)
    options = {"captions": "opinion", "words": 1, "max_failed": 0.5, "workers": 0}
    made = curate(calibration, source, target, tmp_path / "set", **options)
    assert (made.failed, made.n_seen) == (1, 3)
    with pytest.raises(UserError, match=r"of the \d images to keep have no labels"):
        curate(calibration, source, target, tmp_path / "other", max_failed=0.5, workers=0)


def test_an_image_that_disappears_between_scoring_and_captioning_is_named(
    calibration, target, tmp_path, monkeypatch
):
    from sparsight.vision import passes

    for i in range(3):
        Image.new("RGB", (64, 64), (i * 80, 200, 9)).save(tmp_path / f"{i}.png")

    calls = []

    def late(source, *given, **options):
        if calls:
            (tmp_path / "1.png").unlink()
        calls.append(source)
        return load_batches(source, *given, **options)

    source = open_images(tmp_path)
    monkeypatch.setattr(passes, "load_batches", late)
    options = {"captions": "opinion", "words": 1, "workers": 0}
    with pytest.raises(SparsightError, match=r"1\.png.* was read a moment ago"):
        curate(calibration, source, target, tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"captions": "guess"}, "captions is 'guess'; expected own, labels"),
        ({"sentence": "a photo"}, "has no {} for the class name"),
    ],
)
def test_impossible_settings_of_curating_are_refused(
    calibration, target, scenes, tmp_path, options, message
):
    with pytest.raises(UserError, match=message):
        curate(calibration, scenes, target, tmp_path / "set", **options)


def embedded(model, source, n=4):
    pixels = torch.stack([model.transform(source.load(i)) for i in range(n)])
    with torch.no_grad():
        return model.embed_images(pixels)


def test_an_opinion_is_nearer_than_the_best_of_many_random_texts(calibration):
    images = embedded(calibration, open_images("calibration:8:7:single"))
    opinions = clip_opinion(calibration, images, words=3)
    words = list(SoftText(calibration).words.values())
    rng = np.random.default_rng(0)
    random = [" ".join(rng.choice(words, 3)) for _ in range(200)]
    with torch.no_grad():
        texts = calibration.embed_texts(random)
        cosines = torch.nn.functional.cosine_similarity(texts[:, None], images[None], dim=-1)
        own = torch.nn.functional.cosine_similarity(
            calibration.embed_texts([each.text for each in opinions]), images
        )
    for i, each in enumerate(opinions):
        assert each.similarity == pytest.approx(float(own[i]), abs=1e-5)
        assert each.similarity > float(cosines[:, i].max())


def test_opinions_of_attacked_images_name_the_word_that_is_written(calibration):
    scenes = open_images("calibration:8:7:single")
    attacked = written(scenes, "attacked")
    named = {}
    for kind, source in {"attacked": attacked, "clean": attacked.as_kind("clean")}.items():
        opinions = clip_opinion(calibration, embedded(calibration, source, 8), words=3, swaps=1)
        named[kind] = sum(attacked.text(i) in each.text.split() for i, each in enumerate(opinions))
    assert named["attacked"] >= named["clean"] + 2


def test_opinions_repeat_and_words_stay_whole(calibration):
    images = embedded(calibration, open_images("calibration:8:7"), 2)
    one, again = (clip_opinion(calibration, images, words=2, steps=10) for _ in range(2))
    assert one == again
    assert all(len(each.text.split()) == 2 for each in one)
    assert clip_opinion(calibration, images[:0]) == []


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_hard_mixtures_are_texts_in_every_library(tiny, family):
    model = tiny(family)
    text = SoftText(model)
    names = list(text.words.values())
    assert {"cat", "dog", "photo"} <= set(names) and "a" not in names
    chosen = torch.tensor([[names.index("cat"), names.index("sun")]])
    with torch.no_grad():
        expected = model.embed_texts(["cat sun"])
        torch.testing.assert_close(text.embed_ids(chosen), expected)
        mixture = torch.nn.functional.one_hot(chosen, len(names)).float()
        torch.testing.assert_close(text.embed(mixture), expected)
    mixture.requires_grad_(True)
    text.embed(mixture).square().sum().backward()
    assert mixture.grad is not None and bool((mixture.grad != 0).any())


def test_an_opinion_rises_above_random_tokens_in_other_clips(tiny):
    model = tiny("clip")
    images = torch.randn(2, 20, generator=torch.Generator().manual_seed(3))
    words = list(SoftText(model).words.values())
    rng = np.random.default_rng(0)
    for i, each in enumerate(clip_opinion(model, images, words=4)):
        with torch.no_grad():
            texts = model.embed_texts([" ".join(rng.choice(words, 4)) for _ in range(50)])
        cosines = torch.nn.functional.cosine_similarity(texts, images[i : i + 1])
        assert each.similarity > float(cosines.mean())
        assert each.similarity >= float(cosines.quantile(0.9))


def test_too_many_words_and_models_without_text_are_refused(tiny):
    with pytest.raises(UserError, match="reads 16 tokens; 15 words do not fit"):
        clip_opinion(tiny("clip"), torch.randn(1, 20), words=15)
    with pytest.raises(UserError, match="no text tower"):
        clip_opinion(tiny("dinov2"), torch.randn(1, 32))
    with pytest.raises(UserError, match="must be finite"):
        clip_opinion(tiny("clip"), torch.full((1, 20), torch.nan))
    with pytest.raises(UserError, match="words 0"):
        clip_opinion(tiny("clip"), torch.randn(1, 20), words=0)
