from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from memory_activations import MemoryActivations, sparse_mixtures
from sparsight.errors import UserError
from sparsight.evaluation import evaluate
from sparsight.sae import Normaliser, SAEConfig, TopK
from sparsight.training import TrainConfig, train

CONFIG = TrainConfig(
    sae=SAEConfig(64, sparsity=TopK(4), subtract_b_dec=False, skip=True),
    n_vectors=32 * 200,
    batch_size=32,
    lr=3e-3,
    target_site="there",
)


@pytest.fixture(scope="module")
def activations() -> MemoryActivations:
    """The site "there" is a wider, nonlinear map of the site "here"."""
    here = sparse_mixtures(("here",)).activations["here"]
    W = torch.randn(here.shape[-1], 24, generator=torch.Generator().manual_seed(4))
    there = (here @ W).relu() * 3 + 5
    return MemoryActivations({"here": here, "there": there})


def test_a_transcoder_learns_to_predict_another_site(
    activations: MemoryActivations, tmp_path: Path
) -> None:
    run = train(activations, CONFIG, out=tmp_path, quiet=True)
    assert run.sites == ("here",)
    sae = run.sae()
    assert (sae.d_in, sae.d_out) == (16, 24) and sae.metadata["target_site"] == "there"
    report = evaluate(sae, activations, quiet=True).metrics
    assert report["target_site"] == "there"
    untrained = report["baselines"]["untrained"]["fvu"]
    assert report["fvu"] < 0.35 < untrained
    y = activations.activations["there"].flatten(0, 1).double()
    y_hat = sae(activations.activations["here"].flatten(0, 1)).x_hat.double()
    fvu = (y - y_hat).square().sum() / (y - y.mean(dim=0)).square().sum()
    assert report["fvu"] == pytest.approx(float(fvu), rel=1e-5)


@pytest.mark.parametrize("normaliser", ["layer_norm", "constant_norm"])
def test_a_transcoder_learns_its_target_in_the_units_of_each_input(
    tmp_path: Path, normaliser: str
) -> None:
    """A larger input has a larger target: in the input's own units they are the same."""
    here = sparse_mixtures(("here",)).activations["here"]
    here *= torch.rand(*here.shape[:-1], 1, generator=torch.Generator().manual_seed(5)) * 9 + 1
    W = torch.randn(here.shape[-1], 24, generator=torch.Generator().manual_seed(4))
    units = Normaliser.identity(here.shape[-1], normaliser)
    x = here.flatten(0, 1)
    there = units.invert((units(x) @ W).relu(), units.frame(x))
    activations = MemoryActivations({"here": here, "there": there.view(*here.shape[:-1], 24)})
    config = dataclasses.replace(
        CONFIG, sae=dataclasses.replace(CONFIG.sae, normaliser=normaliser, skip=False)
    )
    run = train(activations, config, out=tmp_path, quiet=True)
    sae = run.sae()
    report = evaluate(sae, activations, quiet=True).metrics
    y = activations.activations["there"].flatten(0, 1).double()
    y_hat = sae(activations.activations["here"].flatten(0, 1)).x_hat.double()
    fvu = (y - y_hat).square().sum() / (y - y.mean(dim=0)).square().sum()
    assert report["fvu"] == pytest.approx(float(fvu), rel=1e-5)
    assert report["fvu"] < 0.5 < report["baselines"]["untrained"]["fvu"]
    # The measurement is the same as what training minimised, in the input's units.
    assert run.metrics()[-1]["fvu"] == pytest.approx(report["normalised"]["fvu"], rel=0.3)


def test_the_skip_connection_alone_is_a_linear_map_and_helps(
    activations: MemoryActivations, tmp_path: Path
) -> None:
    plain = dataclasses.replace(CONFIG, sae=dataclasses.replace(CONFIG.sae, skip=False))
    fvus = [
        train(activations, config, out=tmp_path / name, quiet=True).metrics()[-1]["fvu"]
        for name, config in {"skip": CONFIG, "plain": plain}.items()
    ]
    assert fvus[0] < fvus[1]


def test_an_interrupted_transcoder_continues_with_the_same_bits(
    activations: MemoryActivations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsight.training import trainer

    whole = train(activations, CONFIG, out=tmp_path / "whole", quiet=True)
    step = trainer.SiteTraining.step

    def step_or_stop(self, x, number, factor, target) -> None:
        if number == 90:
            raise KeyboardInterrupt
        step(self, x, number, factor, target)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.SiteTraining, "step", step_or_stop)
        with pytest.raises(KeyboardInterrupt):
            train(activations, CONFIG, out=tmp_path / "cut", quiet=True)
    resumed = train(activations, CONFIG, out=tmp_path / "cut", quiet=True)
    assert resumed.sae().fingerprint() == whole.sae().fingerprint()


def test_a_target_that_is_the_only_site_or_unknown_is_refused(
    activations: MemoryActivations, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="only site"):
        train(activations, CONFIG, out=tmp_path, sites=["there"], quiet=True)
    elsewhere = dataclasses.replace(CONFIG, target_site="elsewhere")
    with pytest.raises(UserError, match="elsewhere"):
        train(activations, elsewhere, out=tmp_path, quiet=True)
    with pytest.raises(UserError, match="skip"):
        dataclasses.replace(CONFIG, target_site=None)
