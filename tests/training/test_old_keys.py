"""Configurations of the previous version, which had one key per remedy, are still read."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from test_resume import Stopped

import sparsight
from memory_activations import sparse_mixtures
from sparsight.cli import main
from sparsight.config import from_dict
from sparsight.errors import UserError
from sparsight.files import sha256_json
from sparsight.sae import AuxK, GhostGradients, Resampling, SAEConfig, TopK
from sparsight.training import SweepConfig, TrainConfig, train
from sparsight.training.config import stored_recipe
from sparsight.training.old_keys import OLD_REMEDIES, remedies_in

VERSIONS = ("format_version", "checksum")
"""Keys that the checksum of a checkpoint does not cover."""

BASE = TrainConfig(
    sae=SAEConfig(48, sparsity=TopK(8)),
    n_vectors=32 * 24,
    batch_size=32,
    lr=3e-3,
    checkpoint_every=32 * 8,
)


@pytest.mark.parametrize(
    ("old", "remedy"),
    [
        ({"auxk": "none"}, None),
        ({"auxk": {"alpha": 0.5}}, AuxK(alpha=0.5)),
        ({"auxk": "none", "ghost": {"dead_after": 5}}, GhostGradients(5)),
        ({"auxk": "none", "ghost": "none", "resampling": {"times": 2}}, Resampling(times=2)),
        ({"ghost": "none"}, AuxK()),
    ],
)
def test_old_keys_are_read_with_a_warning_that_names_the_new_key(
    old: dict[str, Any], remedy: Any
) -> None:
    with pytest.warns(FutureWarning, match="run.toml: .*now write remedy = "):
        assert from_dict(TrainConfig, old, "run.toml").remedy == remedy


def test_an_old_remedy_key_warns_that_the_default_remedy_is_off() -> None:
    with pytest.warns(FutureWarning, match="AuxK, formerly on by default, is now off"):
        assert from_dict(TrainConfig, {"ghost": {}}).remedy == GhostGradients()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"auxk": {}, "ghost": {}}, "run.toml: auxk and ghost are two remedies .* keep one"),
        (
            {"auxk": {}, "remedy": "ghost"},
            "run.toml: auxk is the old name of remedy; give only one",
        ),
        ({"remedy": "prayer"}, "run.toml: remedy is 'prayer'"),
        ({"remedy": {"kind": "ax"}}, "remedy.kind is 'ax'; expected 'none' or 'auxk' or 'ghost'"),
    ],
)
def test_two_remedies_and_unknown_ones_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(TrainConfig, values, "run.toml")


def test_a_remedy_may_be_given_by_word_or_kind_or_table() -> None:
    tables = ("ghost", "ghostgradients", {"kind": "ghost"}, {"kind": "ghostgradients"})
    made = [from_dict(TrainConfig, {"remedy": each}).remedy for each in tables]
    assert made == [GhostGradients()] * 4


def test_old_keywords_are_read_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match=r"auxk: now write remedy = AuxK\(alpha=0.5"):
        assert TrainConfig(auxk=AuxK(alpha=0.5)) == TrainConfig(remedy=AuxK(alpha=0.5))  # type: ignore[call-arg]
    with pytest.warns(FutureWarning):
        assert dataclasses.replace(BASE, auxk=None).remedy is None  # type: ignore[call-arg]
    ghosts = dataclasses.replace(BASE, remedy=GhostGradients())
    with pytest.warns(FutureWarning):
        assert dataclasses.replace(ghosts, auxk=None).remedy == GhostGradients()  # type: ignore[call-arg]
    with pytest.raises(UserError, match="auxk and ghost are two remedies"):
        TrainConfig(auxk=AuxK(), ghost=GhostGradients())  # type: ignore[call-arg]


def test_an_old_grid_gives_the_same_members_as_a_new_one() -> None:
    grid = {"auxk": ["none", {}], "auxk.alpha": [0.1, 0.2]}
    with pytest.warns(FutureWarning, match="auxk is now called remedy"):
        members = SweepConfig(BASE, grid).members
    assert list(members) == ["remedy_none", "auxk-alpha0.1", "auxk-alpha0.2"]
    assert members["auxk-alpha0.2"][1].remedy == AuxK(alpha=0.2)


def test_the_report_knows_the_remedies_of_every_version() -> None:
    assert remedies_in({"remedy": {"kind": "ghostgradients"}}) == [GhostGradients]
    assert remedies_in({"auxk": {"alpha": 0.1}, "resampling": {}}) == [AuxK, Resampling]
    assert remedies_in({"auxk": "none"}) == remedies_in({"remedy": "none"}) == []


def _as_before(train_table: dict[str, Any]) -> dict[str, Any]:
    """Return a training table as the previous version wrote it."""
    remedy = train_table.pop("remedy")
    found = {**train_table, "auxk": "none"}
    if remedy != "none":
        old = next(o for o, kind in OLD_REMEDIES.items() if kind.__name__.lower() == remedy["kind"])
        found[old] = remedy
    return found


@pytest.mark.parametrize(
    "remedy",
    [AuxK(dead_after=96), GhostGradients(dead_after=96), Resampling(every=32 * 8, times=2), None],
    ids=["auxk", "ghost", "resampling", "none"],
)
def test_a_run_folder_of_an_earlier_version_continues_with_the_same_bits(
    remedy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsight.training import trainer

    config, data = dataclasses.replace(BASE, remedy=remedy), sparse_mixtures()
    whole = train(data, config, tmp_path / "whole", quiet=True)
    step = trainer.SiteTraining.step

    def step_or_stop(self, x, number, factor, target) -> None:
        if number == 21:
            raise Stopped
        step(self, x, number, factor, target)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.SiteTraining, "step", step_or_stop)
        with pytest.raises(Stopped):
            train(data, config, tmp_path / "cut", quiet=True)
    path = tmp_path / "cut" / "config.toml"
    recipe = tomllib.loads(path.read_text())
    path.write_text(tomli_w.dumps({**recipe, "train": _as_before(recipe["train"])}))
    for path in (tmp_path / "cut" / "checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())
        for run in state["runs"].values():
            run["train"] = _as_before(run["train"])
        plain = {key: each for key, each in state.items() if key not in VERSIONS}
        path.write_text(json.dumps({**state, "checksum": sha256_json(plain)}))
    begun = trainer.checkpoint.newest_step(tmp_path / "cut" / "checkpoints")
    again = train(data, config, tmp_path / "cut", quiet=True)
    assert begun == 16
    assert again.sae().fingerprint() == whole.sae().fingerprint()
    assert "remedy" in (tmp_path / "cut" / "config.toml").read_text()


def test_old_flags_are_read_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(FutureWarning, match="--auxk.alpha is now called --remedy.alpha"):
        assert main(["train", "--auxk.alpha", "0.5", "--store", "/nowhere"]) != 0
    assert "/nowhere" in capsys.readouterr().err
    assert main(["train", "--ghost.dead-after=5", "--store", "/nowhere"]) == 2
    assert "write --remedy ghost --remedy.dead-after" in capsys.readouterr().err


def test_an_old_flag_beside_the_new_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--auxk.alpha", "0.5", "--remedy.alpha", "0.25"]
    assert main(["train", *flags, "--store", "/nowhere"]) == 2
    assert (
        "--auxk.alpha is the old name of --remedy.alpha; give only one" in capsys.readouterr().err
    )


def test_a_warning_about_an_old_keyword_points_at_code_outside_the_package() -> None:
    with pytest.warns(FutureWarning) as warned:
        TrainConfig(ghost=GhostGradients())  # type: ignore[call-arg]
    assert Path(sparsight.__path__[0]) not in Path(warned[0].filename).parents


def test_the_former_fields_can_still_be_read_and_others_are_unknown() -> None:
    config = TrainConfig(remedy=GhostGradients(5))
    with pytest.warns(FutureWarning, match="TrainConfig.ghost is now TrainConfig.remedy"):
        assert config.ghost == GhostGradients(5)  # type: ignore[attr-defined]
    with pytest.warns(FutureWarning):
        assert config.auxk is None  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        config.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_a_run_folder_with_old_keys_is_read_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('sites = ["a"]\n[train.auxk]\nalpha = 0.5\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stored_recipe(tmp_path / "config.toml").train.remedy == AuxK(alpha=0.5)
