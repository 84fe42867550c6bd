"""`sparsight attack`: from words on scenes to a set on disk, and one message per mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsight.cli import main
from sparsight.images import open_images

SCENES = "calibration:16:990001:single"


def run(*arguments: str) -> int:
    return main(["attack", *arguments])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Neurons that respond to words, found on half of the scenes."""
    out = tmp_path_factory.mktemp("attack")
    flags = ["--model", "calibration", "--images", SCENES, "--neurons", "blocks.2.mlp_post"]
    flags += ["--selectivity", "0.5", "--draws", "2", "--workers", "0", "--out", str(out)]
    assert run("find", *flags) == 0
    return out / "blocks.2.mlp_post-neurons"


def test_help_lists_the_verbs_of_attack(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert all(f"\n  {verb} " in said for verb in ("measure", "find", "curate"))
    assert main(["--help"]) == 0
    assert "attack" in capsys.readouterr().out
    for verb in ("measure", "find", "curate"):
        assert run(verb, "--help") == 0
        assert "--images" in capsys.readouterr().out


def test_an_attack_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "attack.json"
    flags = ["--model", "calibration", "--images", SCENES, "--n", "6", "--workers", "0"]
    assert run("measure", *flags, "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "attacking word wins" in said and "control" in said
    figures = json.loads(out.read_text())
    assert figures["n"] == 6 and figures["pairs"]["style"]["kind"] == "WorldBand"


def test_a_style_replaces_the_worlds_band(tmp_path: Path) -> None:
    out = tmp_path / "attack.json"
    flags = ["--model", "calibration", "--images", SCENES, "--n", "4", "--workers", "0"]
    assert run("measure", *flags, "--style.size", "0.2", "--out", str(out)) == 0
    assert json.loads(out.read_text())["pairs"]["style"]["size"] == 0.2


def test_findings_are_saved_with_their_causal_check(found: Path) -> None:
    about = json.loads((found / "salience.json").read_text())
    assert about["n_pairs"] == 8 and about["contrast"] == "attack"
    assert about["n_found"] >= about["n_selective"] > 0
    causal = json.loads((found / "causal.json").read_text())
    assert causal["n"] == 8 and len(causal["random"]["draws"]) == 2


def test_found_latents_are_switched_off_on_other_images(
    found: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--images", "calibration:6:3:single", "--off", str(found), "--workers", "0"]
    assert run("measure", *flags, "--draws", "1") == 0
    told = capsys.readouterr()
    assert "random ×1" in told.out
    assert "were used to find" not in told.err
    assert run("measure", "--images", SCENES, *flags[2:], "--draws", "0") == 0
    assert "8 of these 16 images were used to find" in capsys.readouterr().err


def test_a_set_is_curated(found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    flags = [str(found), "--images", "calibration:20:7", "--n", "4", "--workers", "0"]
    assert run("curate", *flags, "--out", str(out)) == 0
    assert "4 of 20 images" in capsys.readouterr().out
    assert len(open_images(out)) == 4
    assert run("curate", *flags, "--out", str(out)) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["mesure"],
            "unknown verb 'mesure'; choose measure, find, curate. Did you mean 'measure'?",
        ),
        (["measure", "--images", SCENES], "The model is not known; name it with --model."),
        (["measure", "--model", "calibration", "--images", "nowhere/x"], "no such folder"),
        (
            ["measure", "--model", "calibration", "--images", SCENES, "--style.size", "2"],
            "size is 2.0",
        ),
        (["measure", "--images", SCENES, "--off", "nowhere"], "no such file"),
        (["find", "--images", SCENES], "Nothing to test"),
        (
            ["find", "--model", "calibration", "--images", SCENES, "--neurons", "blocks.9.mlp_pre"],
            "has no site 'blocks.9.mlp_pre'",
        ),
        (["find", "nowhere", "--images", SCENES], "nowhere"),
        (["curate", "nowhere", "--images", SCENES], "no such file"),
    ],
)
def test_each_mistake_gives_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
