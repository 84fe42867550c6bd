"""Learning rate and weight decay of each parameter."""

from __future__ import annotations

import pytest
import torch

from finetuning_samples import tiny_clip
from sparsight.errors import UserError
from sparsight.finetuning import FinetuneConfig, Rates
from sparsight.finetuning.groups import PARTS, members, set_trainable
from sparsight.finetuning.optimisers import rate_factor
from sparsight.finetuning.optimising import gradient_norms, make_optimiser


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def test_every_parameter_has_a_part(model):
    found = {member.name: member.part for member in members(model)}
    assert set(found) == {name for name, _ in model.module.named_parameters()}
    assert set(found.values()) == set(PARTS)
    assert found["vision_model.encoder.layers.2.mlp.fc1.weight"] == "visual_blocks"
    assert found["text_model.encoder.layers.1.self_attn.q_proj.bias"] == "text_blocks"
    assert found["text_model.embeddings.token_embedding.weight"] == "token_embedding"
    assert found["vision_model.embeddings.class_embedding"] == "positions"
    assert found["text_model.embeddings.position_embedding.weight"] == "positions"
    assert found["visual_projection.weight"] == "rest"
    assert found["vision_model.pre_layrnorm.weight"] == "rest"
    assert found["logit_scale"] == "logit_scale"


def test_biases_norms_and_positions_do_not_decay(model):
    for member in members(model):
        last = member.name.rsplit(".", 1)[-1]
        if member.decays:
            assert last == "weight"
            assert member.parameter.ndim >= 2
            assert "norm" not in member.name
        elif last == "weight" and member.parameter.ndim >= 2:
            assert member.part == "positions"


def test_an_optimisers_decay_reaches_only_matrices(model):
    trained = set_trainable(model, Rates())
    optimiser = make_optimiser(trained, FinetuneConfig(weight_decay=0.5), width=768)
    decays = {id(p): g["weight_decay"] for g in optimiser.param_groups for p in g["params"]}
    for member in trained:
        assert decays[id(member.parameter)] == (0.5 if member.decays else 0.0), member.name
    assert len(decays) == len(trained)


@pytest.mark.parametrize("name", ["cosine", "one_cycle"])
def test_rates_of_the_parts_keep_their_ratios_under_a_schedule(model, name):
    """`OneCycleLR` with one maximum for all groups would overwrite them."""
    rates = Rates(text_blocks=0.1, rest=0.05)
    trained = set_trainable(model, rates)
    config = FinetuneConfig(schedule=name, lr=1e-3, rates=rates)
    optimiser = make_optimiser(trained, config, width=768)
    peaks = {group["part"]: group["peak"] for group in optimiser.param_groups}
    assert peaks["visual_blocks"] == pytest.approx(1e-3)
    for step in range(20):
        factor = rate_factor(name, step, 20, 0.3)
        now = {part: peak * factor for part, peak in peaks.items()}
        assert now["text_blocks"] == pytest.approx(0.1 * now["visual_blocks"])
        assert now["rest"] == pytest.approx(0.05 * now["visual_blocks"])


def test_a_rate_of_zero_freezes_a_part(model):
    trained = set_trainable(model, Rates(text_blocks=0, token_embedding=0))
    frozen = {m.part for m in members(model) if not m.parameter.requires_grad}
    assert frozen == {"text_blocks", "token_embedding"}
    assert not frozen & {m.part for m in trained}


def test_blocks_before_first_block_do_not_change(model):
    set_trainable(model, Rates(), first_block=2)
    on = {member.name for member in members(model) if member.parameter.requires_grad}
    assert "vision_model.encoder.layers.2.mlp.fc1.weight" in on
    assert "visual_projection.weight" in on
    assert "text_model.embeddings.position_embedding.weight" in on
    assert not any("vision_model.encoder.layers.1" in name for name in on)
    assert not any("vision_model.embeddings" in name or "pre_layrnorm" in name for name in on)


def test_an_untrainable_configuration_is_refused(model):
    with pytest.raises(UserError, match="blocks 0 to 2"):
        set_trainable(model, Rates(), first_block=3)
    with pytest.raises(UserError, match="Nothing to train"):
        set_trainable(model, Rates(0, 0, 0, 0, 0, 1.0))
    with pytest.raises(UserError, match="text_blocks"):
        Rates(text_blocks=-1)


def test_gradient_norms_are_logged_by_layer(model):
    trained = set_trainable(model, Rates())
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (model.embed_images(pixels).sum() + model.embed_texts(["a cat", "the sun"]).sum()).backward()
    norms = gradient_norms(trained)
    assert {"visual.0", "visual.2", "text.1", "rest", "positions", "token_embedding"} <= set(norms)
    own = [m.parameter.grad for m in trained if "vision_model.encoder.layers.1." in m.name]
    whole = torch.cat([grad.flatten() for grad in own]).norm()
    torch.testing.assert_close(norms["visual.1"], whole)
    model.module.zero_grad()
