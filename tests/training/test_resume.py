from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memory_activations import sparse_mixtures
from sparsight.errors import SparsightError, UserError
from sparsight.sae import AuxK, SAEConfig, SparseAutoencoder, TopK
from sparsight.training import Run, TrainConfig, checkpoint, train

SITES = ("here", "there")
CONFIG = TrainConfig(
    sae=SAEConfig(n_latents=64, sparsity=TopK(k=4)),
    n_vectors=32 * 40,
    batch_size=32,
    lr=3e-3,
    remedy=AuxK(dead_after=96),
    ema=0.9,
    log_every=32 * 3,
    checkpoint_every=32 * 8,
)
WALL_CLOCK = {"vectors_per_second"}


class Stopped(Exception):
    """Raised by a test to interrupt training."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return the uninterrupted run."""
    return train(sparse_mixtures(SITES), CONFIG, out=tmp_path_factory.mktemp("whole"), quiet=True)


def _interrupt(
    out: Path, monkeypatch: pytest.MonkeyPatch, at: int = 21, config: TrainConfig = CONFIG
) -> None:
    """Train up to step `at`; there are then two checkpoints, of steps 8 and 16."""
    from sparsight.training import trainer

    step = trainer.SiteTraining.step

    def step_or_stop(self, x, number, factor, target) -> None:
        if number == at:
            raise Stopped
        step(self, x, number, factor, target)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.SiteTraining, "step", step_or_stop)
        with pytest.raises(Stopped):
            train(sparse_mixtures(SITES), config, out=out, quiet=True)


def _resume(out: Path) -> Run:
    return train(sparse_mixtures(SITES), CONFIG, out=out, quiet=True)


def _assert_same(run: Run, other: Run) -> None:
    for site in SITES:
        for name in ("sae.safetensors", "config.json"):
            mine, theirs = run.folder(site) / name, other.folder(site) / name
            assert mine.read_bytes() == theirs.read_bytes(), (site, name)
        strip = [
            [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in each.metrics(site)]
            for each in (run, other)
        ]
        assert strip[0] == strip[1]


@pytest.mark.parametrize("where", ["in a step", "in a checkpoint", "while it finishes"])
def test_a_killed_run_ends_with_the_same_bits_as_an_uninterrupted_one(
    where: str, tmp_path: Path, whole: Run
) -> None:
    script = Path(__file__).with_name("killed_run.py")
    killed = subprocess.run([sys.executable, script, tmp_path, where], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "here" / "sae.safetensors").exists()
    _assert_same(_resume(tmp_path), whole)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_dead_latents_are_revived_during_the_run(whole: Run) -> None:
    """Otherwise the runs resumed above would not include AuxK."""
    assert max(line["aux_loss"] for line in whole.metrics("here")) > 0


def test_the_last_two_checkpoints_are_kept_and_load_as_saes(whole: Run) -> None:
    kept = sorted(path.name for path in whole.checkpoints.iterdir())
    assert kept == ["000000024", "000000032"]
    sae = SparseAutoencoder.from_pretrained(whole.checkpoints / kept[-1] / "there")
    assert sae.n_latents == 64 and sae.metadata["site"] == "there"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_text("{}")


