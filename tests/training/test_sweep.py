from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import CONFIG, SITES, WALL_CLOCK, Stopped

from memory_activations import MemoryActivations, sparse_mixtures
from sparsight.config import load, write_toml
from sparsight.errors import SparsightError, UserError
from sparsight.interruption import Terminated
from sparsight.latents.run_files import find_runs
from sparsight.sae import AuxK, BatchTopK, GhostGradients, Resampling, SAEConfig, TopK
from sparsight.training import Run, Sweep, SweepConfig, TrainConfig, sweep, train
from sparsight.training.sweeping import SweepRecipe
from sparsight.training.trainer import SiteTraining

BASE = dataclasses.replace(CONFIG, ema=None)
GRID = {"k": [2, 4], "seed": [0, 1]}
NAMES = ["k2-seed0", "k2-seed1", "k4-seed0", "k4-seed1"]


def _sweep(out: Path, grid: dict[str, Any] = GRID, **options: Any) -> Sweep:
    options = {"quiet": True, **options}
    return sweep(sparse_mixtures(SITES), SweepConfig(BASE, grid), out, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Return the uninterrupted sweep."""
    return _sweep(tmp_path_factory.mktemp("whole") / "sweep")


def _lines(run: Run, site: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in run.metrics(site)]


def _assert_same(run: Run, other: Run) -> None:
    for site in run.sites:
        for name in ("sae.safetensors", "config.json"):
            mine, theirs = run.folder(site) / name, other.folder(site) / name
            assert mine.read_bytes() == theirs.read_bytes(), (run.out, site, name)
        assert _lines(run, site) == _lines(other, site)


def _written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_members_are_the_product_of_the_grid_and_the_sites(whole: Sweep) -> None:
    assert list(whole.runs) == NAMES
    folders = [whole.out / name / site for name in NAMES for site in SITES]
    assert find_runs(whole.out) == folders
    for name, run in whole.runs.items():
        for site in SITES:
            sae = run.sae(site)
            assert sae.config.sparsity.k == whole.settings[name]["sae.sparsity.k"]
            assert (sae.metadata["site"], sae.metadata["seed"]) == (
                site,
                whole.settings[name]["seed"],
            )


@pytest.mark.parametrize("name", NAMES)
def test_a_member_has_the_same_bits_as_the_configuration_trained_alone(
    name: str, whole: Sweep, tmp_path: Path
) -> None:
    member = whole.runs[name]
    alone = train(sparse_mixtures(SITES), member.config, out=tmp_path, quiet=True)
    _assert_same(member, alone)


def test_members_with_other_seeds_start_differently_and_see_the_same_order(whole: Sweep) -> None:
    configs = [whole.runs[name].config for name in NAMES]
    assert [each.order_seed for each in configs] == [0] * 4
    assert [each.seed for each in configs] == [0, 1, 0, 1]
    # With the base's own seed, the configuration is the same as that of a single run.
    sae = dataclasses.replace(BASE.sae, sparsity=TopK(k=2))
    assert configs[0] == dataclasses.replace(BASE, sae=sae)
    one, other = (whole.runs[name].sae("here").W_dec for name in NAMES[:2])
    assert not torch.equal(one, other)


def test_every_batch_is_read_once_whatever_the_number_of_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, read = sparse_mixtures(SITES), []
    stream = data.stream(SITES, 32)
    draw = type(stream).__next__
    monkeypatch.setattr(type(stream), "__next__", lambda self: read.append(1) or draw(self))
    sweep(data, SweepConfig(BASE, GRID), tmp_path, quiet=True)
    assert BASE.n_steps <= len(read) <= BASE.n_steps + 3


def test_a_finished_sweep_is_returned_as_it_is(whole: Sweep) -> None:
    before = _written(whole.out)
    assert _sweep(whole.out) == whole
    assert _written(whole.out) == before


@pytest.mark.parametrize("where", ["in a step", "in a checkpoint", "while it finishes"])
def test_a_killed_sweep_ends_with_the_same_bits_as_an_uninterrupted_one(
    where: str, tmp_path: Path, whole: Sweep
) -> None:
    script = Path(__file__).with_name("killed_run.py")
    command = [sys.executable, script, tmp_path, where, "sweep"]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("k*/*/sae.safetensors"))
    assert list((tmp_path / "checkpoints").iterdir())
    again = _sweep(tmp_path)
    for name in NAMES:
        _assert_same(again.runs[name], whole.runs[name])
    assert not (tmp_path / "checkpoints").exists()


def _stop(*_: object) -> None:
    raise Stopped


def _interrupt(out: Path, monkeypatch: pytest.MonkeyPatch, grid: dict[str, Any] = GRID) -> None:
    step = SiteTraining.step

    def step_or_stop(self, x, number, factor, target) -> None:
        if number == 21:
            raise Stopped
        step(self, x, number, factor, target)

    with monkeypatch.context() as patch:
        patch.setattr(SiteTraining, "step", step_or_stop)
        with pytest.raises(Stopped):
            _sweep(out, grid)


def test_new_members_of_a_larger_grid_train_in_one_new_pass(
    tmp_path: Path, whole: Sweep, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    _interrupt(tmp_path, monkeypatch, {"k": [4], "seed": [0]})
    again = _sweep(tmp_path, quiet=False)
    told = capsys.readouterr().err
    assert "0 of 8 autoencoders are done, 8 are missing; 2 continue from a" in told
    assert "2 of 8 autoencoders are done, 6 are missing." in told
    for name in NAMES:
        _assert_same(again.runs[name], whole.runs[name])


def test_a_sweep_that_is_killed_while_it_finishes_trains_only_missing_members(
    tmp_path: Path, whole: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        finished, done = SiteTraining.finished, []

        def finished_or_stop(self):
            if len(done) == 3:
                raise Stopped
            done.append(1)
            return finished(self)

        patch.setattr(SiteTraining, "finished", finished_or_stop)
        with pytest.raises(Stopped):
            _sweep(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("sae.safetensors")
              if "checkpoints" not in path.parts}  # fmt: skip
    assert len(before) == 3
    again = _sweep(tmp_path)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    for name in NAMES:
        _assert_same(again.runs[name], whole.runs[name])


@pytest.mark.parametrize("other", [{"k": [8]}, {"k": [4], "seed": [0, 1]}])
def test_an_interrupted_sweep_does_not_lose_its_checkpoint_to_another_grid(
    other: dict[str, Any], tmp_path: Path, whole: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(tmp_path, monkeypatch)
    before = _written(tmp_path)
    with pytest.raises(
        UserError, match=r"interrupted sweep, with k2-seed0/here, .*Finish it first"
    ):
        _sweep(tmp_path, other)
    assert _written(tmp_path).keys() == before.keys()
    again = _sweep(tmp_path)
    for name in NAMES:
        _assert_same(again.runs[name], whole.runs[name])


def test_checkpoints_of_finished_members_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsight.training import sweeping

    with monkeypatch.context() as patch:
        patch.setattr(sweeping.shutil, "rmtree", lambda path, ignore_errors=False: None)
        with pytest.raises(Stopped), monkeypatch.context() as late:
            late.setattr(sweeping, "_settled", _stop)
            _sweep(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir())
    _sweep(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_member_keeps_its_folder_if_the_grid_gets_another_key(tmp_path: Path) -> None:
    first = _sweep(tmp_path, {"k": [2, 4]}, sites=["here"])
    before = {run.folder() / "sae.safetensors" for run in first.runs.values()}
    stamps = {path: path.stat().st_mtime_ns for path in before}
    second = _sweep(tmp_path, {"k": [2, 4], "lr": [3e-3, 1e-3]}, sites=["here"])
    assert list(second.runs) == ["k2", "k2-lr0.001", "k4", "k4-lr0.001"]
    assert {path: path.stat().st_mtime_ns for path in before} == stamps
    assert all(run.sae() for run in second.runs.values())
    row = json.loads((tmp_path / "sweep.json").read_text())["members"][1]
    assert row["settings"] == {"sae.sparsity.k": 2, "lr": 0.001} and row["folder"] == "k2-lr0.001"


def test_the_table_holds_the_last_metrics_of_every_member(whole: Sweep) -> None:
    rows = json.loads((whole.out / "sweep.json").read_text())["members"]
    assert rows == whole.table() and len(rows) == 8
    for row in rows:
        (last,) = whole.runs[row["name"]].metrics(row["site"])[-1:]
        assert row["fvu"] == last["fvu"] and row["vectors_per_second"] > 0
        assert row["folder"] == f"{row['name']}/{row['site']}"


def test_a_sweep_s_recipe_is_complete(whole: Sweep) -> None:
    recipe = load(SweepRecipe, whole.out / "sweep.toml")
    assert SweepConfig(recipe.train, recipe.grid) == SweepConfig(BASE, GRID)
    assert recipe.sites == SITES


def test_a_member_that_diverges_is_dropped_and_the_others_continue(tmp_path: Path) -> None:
    data = sparse_mixtures()
    config = SweepConfig(dataclasses.replace(BASE, warmup=0), {"lr": [3e-3, 1e30]})
    with pytest.warns(
        UserWarning, match=r"lr1e\+30/here became infinite or NaN .* others continue"
    ):
        found = sweep(data, config, tmp_path, quiet=True)
    good, bad = found.table()
    assert good["fvu"] < 1 and "became infinite or NaN" in bad["diverged"]
    assert not (tmp_path / "lr1e+30" / "sae.safetensors").exists()
    before = _written(tmp_path)
    assert sweep(data, config, tmp_path, quiet=True) == found  # nor is it tried again
    assert _written(tmp_path) == before


@pytest.mark.filterwarnings("ignore:.*became infinite or NaN")
def test_a_sweep_in_which_every_member_diverges_is_a_fault(tmp_path: Path) -> None:
    config = SweepConfig(dataclasses.replace(BASE, warmup=0), {"lr": [1e29, 1e30]})
    for _ in range(2):
        with pytest.raises(SparsightError, match="every autoencoder of the sweep diverged"):
            sweep(sparse_mixtures(), config, tmp_path, quiet=True)


def test_infinite_or_nan_activations_stop_the_sweep(tmp_path: Path) -> None:
    data = sparse_mixtures()
    data.activations["here"][3, 3, 3] = torch.nan
    with pytest.raises(SparsightError, match="activations at k2-seed0/here became infinite or NaN"):
        sweep(data, SweepConfig(BASE, GRID), tmp_path, quiet=True)


def test_schedules_and_remedies_may_vary(tmp_path: Path) -> None:
    grid = {"warmup": [0.0, 0.5], "remedy": {"alpha": [0.1]}, "ema": [None, 0.9]}
    found = _sweep(tmp_path, grid, sites=["here"])
    assert list(found.runs)[:2] == ["warmup0.0-alpha0.1-ema_none", "warmup0.0-alpha0.1-ema0.9"]
    for number, run in enumerate(found.runs.values()):
        alone = train(sparse_mixtures(), run.config, out=tmp_path / f"alone{number}", quiet=True)
        _assert_same(run, alone)


def test_whole_parts_may_vary_and_appear_in_the_names_of_members() -> None:
    grid = {
        "architecture": ["topk", {"kind": "batchtopk", "k": 4}, TopK(k=3)],
        "remedy": ["none", {"alpha": 0.1}, AuxK(alpha=0.5, k=7)],
    }
    config = SweepConfig(BASE, grid)
    assert list(config.members) == [
        "topk-remedy_none", "topk-auxk_alpha0.1", "topk-auxk_alpha0.5_k7",
        "batchtopk_k4-remedy_none", "batchtopk_k4-auxk_alpha0.1", "batchtopk_k4-auxk_alpha0.5_k7",
        "topk_k3-remedy_none", "topk_k3-auxk_alpha0.1", "topk_k3-auxk_alpha0.5_k7",
    ]  # fmt: skip
    setting, train_config = config.members["batchtopk_k4-auxk_alpha0.1"]
    assert setting["sae.sparsity"] == {"kind": "batchtopk", "k": 4}
    assert train_config.sae.sparsity == BatchTopK(k=4) and train_config.remedy == AuxK(alpha=0.1)
    assert config.members["topk_k3-remedy_none"][1].remedy is None


def test_a_key_inside_a_part_applies_to_the_members_that_have_it() -> None:
    grid = {"remedy": ["none", {}], "remedy.alpha": [0.1, 0.2], "k": [2, 4]}
    names = list(SweepConfig(BASE, grid).members)
    assert names == [
        "remedy_none-k2", "remedy_none-k4",
        "auxk-alpha0.1-k2", "auxk-alpha0.1-k4", "auxk-alpha0.2-k2", "auxk-alpha0.2-k4",
    ]  # fmt: skip
    of_kinds = SweepConfig(BASE, {"architecture": ["topk", "batchtopk"], "k": [2, 4]})
    sparsity = {name: each.sae.sparsity for name, (_, each) in of_kinds.members.items()}
    assert sparsity["batchtopk-k4"] == BatchTopK(k=4) and sparsity["topk-k2"] == TopK(k=2)


def test_a_member_has_one_remedy_at_most() -> None:
    config = SweepConfig(BASE, {"remedy": ["none", "auxk", {"kind": "auxk", "alpha": 0.1}]})
    # A plain name means the base's own remedy; a table means exactly what it says.
    assert list(config.members) == ["remedy_none", "auxk_dead_after96", "auxk_alpha0.1"]
    assert [each.remedy for _, each in config.members.values()] == [
        None, BASE.remedy, AuxK(alpha=0.1),
    ]  # fmt: skip


def test_k_varies_only_for_the_architectures_that_have_it() -> None:
    grid = {"architecture": ["topk", {"kind": "relu", "l1": 1e-3}], "k": [2, 4]}
    members = SweepConfig(BASE, grid).members
    assert list(members) == ["topk-k2", "topk-k4", "relu_l1_0.001"]
    assert members["relu_l1_0.001"][0] == {"sae.sparsity": {"kind": "relu", "l1": 1e-3}}


def test_every_remedy_may_be_named_by_its_word_or_its_kind() -> None:
    base = dataclasses.replace(BASE, remedy=AuxK(alpha=0.3))
    remedies = ["none", "auxk", "ghost", {"kind": "resampling", "times": 2}, GhostGradients(5)]
    members = SweepConfig(base, {"remedy": remedies}).members
    assert list(members) == [
        "remedy_none", "auxk_alpha0.3", "ghostgradients", "resampling_times2",
        "ghostgradients_dead_after5",
    ]  # fmt: skip
    assert [each.remedy for _, each in members.values()] == [
        None, AuxK(alpha=0.3), GhostGradients(), Resampling(times=2), GhostGradients(dead_after=5),
    ]  # fmt: skip


def test_transcoders_may_be_swept(tmp_path: Path) -> None:
    base = dataclasses.replace(BASE, sae=dataclasses.replace(BASE.sae, subtract_b_dec=False))
    config = SweepConfig(dataclasses.replace(base, target_site="there"), {"k": [2, 4]})
    found = sweep(sparse_mixtures(SITES), config, tmp_path / "sweep", quiet=True)
    run = found.runs["k4"]
    assert run.sites == ("here",) and run.sae().metadata["target_site"] == "there"
    alone = train(sparse_mixtures(SITES), run.config, out=tmp_path / "alone", quiet=True)
    _assert_same(run, alone)
    with pytest.raises(UserError, match="target_site cannot vary"):
        SweepConfig(base, {"target_site": ["here", "there"]})


def test_members_with_varying_parts_survive_toml_and_train_to_the_same_bits_as_alone(
    tmp_path: Path,
) -> None:
    grid = {"architecture": [{"kind": "topk", "k": 2}, BatchTopK(k=4)], "remedy": ["none", "auxk"]}
    found = _sweep(tmp_path, grid, sites=["here"])
    recipe = load(SweepRecipe, tmp_path / "sweep.toml")
    assert SweepConfig(recipe.train, recipe.grid) == SweepConfig(BASE, grid)
    for number, run in enumerate(found.runs.values()):
        alone = train(sparse_mixtures(), run.config, out=tmp_path / f"alone{number}", quiet=True)
        _assert_same(run, alone)


class Positions(MemoryActivations):
    """Activations that return views of some of their positions."""

    def with_tokens(self, tokens: str) -> MemoryActivations:
        chosen = {"cls": slice(0, 1), "patches": slice(1, None)}[tokens]
        view = MemoryActivations({site: x[:, chosen] for site, x in self.activations.items()})
        view.tokens = tokens
        return view


def test_each_choice_of_positions_and_each_batch_size_has_its_own_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    data = Positions(sparse_mixtures().activations)
    grid = {"tokens": ["cls", "patches"], "batch_size": [32, 64], "k": [2, 4]}
    config = SweepConfig(BASE, grid)
    names = ["cls-batch_size32-k2", "cls-batch_size32-k4", "cls-batch_size64-k2"]
    assert list(config.members)[:3] == names and len(config.members) == 8
    with pytest.raises(UserError, match="tokens vary in the grid"):
        sweep(data, config, tmp_path, tokens="cls", quiet=True)
    step, calls = SiteTraining.step, []

    def step_or_stop(self, x, number, factor, target) -> None:
        calls.append(number)
        if len(calls) == 3 * BASE.n_steps:
            raise Stopped
        step(self, x, number, factor, target)

    with monkeypatch.context() as patch:
        patch.setattr(SiteTraining, "step", step_or_stop)
        with pytest.raises(Stopped):
            sweep(data, config, tmp_path, quiet=True)
    capsys.readouterr()
    found = sweep(data, config, tmp_path)
    assert "2 of 8 autoencoders are done, 6 are missing" in capsys.readouterr().err
    for number, (name, run) in enumerate(found.runs.items()):
        view = data.with_tokens(name.partition("-")[0])
        alone = train(view, run.config, out=tmp_path / f"alone{number}", quiet=True)
        _assert_same(run, alone)
        assert run.recipe.tokens == view.tokens == run.sae().metadata["tokens"]
    recipe = load(SweepRecipe, tmp_path / "sweep.toml")
    assert recipe.tokens is None and SweepConfig(recipe.train, recipe.grid) == config


def test_positions_that_the_activations_do_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokens is 'cls', but the activations are of 'all'"):
        _sweep(tmp_path, {"tokens": ["all", "cls"]})


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "grid is empty"),
        ({"k": []}, "k is an empty list"),
        ({"k": 3}, "k is 3; expected a list"),
        ({"k": [2, 2]}, "k lists 2 twice"),
        ({"lr": [1, 1.0]}, r"lr lists 1\.0 twice"),
        ({"k": [2], "sae": {"sparsity": {"k": [4]}}}, r"sae\.sparsity\.k is named twice"),
        (
            {"sparsity": [2]},
            r"unknown key .sparsity.\. .*These keys can vary: architecture, .*, kernels,",
        ),
        ({"n_latent": [2]}, "unknown key 'n_latent'. Did you mean 'n_latents'"),
        ({"sae": [{}]}, "unknown key 'sae'"),
        ({"architecture": ["topkk"]}, r"sae\.sparsity\.kind is 'topkk'; expected 'topk' or"),
        ({"architecture": ["topk", {"k": 32}]}, r"architecture lists {'k': 32} twice"),
        ({"architecture": [{"k": "x"}]}, r"sae\.sparsity\.k is 'x'; expected an int"),
        ({"architecture": "topk"}, "architecture is 'topk'; expected a list"),
        ({"remedy": [None, "none"]}, "remedy lists 'none' twice"),
        ({"remedy": ["none", "ax"]}, r"remedy\.kind is 'ax'; expected 'none' or 'auxk'"),
        ({"remedy": ["none"], "auxk": ["none"]}, "auxk and remedy cannot vary together"),
        ({"auxk": ["none"], "ghost": [{}]}, "auxk and ghost cannot vary together"),
        ({"tokens": ["cls", "heads"]}, "tokens is 'heads'; expected 'all' or"),
        ({"n_vectors": [2]}, "n_vectors cannot vary .* its length"),
        ({"data_seed": [2]}, "data_seed cannot vary .* the order of the data"),
        ({"checkpoint_every": [64]}, "checkpoint_every cannot vary"),
        ({"sae.expansion": [2, 4]}, "no effect if n_latents is given"),
        ({"k": ["many"]}, r"grid, k_many: sae\.sparsity\.k is 'many'; expected an int"),
        ({"k": [65]}, "grid, k65: sparsity.k is 65, but there are only 64 latents"),
        ({"seed": [-1]}, "grid, seed-1: seed is -1"),
    ],
)
def test_an_invalid_grid_is_refused_with_the_reason(grid: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SweepConfig(BASE, grid)


def test_a_key_of_a_part_that_is_switched_off_is_refused() -> None:
    with pytest.raises(UserError, match=r"remedy\.alpha cannot vary while remedy is none"):
        SweepConfig(dataclasses.replace(BASE, remedy=None), {"remedy.alpha": [0.1]})


def test_values_may_fit_together_that_do_not_fit_alone() -> None:
    config = SweepConfig(TrainConfig(sae=SAEConfig(n_latents=16, sparsity=TopK(k=8))),
                         {"k": [64], "n_latents": [64, 128]})  # fmt: skip
    assert list(config.members) == ["k64-n64", "k64-n128"]


def test_other_configurations_and_single_runs_in_the_folder_are_refused(
    whole: Sweep, tmp_path: Path
) -> None:
    data = sparse_mixtures(SITES)
    other = SweepConfig(dataclasses.replace(BASE, warmup=0.1), GRID)
    with pytest.raises(UserError, match=r"k2-seed0.* differs in 'train\.warmup'"):
        sweep(data, other, whole.out, quiet=True)
    with pytest.raises(UserError, match="belongs to a run on here, there"):
        _sweep(whole.out, sites=["here"])
    with pytest.raises(UserError, match="already holds a sweep"):
        _sweep(whole.out, resume=False)
    with pytest.raises(UserError, match=r"holds a sweep\. Choose"):
        train(data, BASE, out=whole.out, quiet=True)
    train(data, BASE, out=tmp_path, quiet=True)
    with pytest.raises(UserError, match="holds a single run"):
        _sweep(tmp_path)


def test_a_width_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = dataclasses.replace(BASE, sae=SAEConfig(expansion=2))
    with pytest.raises(UserError, match=r"sparsity\.k is 33, but there are only 32 latents"):
        sweep(sparse_mixtures(), SweepConfig(base, {"k": [4, 33]}), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_recipe_with_a_grid_is_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(
        'store = "acts"\n[train]\nlr = 1e-3\n[train.remedy]\nalpha = 0.1\n'
        '[grid]\nk = [16, 32]\nsae.expansion = [4, 8]\n"remedy.alpha" = [0.1, 0.5]\n'
    )
    recipe = load(SweepRecipe, path)
    config = SweepConfig(recipe.train, recipe.grid)
    assert len(config.members) == 8 and "k16-expansion4-alpha0.5" in config.members
    write_toml(tmp_path / "again.toml", dataclasses.replace(recipe, grid=config.grid))
    again = load(SweepRecipe, tmp_path / "again.toml")
    assert SweepConfig(again.train, again.grid) == config


def test_the_shipped_recipe_is_a_sweep() -> None:
    recipe = load(SweepRecipe, Path(__file__).parents[2] / "recipes" / "sweep.toml")
    config = SweepConfig(recipe.train, recipe.grid)
    assert len(config.members) > 1


def test_other_activations_are_refused(whole: Sweep) -> None:
    other = MemoryActivations({s: x + 1 for s, x in sparse_mixtures(SITES).activations.items()})
    with pytest.raises(UserError, match="belongs to a run on other activations"):
        sweep(other, SweepConfig(BASE, GRID), whole.out, quiet=True)


def test_a_stopped_sweep_says_what_is_kept_and_ends_with_the_same_bits(
    tmp_path: Path, whole: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, stopped_at = SiteTraining.step, [21]

    def step_then_stop(self, x, number, factor, target) -> None:
        step(self, x, number, factor, target)
        if number in stopped_at:
            stopped_at.clear()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SiteTraining, "step", step_then_stop)
    with pytest.raises(Terminated) as stopped:
        _sweep(tmp_path)
    assert stopped.value.__notes__ == ["Kept 704 of 1,280 vectors; the same command goes on."]
    again = _sweep(tmp_path)
    for name in NAMES:
        _assert_same(again.runs[name], whole.runs[name])


def test_leftovers_and_damaged_files_of_a_sweep_are_repaired(whole: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    shutil.copytree(whole.out, out)
    table = (out / "sweep.json").read_bytes()
    (out / "sweep.json").write_bytes(table[:-30])
    (out / "plots").mkdir()
    left = ".lock", ".sweep.json.x.tmp", "k2-seed0/here/.sae.safetensors.x.tmp", "plots/.a.svg.tmp"
    for place in left:
        (out / place).write_text("half")
    (out / "checkpoints" / "000000016").mkdir(parents=True)  # half removed
    assert _sweep(out).table() == whole.table()
    assert (out / "sweep.json").read_bytes() == table
    assert not list(out.rglob(".*")) and not (out / "checkpoints").exists()


def test_images_may_be_kept_out_of_a_sweep(tmp_path: Path) -> None:
    data = sparse_mixtures(SITES)
    with pytest.raises(UserError, match="held_out: these activations cannot be split"):
        sweep(data, SweepConfig(BASE, GRID), tmp_path, held_out=0.1, quiet=True)
