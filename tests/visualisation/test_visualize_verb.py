"""`sparsight visualize`, and what it says about a wrong use."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

import sparsight as sp
from sparsight.cli import main
from sparsight.errors import UserError
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel
from sparsight.visualisation import (
    Transforms,
    Visualisation,
    VisualisationSettings,
    visualize,
)

FAST = ("--steps", 2, "--views", 1, "--workers", 0, "--device", "cpu")


def say(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(each) for each in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_verb_writes_one_folder_per_latent_and_prints_the_ratio(
    run: Path, live: list[int], tmp_path: Path, capsys
) -> None:
    code, out, err = say(capsys, "visualize", run, live[0], live[1], "--out", tmp_path, *FAST)
    assert code == 0, err
    assert {each.name for each in tmp_path.iterdir()} == {f"{live[0]}-maco", f"{live[1]}-maco"}
    assert "ratio" in out and "rank" in out and "note" not in err


def test_a_latent_that_never_fired_is_visualized_with_a_note(
    run: Path, tmp_path: Path, capsys
) -> None:
    code, _, err = say(capsys, "visualize", run, 3, "--out", tmp_path, *FAST)
    assert code == 0, err
    assert "Latent 3 was never active on the 24 images of the index" in err
    assert not (tmp_path / "3-maco" / "real.png").exists()


def test_without_an_index_the_spectrum_is_assumed_and_a_note_says_so(
    run: Path, tmp_path: Path, capsys
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("index"))
    code, _, err = say(capsys, "visualize", bare, 5, *FAST)
    assert code == 0, err
    assert "The spectrum is assumed" in err and "No index" in err
    assert (bare / "visualisations" / "5-maco" / "0.png").exists()


def test_ctrl_c_says_which_latents_are_saved(
    calibration: VisionModel, sae: SparseAutoencoder, live: list[int], tmp_path: Path, monkeypatch
) -> None:
    settings = VisualisationSettings(steps=1, views=1)
    save = Visualisation.save

    def save_and_press(made: Visualisation, folder: str | Path) -> Path:
        if made.latent == live[1]:
            raise KeyboardInterrupt
        return save(made, folder)

    monkeypatch.setattr(Visualisation, "save", save_and_press)
    with pytest.raises(KeyboardInterrupt) as stop:
        visualize(calibration, sae, live[:3], settings=settings, out=tmp_path)
    assert stop.value.__notes__ == [f"1 of 3 latents are done, saved in {tmp_path}."]
    assert [each.name for each in tmp_path.iterdir()] == [f"{live[0]}-maco"]


def test_real_images_that_are_gone_are_a_note(
    calibration: VisionModel, sae: SparseAutoencoder, index: sp.LatentIndex, live: list[int]
) -> None:
    images = {**index.manifest["images"], "source": "/no/such/folder"}
    gone = dataclasses.replace(index, manifest={**index.manifest, "images": images})
    settings = VisualisationSettings(steps=1, views=1)
    (made,) = visualize(calibration, sae, live[0], index=gone, settings=settings)
    assert made.real is None and made.ratio is None
    assert made.statistics == "an assumed spectrum that falls with 1 / frequency"
    assert all("/no/such/folder" in note for note in made.notes) and len(made.notes) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("visualize",), "No SAE is given; name a run folder."),
        (("visualize", "RUN"), "No latent is given"),
        (("visualize", "RUN", "96"), "The SAE has no latent 96; it has 0 to 95."),
        (("visualize", "RUN", "unicorn"), "no latent is named 'unicorn'"),
        (("visualize", "RUN", "5", "--steps", "0"), "steps is 0"),
        (("visualize", "RUN", "5", "--transforms.crop", "0"), "transforms.crop is 0.0"),
        (("visualize", "RUN", "5", "--lr", "0"), "lr is 0"),
        (("visualize", "RUN", "5", "--recipe", "oil"), "--recipe"),
        (("visualize", "RUN", "5", "--model", "/no/such/model"), "/no/such/model"),
        (("visualize", "/no/such/run", "5"), "/no/such/run"),
    ],
)
def test_a_wrong_use_is_one_clear_line(
    arguments: tuple[str, ...], message: str, run: Path, capsys
) -> None:
    code, _, err = say(capsys, *[str(run) if each == "RUN" else each for each in arguments])
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_pool_cls_needs_a_cls_token(tiny) -> None:
    model = tiny("siglip")
    sae = SparseAutoencoder(32, metadata={"site": "blocks.0.resid_post", "tokens": "all"})
    settings = VisualisationSettings(steps=1, pool="cls")
    with pytest.raises(UserError, match="without CLS"):
        visualize(model, sae, 0, settings=settings)


def test_a_site_that_has_not_seen_the_image_is_one_clear_line(tiny) -> None:
    sae = SparseAutoencoder(32, metadata={"site": "blocks.0.resid_pre", "tokens": "cls"})
    with pytest.raises(UserError, match="do not depend on the image"):
        visualize(tiny("clip"), sae, 0, settings=VisualisationSettings(steps=1))


@pytest.mark.parametrize(
    ("site", "tokens"),
    [
        ("blocks.-1.mlp_post", "patches"),
        ("blocks.0.attn_out", "mean"),
        ("final_norm", "cls"),
        ("embedding", "all"),
    ],
)
def test_every_kind_of_site_and_token_can_be_visualized(site: str, tokens: str, tiny) -> None:
    model = tiny("clip")
    width = model.d_in(site)
    sae = SparseAutoencoder(width, metadata={"site": site, "tokens": tokens})
    settings = VisualisationSettings(steps=3, views=1, transforms=Transforms(rotate=0.0))
    (made,) = visualize(model, sae, 7, settings=settings)
    assert len(made.history) == 3 and made.images[0].size == (32, 32)
