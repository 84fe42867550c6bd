"""The verbs `steer` and `search` on the calibration CLIP, from the shell to the files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import sparsight as sp
from sparsight.cli import main
from sparsight.editing import embed_collection
from sparsight.sae import Normaliser, SAEConfig, SparseAutoencoder, TopK

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Untrained SAEs of two sites, with the metadata that training writes."""
    folder = tmp_path_factory.mktemp("runs")
    model = sp.load_model("calibration", device="cpu")
    images = sp.open_images("calibration:6")
    pixels = torch.stack([model.transform(images.load(i)) for i in range(6)])
    for name, site in (("stream", "blocks.-1.resid_post"), ("embedding", "embedding")):
        site = model.canonical_site(site)
        x = model.read(pixels, [site])[site].flatten(0, 1).double()
        sae = SparseAutoencoder(
            x.shape[1],
            SAEConfig(64, sparsity=TopK(4)),
            normaliser=Normaliser.fit("scale", x.mean(dim=0), x.square().mean(dim=0)),
            metadata={
                "model": {"id": "calibration", "weights_hash": model.weights_hash},
                "images": "calibration:12:3:single",
                "site": site,
                "tokens": "all",
            },
        )
        sae.save_pretrained(folder / name)
    return folder


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(each) for each in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_steer_writes_figures_and_plots(runs, tmp_path, capsys):
    code, out, err = run(
        capsys, "steer", runs / "stream", "--latents", "3", "--strengths", "0", "2", "--unit",
        "absolute", "--ks", "2", "64", "--images", "calibration:140:3:single", "--templates",
        "simple", "--workers", 0, "--device", "cpu", "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "steer.json").read_text())
    assert [each["strength"] for each in found["latents"][0]["strengths"]] == [0, 2]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".png", ".svg"}
    assert "latent 3" in out and "unsteered: top-1" in out


def test_search_writes_a_page_of_images(runs, tmp_path, capsys):
    code, out, err = run(
        capsys, "search", "a photo of a sun", "--sae", runs / "embedding", "--modes", "plain",
        "reconstructed", "query", "steered", "--latents", 5, "--activation", 3, "--top", 3,
        "--workers", 0, "--device", "cpu", "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "search.json").read_text())["results"]
    assert [each["mode"] for each in found] == ["plain", "reconstructed", "query", "steered"]
    assert (tmp_path / "search.html").read_text().count("data:image/jpeg") == 12
    assert "search.html" in out


@pytest.mark.parametrize("option", ["--image", "--picture"])
def test_search_by_an_image_accepts_both_names_of_the_option(option, tmp_path, capsys):
    sp.open_images("calibration:6").load(3).save(tmp_path / "mine.png")
    code, _, err = run(
        capsys, "search", option, tmp_path / "mine.png", "--model", "calibration", "--images",
        "calibration:6", "--workers", 0, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    (found,) = json.loads((tmp_path / "out/search.json").read_text())["results"]
    assert found["query"] == "mine.png" and found["hits"][0]["image"] == 3


@pytest.mark.parametrize("given", ["the option", "the SAE"])
def test_a_large_jpeg_query_is_decoded_like_the_images(given, runs, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    for i in range(2):
        Image.fromarray(noise).rotate(90 * i).save(tmp_path / f"photos/{i}.jpg")
    sae = SparseAutoencoder.from_pretrained(runs / "embedding")
    sae.metadata["model"]["preprocessing"] = {"jpeg_min_side": 128}
    sae.save_pretrained(tmp_path / "sae")
    options = ["--model", "calibration", "--scale-jpegs"]
    code, _, err = run(
        capsys, "search", "--image", tmp_path / "photos/0.jpg", "--images", tmp_path / "photos",
        *(options if given == "the option" else ["--sae", tmp_path / "sae", "--modes", "plain"]),
        "--workers", 0, "--device", "cpu", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    (found,) = json.loads((tmp_path / "out/search.json").read_text())["results"]
    cosines = {}
    for scaled in (False, True):
        model = sp.load_model("calibration", device="cpu", scale_jpegs=scaled)
        images = sp.open_images(tmp_path / "photos")
        one, other = embed_collection(model, images, workers=0).embeddings
        cosines[scaled] = float(torch.cosine_similarity(one, other, dim=0))
    assert abs(cosines[True] - cosines[False]) > 1e-3
    shown = [hit["cosine"] for hit in found["hits"]]
    assert shown == pytest.approx([1, cosines[True]], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["steer", "stream", "--latents", "64"], "no latent 64"),
        (["steer", "stream", "--latents", "sun"], "sparsight index"),
        (["steer", "stream", "--store", "x", "--latents", "1"], "--images, not --store"),
        (["search", "--sae", "embedding"], "a text to search for, or --image"),
        (["search", "sun", "--sae", "stream"], "width 192"),
        (["search", "sun"], "--model and --images"),
        (["search", "sun", "--sae", "embedding", "--modes", "steered"], "needs --latents"),
        (["search", "sun", "--modes", "query"], "give --sae"),
        (
            ["search", "--picture", "gone.png", "--sae", "embedding"],
            "this image file does not exist",
        ),
        (["steer", "stream", "--latents", "1", "--max-images", "-1"], "max_images is -1"),
        (["steer", "stream", "--latents", "1", "--ks", "0"], "ks are [0]"),
        (["steer", "stream", "--latents", "1", "--out", __file__], "cannot create the folder"),
        (["search", "sun", "--sae", "embedding", "--max-images", "0"], "max_images is 0"),
        (["search", "sun", "--sae", "embedding", "--out", __file__], "cannot create the folder"),
    ],
)
def test_mistakes_give_one_message(runs, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [runs / each if each in ("stream", "embedding") else each for each in arguments]
    code, _, err = run(capsys, *given)
    assert code == 2 and message in err and "Traceback" not in err


def test_an_sae_of_other_weights_is_refused_unless_the_check_is_off(runs, tmp_path, capsys):
    sae = SparseAutoencoder.from_pretrained(runs / "embedding")
    sae.metadata["model"]["weights_hash"] = "0" * 64
    sae.save_pretrained(tmp_path / "other")
    search = ["search", "sun", "--sae", tmp_path / "other", "--workers", 0, "--out", tmp_path]
    code, _, err = run(capsys, *search)
    assert code == 2 and "00000000" in err and "calibration" in err
    assert run(capsys, *search, "--no-check")[0] == 0


def test_steering_by_a_latent_that_is_never_active_is_refused(runs, tmp_path, capsys):
    sae = SparseAutoencoder.from_pretrained(runs / "embedding")
    with torch.no_grad():
        sae.b_enc[5] = -1e6
    sae.save_pretrained(tmp_path / "never")
    code, _, err = run(
        capsys, "search", "sun", "--sae", tmp_path / "never", "--modes", "steered", "--latents",
        5, "--workers", 0, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 2 and "Latent 5 is not active on any image" in err
    assert not (tmp_path / "out").exists()
