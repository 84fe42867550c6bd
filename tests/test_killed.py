"""Processes that are killed while they replace what earlier ones wrote, or write something new."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

import sparsight as sp
from cutting import cut
from small_runs import one_thread, store, train_small
from sparsight.cli import main
from sparsight.folders import settled
from sparsight.latents.index_files import parquet

__all__ = ["one_thread", "store"]


@pytest.fixture
def run(store: sp.ActivationStore, tmp_path: Path) -> sp.Run:
    return train_small(store, tmp_path / "run")


def names_in(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


def test_an_index_killed_while_files_are_replaced_is_the_old_or_the_new_one(
    run: sp.Run, store: sp.ActivationStore
) -> None:
    """A table and a file together, so that a mixture of both would be seen."""
    folder = run.out / "index"
    index = sp.build_index(run.sae(), store, out=folder, quiet=True)
    tables = {word: named(index.table, word) for word in ("old", "new")}

    def write(word: str) -> None:
        opened = sp.LatentIndex.open(folder)
        opened.with_files({"latents.parquet": parquet(tables[word]), "word": word.encode()})

    write("old")
    whole, found = names_in(folder), []
    for place in itertools.count(0, 4):
        write("old")
        if not cut(lambda: write("new"), place, run.out):
            break
        opened = sp.LatentIndex.open(folder)
        word = opened.file("word")
        assert word is not None
        found.append(word.read_text())
        assert opened.row(1)["name"] == found[-1]
        assert len(opened.firing(1)[0]) == opened.row(1)["n_active_images"]
        write("new")
        assert names_in(folder) == whole
        assert not [name for name in names_in(run.out) if name.startswith(".index")]
    assert found == sorted(found, reverse=True) and set(found) == {"old", "new"}


def named(table: pa.Table, name: str) -> pa.Table:
    """`table` in which latent 1 has `name`."""
    column = [name if latent == 1 else None for latent in table["latent"].to_pylist()]
    place = table.column_names.index("name")
    return table.set_column(place, "name", pa.array(column, pa.string()))


def test_an_index_killed_while_it_is_rebuilt_is_never_without_names(
    run: sp.Run, store: sp.ActivationStore
) -> None:
    folder, sae = run.out / "index", run.sae()
    metrics = {
        "sae": sae.fingerprint(),
        "truth": {},
        "latent_names": {"1": {"attribute": "symbol/sun", "auc": 0.9, "f1": 0.9}},
    }

    def build(seed: int) -> None:
        sp.build_index(sae, store, out=folder, metrics=metrics, seed=seed, quiet=True)

    build(0)
    seeds = []
    for place in itertools.count(0, 5):
        if not cut(lambda: build(1), place, run.out):
            break
        index = sp.LatentIndex.open(folder, sae)
        assert index.row(1)["name"] == "sun"
        seeds.append(index.manifest["settings"]["seed"])
    assert seeds == sorted(seeds) and seeds[0] == 0
    assert sp.LatentIndex.open(folder).manifest["settings"]["seed"] == 1


def test_an_sae_killed_while_another_takes_its_place_is_the_old_or_the_new_one(
    run: sp.Run,
) -> None:
    """In a run's folder, among other files; they differ in width, so that no mixture loads."""
    old, others = run.sae(), names_in(run.out)
    new = sp.SparseAutoencoder(old.d_in, sp.SAEConfig(n_latents=96), seed=5)
    found = []
    for place in itertools.count(0, 4):
        old.save_pretrained(run.out)
        if not cut(lambda: new.save_pretrained(run.out), place, run.out.parent):
            break
        found.append(sp.SparseAutoencoder.from_pretrained(run.out).fingerprint())
        assert "96" in (run.out / "README.md").read_text() or found[-1] == old.fingerprint()
        new.save_pretrained(run.out)
        assert names_in(run.out) == others
    assert set(found) == {old.fingerprint(), new.fingerprint()}
    assert found == sorted(found, key=[old.fingerprint(), new.fingerprint()].index)


def killed(arguments: Sequence[str], after: float) -> bool:
    """Run a verb in a child process and kill it; False if it ended before."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = main(arguments)
        finally:
            os._exit(code)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)


@pytest.mark.slow
def test_sixty_kills_leave_the_old_or_the_new_and_the_same_command_then_succeeds(
    run: sp.Run, store: sp.ActivationStore, tmp_path: Path
) -> None:
    rng = random.Random(0)
    place = tmp_path / "places"
    found = tmp_path / "found"
    scenes = ["--images", "calibration:24:9", "--workers", "0", "--device", "cpu"]
    neurons = ["--neurons", "blocks.1.mlp_post", "--model", "calibration", "--no-check"]
    assert main(["attack", "find", *scenes, *neurons, "--out", str(found)]) == 0
    (salience,) = map(str, found.iterdir())

    def index_is_whole() -> None:
        index = sp.LatentIndex.open(run.out / "index", run.sae())
        assert names_in(index.folder) == {"manifest.json", *index.manifest["files"]}
        assert all(index.file(name) for name in index.manifest["files"])
        assert len(index.by_latent.columns) == len(index.by_image.columns)

    def push_is_whole() -> None:
        assert sp.SparseAutoencoder.from_pretrained(place / "push").fingerprint()
        assert {"README.md", "config.json", "sae.safetensors"} <= names_in(place / "push")
        assert len(list((place / "push/pictures").iterdir())) == 4

    def export_is_whole() -> None:
        sp.load_model(str(place / "clip.safetensors"), device="cpu")

    def set_is_whole() -> None:
        assert len(sp.open_images(place / "set")) == 8
        assert (place / "set/manifest.json").exists()

    pushed, exported, made = place / "push", place / "clip.safetensors", place / "set"
    push = ["push", str(run.out), "--to", "a/b", "--n-shown", "4", "--dry-run", str(pushed)]
    export = ["export", "calibration", "--layout", "openai", "--out", str(exported)]
    curate = ["attack", "curate", salience, *scenes, "--n", "8", "--out", str(made)]
    verbs: list[tuple[list[str], Path, Callable[[], None]]] = [
        (["index", str(run.out)], run.out / "index", index_is_whole),
        (push, pushed, push_is_whole),
        (export, exported, export_is_whole),
        (curate, made, set_is_whole),
    ]
    n_kills = 0
    for arguments, out, whole in verbs:
        replaces = arguments[0] == "index"
        start = time.monotonic()
        assert main(arguments) == 0
        took = time.monotonic() - start
        whole()
        beside = {name for name in names_in(out.parent) if name.startswith(".")}
        for _ in range(15):
            if not replaces:
                remove(out)
            n_kills += killed(arguments, rng.uniform(0, 1.1 * took))
            settled(out)
            if replaces or out.exists():
                whole()
            code = main(arguments)
            # It may have ended just before it was killed.
            assert code == 0 or (code == 2 and not replaces)
            whole()
            assert {name for name in names_in(out.parent) if name.startswith(".")} == beside
    assert n_kills > 30


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
