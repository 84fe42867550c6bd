"""Training every architecture: it learns, resumes exactly, and works with every verb."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from test_resume import Stopped

from architecture_cases import ARCHITECTURES, WIDTH
from memory_activations import sparse_mixtures
from sparsight.activations import ActivationStore, extract
from sparsight.cli import main
from sparsight.config import write_toml
from sparsight.files import read_json
from sparsight.images import open_images
from sparsight.latents import LatentIndex
from sparsight.sae import (
    AuxK,
    BatchTopK,
    GhostGradients,
    Matryoshka,
    MatryoshkaK,
    Resampling,
    SAEConfig,
    TopK,
)
from sparsight.training import TrainConfig, train
from sparsight.training.config import TrainRecipe
from sparsight.training.sweeping import SweepRecipe
from sparsight.vision import load_model

NORMALISERS = ("scale", "standardise", "none", "layer_norm", "constant_norm")
SITE, TARGET = "blocks.3.resid_post", "blocks.3.mlp_out"
AUXK, RESAMPLING = AuxK(dead_after=96), Resampling(every=32 * 10, times=2)
SHORT = TrainConfig(
    n_vectors=32 * 40,
    batch_size=32,
    lr=3e-3,
    remedy=AUXK,
    log_every=32 * 10,
    checkpoint_every=32 * 8,
)

TRAINED: dict[str, TrainConfig] = {
    **{
        name: dataclasses.replace(SHORT, sae=sae, remedy=AUXK if sae.tied else RESAMPLING)
        for name, sae in ARCHITECTURES.items()
    },
    "matryoshka": dataclasses.replace(
        SHORT, sae=SAEConfig(WIDTH, sparsity=BatchTopK(8)), matryoshka=Matryoshka()
    ),
    "random prefixes": dataclasses.replace(
        SHORT, sae=SAEConfig(WIDTH, sparsity=BatchTopK(8)), matryoshka=Matryoshka(random=4)
    ),
    "several k": dataclasses.replace(
        SHORT, sae=SAEConfig(WIDTH, sparsity=TopK(8)), matryoshka=MatryoshkaK()
    ),
    "ghosts and an average": dataclasses.replace(
        SHORT,
        sae=SAEConfig(WIDTH, sparsity=TopK(8), decoder_init="data"),
        remedy=GhostGradients(dead_after=96),
        ema=0.9,
    ),
    "transcoder": dataclasses.replace(
        SHORT,
        sae=SAEConfig(WIDTH, sparsity=BatchTopK(8), subtract_b_dec=False, skip=True),
        target_site="there",
    ),
}


def _fits(config: TrainConfig, normaliser: str) -> bool:
    return config.target_site is None or normaliser in ("scale", "standardise", "none")


PAIRS = [
    pytest.param(name, normaliser, marks=() if number % 5 == place else pytest.mark.slow)
    for number, (name, config) in enumerate(TRAINED.items())
    for place, normaliser in enumerate(NORMALISERS)
    if _fits(config, normaliser)
]
"""All combinations; the quick tests use one normaliser per architecture."""


def _with(config: TrainConfig, normaliser: str) -> TrainConfig:
    # Start at the mean: if nothing is subtracted, these vectors are mostly their mean.
    start = "zero" if config.target_site else "mean"
    sae = dataclasses.replace(config.sae, normaliser=normaliser, b_dec_init=start)  # type: ignore[arg-type]
    return dataclasses.replace(config, sae=sae)


@pytest.mark.parametrize(("name", "normaliser"), PAIRS)
def test_an_interrupted_run_ends_with_the_same_bits_as_an_uninterrupted_one_and_has_learnt(
    name: str, normaliser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsight.training import trainer

    config, data = _with(TRAINED[name], normaliser), sparse_mixtures(("here", "there"))
    whole = train(data, config, tmp_path / "whole", sites=["here"], quiet=True)
    step = trainer.SiteTraining.step

    def step_or_stop(self, x, number, factor, target) -> None:
        if number == 21:  # between two resamplings; the last checkpoint is of step 16
            raise Stopped
        step(self, x, number, factor, target)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.SiteTraining, "step", step_or_stop)
        with pytest.raises(Stopped):
            train(data, config, tmp_path / "cut", sites=["here"], quiet=True)
    again = train(data, config, tmp_path / "cut", sites=["here"], quiet=True)
    for file in ("sae.safetensors", "config.json"):
        mine, other = (run.folder("here") / file for run in (whole, again))
        assert mine.read_bytes() == other.read_bytes()
    lines = whole.metrics()
    # A penalty rises for a while, and costs more than so few steps can learn.
    worst = 0.95 if lines[0]["penalty"] == 0 else 2
    assert lines[-1]["fvu"] < worst * lines[0]["fvu"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Return a small store of two sites of the calibration model."""
    folder = tmp_path_factory.mktemp("store") / "kept"
    images, model = open_images("calibration:24:5"), load_model("calibration")
    return extract(model, images, sites=[SITE, TARGET], out=folder, workers=0, quiet=True)


RELATIVES = (
    "signed topk", "tied topk", "topk without b_dec", "weighted relu", "jumprelu with tanh",
    "gated without b_dec", "random prefixes", "several k",
)  # fmt: skip
"""Verbs treat these like similar ones, so they are not among the quick tests."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in RELATIVES else ()) for name in TRAINED],
)
def test_every_verb_accepts_every_architecture(
    name: str, store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(TRAINED[name], n_vectors=32 * 8)
    if config.target_site is not None:
        config = dataclasses.replace(config, target_site=TARGET)
    recipe = TrainRecipe(store=str(store.path), sites=(SITE,), out=Path("run"), train=config)
    write_toml(Path("train.toml"), recipe)
    grid = {"seed": [0, 1]}
    swept = SweepRecipe(
        store=str(store.path), sites=(SITE,), out=Path("swept"), train=config, grid=grid
    )
    write_toml(Path("sweep.toml"), swept)
    for command in (
        ("train", "--config", "train.toml"),
        ("sweep", "--config", "sweep.toml"),
        ("evaluate", "run", "--no-baselines", "--no-downstream"),
        ("index", "run"),
    ):
        assert main(command) == 0, (command, capsys.readouterr().err)
    alone, member = Path("run"), Path("swept/seed0")
    assert (alone / "sae.safetensors").read_bytes() == (member / "sae.safetensors").read_bytes()
    figures = read_json(alone / "metrics.json")
    assert figures["fvu"] > 0 and figures["l0"] > 0
    assert LatentIndex.open(alone / "index").n_latents == WIDTH
