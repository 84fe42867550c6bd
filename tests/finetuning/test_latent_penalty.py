"""The penalty on latents that read words: its value, its effect, and errors."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from finetuning_samples import NoisePictures, Pairs, tiny_clip
from sparsight.errors import UserError
from sparsight.finetuning import FinetuneConfig, PenalisedLatents, finetune
from sparsight.finetuning.penalty import LatentPenalty
from sparsight.sae import SAEConfig, TopK
from sparsight.training import TrainConfig, train

SITE = "blocks.1.resid_post"
CAPTIONS = [("a cat",), ("a dog",), ("the sun",), ("a red anchor",)]
DATA = NoisePictures(20, CAPTIONS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def sae(model, tmp_path_factory):
    config = TrainConfig(sae=SAEConfig(48, sparsity=TopK(4)), n_vectors=2048, batch_size=256)
    out = tmp_path_factory.mktemp("sae")
    return train((model, DATA), config, out, sites=[SITE], quiet=True).sae()


@pytest.fixture
def pixels(model):
    return torch.stack([model.transform(DATA.load(i)) for i in range(4)])


@pytest.fixture
def busy(model, sae, pixels):
    """The latents that are most active on these images."""
    x = model.read(pixels, SITE)[SITE].flatten(0, 1)
    return sae.encode(x).dense().sum(dim=0).argsort(descending=True)[:5].tolist()


def test_it_is_the_latents_mean_activation_on_the_images_that_count(model, sae, pixels, busy):
    penalty = LatentPenalty(model, PenalisedLatents(sae, busy), SITE)
    rows = torch.tensor([0.0, 1, 1, 0])
    with penalty.reading():
        model.embed_images(pixels)
    x = model.read(pixels, SITE)[SITE]
    dense = sae.encode(x[1:3].flatten(0, 1)).dense()
    expected = dense[:, busy].double().sum() / (2 * x.shape[1])
    assert float(penalty.value(rows)) == pytest.approx(float(expected), rel=1e-5)


def test_the_callers_sae_stays_trainable(model, sae, busy):
    own = copy.deepcopy(sae).requires_grad_(True)
    LatentPenalty(model, PenalisedLatents(own, busy), SITE)
    assert all(each.requires_grad for each in own.parameters())


def test_its_gradient_reaches_the_weights_before_the_site_and_none_after(model, sae, pixels, busy):
    penalty = LatentPenalty(model, PenalisedLatents(sae, busy), SITE)
    layers = model.module.vision_model.encoder.layers
    weights = [layers[i].mlp.fc2.weight.requires_grad_(True) for i in (0, 2)]
    with penalty.reading():
        model.embed_images(pixels)
    found = torch.autograd.grad(penalty.value(torch.ones(4)), weights, allow_unused=True)
    assert found[0].norm() > 0
    assert found[1] is None
    for weight in weights:
        weight.requires_grad_(False)


def test_penalised_latents_are_less_active_after_a_run(model, sae, pixels, busy, tmp_path):
    config = FinetuneConfig(
        steps=8, batch_size=8, lr=1e-3, penalty=5.0, distillation=0, pull=0, schedule="constant"
    )
    activity = []
    for name, price in (("with", 5.0), ("without", 0.0)):
        run = finetune(
            model,
            DATA,
            dataclasses.replace(config, penalty=price),
            tmp_path / name,
            attack=Pairs(DATA, DATA),
            latents=PenalisedLatents(sae, busy),
            workers=0,
            quiet=True,
        )
        x = run.model("cpu").read(pixels, SITE)[SITE].flatten(0, 1)
        activity.append(float(sae.encode(x).dense()[:, busy].sum()))
        assert ("penalty" in run.metrics()[-1]) == (price > 0)
    assert activity[0] < 0.8 * activity[1]


def test_unknown_latents_and_saes_of_other_models_are_refused(model, sae, tmp_path):
    with pytest.raises(UserError, match=r"latent 48 cannot be penalised.*0 to 47"):
        PenalisedLatents(sae, [48]).place(model)
    with pytest.raises(UserError, match="no latent"):
        PenalisedLatents(sae, []).place(model)
    with pytest.raises(UserError, match="has no site"):
        PenalisedLatents(sae, [1], "blocks.9.resid_post").place(model)
    with pytest.raises(UserError, match="trained on"):
        PenalisedLatents(sae, [1]).place(tiny_clip(tmp_path / "other", seed=1))
    nameless = copy.deepcopy(sae)
    nameless.metadata = {}
    with pytest.raises(UserError, match="does not name its site"):
        PenalisedLatents(nameless, [1]).place(model)
