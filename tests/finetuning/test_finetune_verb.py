"""`sparsight finetune` from the shell: the whole loop, and one clear message for each mistake."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sparsight.cli import main
from sparsight.finetuning import FinetuneRun

SMALL = ["--steps", "2", "--batch-size", "8", "--max-images", "24", "--workers", "0"]
SCENES = ["--data", "calibration:30:71", "--images", "calibration:24:74"]


@pytest.fixture
def photos(tmp_path):
    """Three grey images without labels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("one", "two", "three"):
        Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(folder / f"{name}.png")
    return folder


def finetune(*arguments, model="calibration"):
    return main(["finetune", model, *map(str, arguments)])


def test_the_whole_loop_on_the_calibration_clip(tmp_path, capsys):
    out = tmp_path / "run"
    assert finetune(*SCENES, "--test", "calibration:24:73:single", "--out", out, *SMALL) == 0
    printed = capsys.readouterr().out
    assert "accuracy, another class's name" in printed
    assert "Fine-tuning won back" in printed
    assert (out / "report.html").exists()
    assert (out / "sae" / "sae.safetensors").exists()
    found = json.loads((out / "before-after.json").read_text())
    assert found["n"] == 24
    assert "latents" in found
    run = FinetuneRun(out)
    assert run.is_finished
    assert not run.checkpoints.exists()


def test_without_a_test_set_some_images_are_held_out(tmp_path, capsys):
    out = tmp_path / "run"
    assert finetune(*SCENES[:2], "--out", out, *SMALL, "--no-latents") == 0
    recipe = FinetuneRun(out).recipe
    found = json.loads((out / "before-after.json").read_text())
    assert found["n"] >= 2
    assert "zero_shot" not in found
    assert recipe.attack != recipe.data
    capsys.readouterr()


def test_test_images_are_not_trained_on_even_if_named_as_data(tmp_path, capsys):
    scenes = "calibration:20:75:single"
    flags = ["--data", scenes, "--attack-on", scenes, "--no-latents", "--out", tmp_path / "run"]
    assert finetune(*flags, *SMALL) == 0
    assert "2 of 20 images are also among those to measure on" in capsys.readouterr().err
    told = fails(capsys, "--data", scenes, "--test", scenes, "--out", tmp_path / "other", *SMALL)
    assert "none are left to train on" in told


def fails(capsys, *arguments, model="calibration"):
    assert finetune(*arguments, model=model) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("sparsight: ")
    return told


def test_a_bad_pair_file_is_one_message(tmp_path, photos, capsys):
    (photos / "pairs.jsonl").write_text('{"file": "one.png", "caption": "a sun"}\n{"file": 3}\n')
    told = fails(capsys, "--data", photos / "pairs.jsonl", "--out", tmp_path / "run")
    assert "pairs.jsonl, line 2: has no caption field" in told
    assert not (tmp_path / "run").exists()


def test_a_missing_image_is_one_message(tmp_path, photos, capsys):
    (photos / "pairs.json").write_text('{"one.png": "a sun", "gone.png": "a cat"}')
    told = fails(capsys, "--data", photos / "pairs.json", "--out", tmp_path / "run")
    assert "1 of its 2 images" in told
    assert "gone.png" in told


def test_too_long_captions_are_one_message_and_no_run_begins(tmp_path, photos, capsys):
    long = " ".join(["sun"] * 40)
    (photos / "pairs.json").write_text(json.dumps({"one.png": long, "two.png": "a cat"}))
    told = fails(
        capsys, "--data", photos / "pairs.json", "--attack", "none", "--no-report",
        "--no-latents", "--out", tmp_path / "run", *SMALL,
    )  # fmt: skip
    assert "1 of 2 captions are longer than the 32 tokens" in told
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere/"], "nowhere"),
        (["--attack", "nowhere/"], "nowhere"),
        (["--sae", "nowhere/"], "nowhere"),
        (["--test", "nowhere/"], "nowhere"),
        (["--salience", "nowhere/"], "nowhere"),
        (["--first-block", "9", "--no-latents", *SMALL], "blocks 0 to 3"),
        (["--scaling.factor", "9", "--scaling.blocks", "7", "--no-latents", *SMALL], "no site"),
        (["--attack-share", "1.0", "--no-latents", *SMALL], "attack_share is 1.0"),
        (["--attack-share", "1.5"], "it must be a share"),
        (["--batch-size", "1"], "two pairs or more"),
        (["--layout", "open_clip", "--batch-size", "0"], "batch_size is 0"),
    ],
)
def test_a_mistake_is_one_message(tmp_path, capsys, arguments, message):
    defaults = [] if "--data" in arguments else SCENES
    defaults = [*defaults, "--test", "calibration:24:73:single"]
    if "--test" in arguments:
        defaults = defaults[:-2]
    assert message in fails(capsys, *defaults, *arguments, "--out", tmp_path / "run")


def test_images_without_labels_need_class_names(tmp_path, photos, capsys):
    (photos / "captions.csv").write_text("file,caption\none.png,a sun\ntwo.png,a cat\n")
    told = fails(capsys, "--data", photos, "--out", tmp_path / "run")
    assert "--attack-on" in told


def test_an_invalid_model_is_one_message(tmp_path, capsys):
    assert main(["finetune"]) == 2
    assert "name a CLIP" in capsys.readouterr().err
    assert "does not exist" in fails(capsys, "--data", "calibration:9", model="./nowhere")
    told = fails(capsys, "--out", tmp_path / "run", model="./nowhere")
    assert "nowhere" in told
