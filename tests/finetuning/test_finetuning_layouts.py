"""Geometric parametrisation, CLIPs in OpenAI's layout, and Long-CLIP's positions, fine-tuned."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import CLIPModel

import sparsight as sp
from finetuning_samples import NoisePictures, tiny_clip
from sparsight.finetuning import FinetuneConfig, Rates, finetune
from sparsight.finetuning.groups import members, set_trainable
from sparsight.finetuning.loop import working_copy
from sparsight.finetuning.optimising import make_optimiser
from sparsight.vision.saving import save_model

CAPTIONS = [("a photo of the cat",), ("a photo of the dog",), ("the sun",), ("a red anchor",)]
DATA = NoisePictures(20, CAPTIONS)
CONFIG = FinetuneConfig(steps=2, batch_size=6, lr=1e-3, parametrisation="geometric")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def tune(model, out, config=CONFIG, **options):
    return finetune(model, DATA, config, out, attack=DATA, workers=0, quiet=True, **options)


def test_lengths_and_directions_are_trained_and_plain_weights_exported(model, tmp_path):
    run = tune(model, tmp_path / "run")
    state = CLIPModel.from_pretrained(run.folder).state_dict()
    assert not any(name.endswith((".r", ".theta")) for name in state)
    before = model.module.state_dict()
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    rows = [each[name].norm(dim=1) for each in (before, state)]
    assert not torch.allclose(*rows, rtol=1e-5)
    turned = torch.cosine_similarity(before[name], state[name], dim=1)
    assert (turned < 1 - 1e-6).all()


def test_neither_lengths_nor_directions_decay(model):
    copy = working_copy(model, geometric=True)
    trained = set_trainable(copy, Rates())
    names = {member.name for member in trained if not member.decays}
    parts = [m.name for m in trained if m.name.endswith((".r", ".theta"))]
    assert len(parts) == 2 * 2 * (3 + 2)
    assert names.issuperset(parts)
    optimiser = make_optimiser(trained, FinetuneConfig(weight_decay=0.5), 768)
    decays = {id(p): g["weight_decay"] for g in optimiser.param_groups for p in g["params"]}
    lengths = [m for m in trained if m.name.endswith(".r")]
    assert lengths
    assert not any(decays[id(m.parameter)] for m in lengths)
    assert all(m.part in ("visual_blocks", "text_blocks") for m in lengths)


def test_the_first_step_begins_at_the_plain_model(model, tmp_path):
    lines = [
        tune(model, tmp_path / kind, dataclasses.replace(CONFIG, parametrisation=kind)).metrics()
        for kind in ("plain", "geometric")
    ]
    assert lines[0][0]["loss"] == pytest.approx(lines[1][0]["loss"], rel=1e-5)


@pytest.mark.parametrize("layout", ["openai", "huggingface"])
def test_a_model_in_openais_layout_is_trained_and_exported_in_any(model, layout, tmp_path):
    saved = save_model(model, tmp_path / "openai", "openai")
    loaded = sp.load_model(str(saved), device="cpu")
    run = tune(loaded, tmp_path / "run", layout=layout)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (m.embed_images(pixels) for m in (loaded, run.model("cpu")))
    assert 1e-4 < float((after - before).norm() / before.norm()) < 2
    assert run.metrics()[-1]["gradient_norms"]["visual.2"] > 0


def test_every_position_of_a_long_clip_but_the_kept_ones_is_trained(model):
    """A table in no group of parameters would never be trained."""
    long_clip = pytest.importorskip("sparsight.vision.long_clip")
    copy = working_copy(model)
    long_clip.keep_positions(long_clip.lengthen(copy.module, kept=4), kept=4)
    trained = set_trainable(copy, Rates())
    optimiser = make_optimiser(trained, FinetuneConfig(lr=0.1, weight_decay=0.5), 768)
    before = {m.name: m.parameter.detach().clone() for m in members(copy)}
    longest = " ".join(["cat"] * (copy.context_length - 2))
    copy.embed_texts([longest, "a dog"]).square().sum().backward()
    optimiser.step()
    (second,) = (name for name in before if name.endswith("positional_embedding_res"))
    moved = {m.name: (m.parameter.detach() - before[m.name]).norm(dim=-1) for m in members(copy)}
    assert (moved[second][4:] > 0).all()
    assert (moved[second][:4] == 0).all()
    assert (moved["text_model.embeddings.position_embedding.weight"] == 0).all()