DAMAGE = [
    ("here/training.safetensors", _cut),
    ("there/sae.safetensors", _flip),
    ("state.json", _cut),
    ("state.json", _empty),
    ("there/training.safetensors", Path.unlink),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(
    file: str, damage, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(tmp_path, monkeypatch)
    damage(tmp_path / "checkpoints" / "000000016" / file)
    with pytest.warns(UserWarning, match=f"damaged checkpoint: .*000000016/{file}"):
        run = _resume(tmp_path)
    _assert_same(run, whole)


def test_without_an_intact_checkpoint_an_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(tmp_path, monkeypatch)
    for path in (tmp_path / "checkpoints").iterdir():
        _cut(path / "here" / "training.safetensors")
    with pytest.raises(SparsightError, match=r"no checkpoint is intact.*Remove the folder"):
        _resume(tmp_path)


def test_a_checkpoint_of_another_version_is_refused_and_left_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continuing from the previous one would lose work that a newer Sparsight did."""
    _interrupt(tmp_path, monkeypatch)
    state = tmp_path / "checkpoints" / "000000016" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format_version": 2}))
    with pytest.raises(UserError, match=r"000000016/state\.json: format_version is 2; .* reads 1"):
        _resume(tmp_path)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["000000008", "000000016"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not have these locks")
def test_two_processes_do_not_train_into_one_folder(tmp_path: Path, whole: Run) -> None:
    script = Path(__file__).with_name("killed_run.py")
    command = [sys.executable, script, tmp_path, "waits in a step"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"waits\n"
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises(UserError, match="another process is training into it"):
            _resume(tmp_path)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        other.kill()
    _assert_same(_resume(tmp_path), whole)
    assert not (tmp_path / ".lock").exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(
    tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors = checkpoint.write_safetensors

    def full_disk(tensors, path: Path) -> None:
        if "000000016" in str(path):
            raise SparsightError(f"{path}: could not be written (No space left on device).")
        write_safetensors(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_safetensors", full_disk)
        with pytest.raises(SparsightError, match=r"checkpoint could not be written.*No space left"):
            _resume(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000008"]
    _assert_same(_resume(tmp_path), whole)


def test_a_finished_run_is_returned_as_it_is(whole: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.out.rglob("*")}
    again = _resume(whole.out)
    assert again == whole
    assert {path: path.stat().st_mtime_ns for path in whole.out.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lr": 1e-3}, "train.lr"),
        ({"remedy": None}, "train.remedy"),
        ({"sae": SAEConfig(n_latents=64, sparsity=TopK(k=5))}, "train.sae.sparsity.k"),
    ],
)
def test_a_folder_with_another_run_is_refused_and_the_difference_is_named(
    changes: dict, field: str, whole: Run
) -> None:
    with pytest.raises(UserError, match=f"differs in '{field}'"):
        train(
            sparse_mixtures(SITES),
            dataclasses.replace(CONFIG, **changes),
            out=whole.out,
            quiet=True,
        )


def test_without_resume_a_run_is_not_touched(whole: Run) -> None:
    with pytest.raises(UserError, match="already holds a run"):
        train(sparse_mixtures(SITES), CONFIG, out=whole.out, resume=False, quiet=True)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path: Path, whole: Run) -> None:
    _assert_same(_resume(tmp_path / "again"), whole)
    other = train(
        sparse_mixtures(SITES),
        dataclasses.replace(CONFIG, seed=1),
        out=tmp_path / "other",
        quiet=True,
    )
    assert not torch.equal(other.sae("here").W_dec, whole.sae("here").W_dec)


def test_a_site_trains_the_same_alone_and_together_with_another(tmp_path: Path, whole: Run) -> None:
    alone = train(sparse_mixtures(SITES), CONFIG, out=tmp_path, sites=["there"], quiet=True)
    for name, tensor in alone.sae().state_dict().items():
        assert torch.equal(tensor, whole.sae("there").state_dict()[name]), name


class _Service:
    """A replacement for the module `wandb` that records what each run id logs."""

    def __init__(self) -> None:
        self.settings: list[dict] = []
        self.steps: dict[str, list[int]] = {}

    def init(self, **settings: Any) -> SimpleNamespace:
        self.settings.append(settings)
        steps = self.steps.setdefault(settings["id"], [])
        return SimpleNamespace(log=lambda _, step: steps.append(step), finish=lambda: None)


def test_a_resumed_run_continues_the_same_weights_and_biases_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = _Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    config = dataclasses.replace(CONFIG, loggers=("wandb",))
    _interrupt(tmp_path, monkeypatch, config=config)
    train(sparse_mixtures(SITES), config, out=tmp_path, quiet=True)
    train(sparse_mixtures(), config, out=tmp_path / "another", quiet=True)
    ids = [each["id"] for each in service.settings]
    assert ids[:2] == ids[2:4] and len(set(ids)) == 3  # one run per site
    assert {each["resume"] for each in service.settings} == {"allow"}
    assert all(steps[-1] == config.n_vectors for steps in service.steps.values())


def test_a_truncated_last_line_of_metrics_is_dropped(
    tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(tmp_path, monkeypatch)
    metrics = tmp_path / "here" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 18, "fvu"')
    _assert_same(_resume(tmp_path), whole)
    assert all(json.loads(line) for line in metrics.read_text().splitlines())


def test_a_run_on_other_activations_is_neither_continued_nor_returned(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = sparse_mixtures(SITES)
    other.activations["there"] = other.activations["there"] + 1
    with pytest.raises(UserError, match="belongs to a run on other activations"):
        train(other, CONFIG, out=whole.out, quiet=True)
    _interrupt(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="belongs to a run on other activations"):
        train(other, CONFIG, out=tmp_path, quiet=True)
    _assert_same(_resume(tmp_path), whole)


@pytest.mark.parametrize(("first", "second"), [(SITES, SITES[:1]), (SITES[:1], SITES)])
def test_a_folder_that_holds_a_run_of_other_sites_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: tuple[str], second: tuple[str]
) -> None:
    train(sparse_mixtures(SITES), CONFIG, out=tmp_path, sites=first, quiet=True)
    with pytest.raises(UserError, match=f"belongs to a run on {', '.join(first)}"):
        train(sparse_mixtures(SITES), CONFIG, out=tmp_path, sites=second, quiet=True)


def test_a_run_folder_s_parent_may_hold_runs_of_single_sites(tmp_path: Path) -> None:
    data = sparse_mixtures(SITES)
    train(data, CONFIG, out=tmp_path / "a", sites=["here"], quiet=True)
    train(data, CONFIG, out=tmp_path, sites=["there"], quiet=True)


def test_other_tokens_than_those_of_the_activations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokens is 'cls', but the activations are of 'all'"):
        train(sparse_mixtures(), CONFIG, out=tmp_path, tokens="cls", quiet=True)
