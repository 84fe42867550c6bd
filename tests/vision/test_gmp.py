"""GmP in the real class of transformers; for open_clip's see test_weights_open_clip.py."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPModel

from sparsight.editing import GeometricLinear, is_parametrized, parametrize, to_plain
from sparsight.errors import UserError
from sparsight.vision import load_model
from sparsight.vision.saving import write_model

TOKENS = torch.tensor([[2, 259, 297, 286, 1, 0], [2, 300, 301, 1, 0, 0]])


@pytest.fixture
def model():
    return load_model("calibration", device="cpu")


@pytest.fixture
def wide(model):
    return model.module.double().requires_grad_(True)


def losses(module):
    pixels = torch.randn(3, 3, 64, 64, dtype=torch.float64, generator=torch.Generator())
    out = module(input_ids=TOKENS, pixel_values=pixels)
    loss = out.logits_per_image.square().mean() + out.text_embeds.sum()
    loss.backward()
    return out.logits_per_image.detach(), loss.detach()


def test_the_parts_have_their_published_names_and_shapes(model):
    names = set(parametrize(model.module).state_dict())
    for layer, out, width in (
        ("vision_model.encoder.layers.3.mlp.fc1", 768, 192),
        ("text_model.encoder.layers.0.mlp.fc2", 128, 512),
    ):
        split = model.module.get_submodule(layer)
        assert {f"{layer}.r", f"{layer}.theta", f"{layer}.bias"} <= names
        assert f"{layer}.weight" not in names
        assert split.r.shape == (out, 1)
        assert split.theta.shape == (out, width)
    split = [each for each in model.module.modules() if isinstance(each, GeometricLinear)]
    assert len(split) == 2 * (4 + 2)
    assert not any("attn" in name and name.endswith(".theta") for name in names)


def test_forward_and_gradients_are_those_of_the_plain_model(wide):
    """dL/dr = ⟨G, u⟩ and dL/dθ = r/‖θ‖ (G − ⟨G, u⟩ u), from the plain model's G, in float64."""
    split = parametrize(copy.deepcopy(wide))
    expected, found = losses(wide), losses(split)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)
    plain = dict(wide.named_modules())
    checked = 0
    for name, layer in split.named_modules():
        if not isinstance(layer, GeometricLinear):
            continue
        gradient, weight = plain[name].weight.grad, plain[name].weight.detach()
        length = weight.norm(dim=1, keepdim=True)
        along = (gradient * weight / length).sum(dim=1, keepdim=True)
        scale = float(gradient.abs().max())
        torch.testing.assert_close(layer.r.grad, along, rtol=1e-9, atol=1e-12 * scale)
        across = length * (gradient - along * weight / length)
        torch.testing.assert_close(layer.theta.grad, across, rtol=1e-9, atol=1e-12 * scale)
        torch.testing.assert_close(layer.bias.grad, plain[name].bias.grad, rtol=1e-9, atol=1e-12)
        checked += 1
    assert checked == 12
    for name, parameter in split.named_parameters():
        if not name.endswith((".r", ".theta")):
            same = wide.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, same, rtol=1e-9, atol=1e-12)


def test_any_length_of_theta_gives_the_same_weight(wide):
    split = parametrize(wide)
    layer = split.vision_model.encoder.layers[0].mlp.fc1
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.theta.mul_(torch.rand(768, 1, dtype=torch.float64) + 0.1)
    torch.testing.assert_close(layer.weight, before, rtol=1e-12, atol=0)


def test_there_and_back_is_the_same_up_to_rounding(model):
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    order = [name for name, _ in model.module.named_parameters()]
    assert to_plain(parametrize(model.module)) is model.module
    after = model.module.state_dict()
    assert after.keys() == before.keys()
    assert not is_parametrized(model.module)
    for key, value in after.items():
        difference = (value - before[key]).norm() / before[key].norm().clamp(min=1e-30)
        assert difference <= 1e-6, key
        torch.testing.assert_close(value, before[key], rtol=1e-6, atol=0)
    assert sorted(name for name, _ in model.module.named_parameters()) == sorted(order)


def test_saved_plain_for_transformers_and_split_for_openai(model, tmp_path):
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    parametrize(model.module)
    saved = write_model(model, tmp_path / "plain")
    found = CLIPModel.from_pretrained(saved.path).state_dict()
    assert found.keys() == before.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, before[key], rtol=1e-6, atol=0)
    path = tmp_path / "split.safetensors"
    assert write_model(model, path, "openai", gmp=True).difference < 1e-5
    parts, layer = load_file(path), model.module.vision_model.encoder.layers[2].mlp.fc1
    torch.testing.assert_close(
        parts["visual.transformer.resblocks.2.mlp.c_fc.r"], layer.r, rtol=1e-6, atol=0
    )
    again = load_model(str(path), device="cpu").module
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-6, atol=0)


def test_a_row_of_zeros_can_grow_and_comes_back_as_zeros(wide):
    plain = wide.vision_model.encoder.layers[0].mlp.fc1
    with torch.no_grad():
        plain.weight[5] = 0
    split = parametrize(copy.deepcopy(wide))
    layer = split.vision_model.encoder.layers[0].mlp.fc1
    torch.testing.assert_close(losses(split)[0], losses(wide)[0], rtol=1e-12, atol=1e-12)
    assert torch.isfinite(layer.theta.grad).all()
    assert layer.r.grad[5] != 0
    assert torch.equal(
        to_plain(split).vision_model.encoder.layers[0].mlp.fc1.weight[5], torch.zeros(192)
    )


def test_the_layers_stay_the_same_objects_so_that_hooks_go_on(model):
    layer = model.module.vision_model.encoder.layers[1].mlp.fc1
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    parametrize(model.module)
    pixels = torch.zeros(1, 3, 64, 64)
    model.embed_images(pixels)
    assert model.module.vision_model.encoder.layers[1].mlp.fc1 is layer
    to_plain(model.module)
    model.embed_images(pixels)
    assert len(seen) == 2


def test_training_moves_lengths_and_directions_and_survives_copies_and_casts(model):
    split = parametrize(copy.deepcopy(model.module)).requires_grad_(True)
    optimiser = torch.optim.SGD(split.parameters(), lr=1e-2)
    layer = split.text_model.encoder.layers[1].mlp.fc2
    r, theta = layer.r.detach().clone(), layer.theta.detach().clone()
    out = split(input_ids=TOKENS, pixel_values=torch.ones(2, 3, 64, 64))
    out.logits_per_text.square().mean().backward()
    optimiser.step()
    assert not torch.equal(layer.r, r)
    assert not torch.equal(layer.theta, theta)
    again = parametrize(copy.deepcopy(model.module))
    again.load_state_dict(copy.deepcopy(split).state_dict())
    merged = to_plain(again)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(
            parameter,
            split.get_submodule(name.rpartition(".")[0]).weight
            if name.endswith("weight")
            else split.get_parameter(name),
            rtol=1e-5,
            atol=1e-7,
        )
    low = copy.deepcopy(split).to(torch.bfloat16)
    assert low.text_model.encoder.layers[1].mlp.fc2.weight.dtype == torch.bfloat16
    assert isinstance(low.text_model.encoder.layers[1].mlp.fc2, GeometricLinear)


def test_frozen_layers_stay_frozen_and_a_second_call_changes_nothing(model):
    split = parametrize(parametrize(model.module))
    layer = split.vision_model.encoder.layers[0].mlp.fc1
    assert not layer.r.requires_grad
    assert not to_plain(split).vision_model.encoder.layers[0].mlp.fc1.weight.requires_grad
    assert to_plain(split) is split


def test_models_without_such_layers_are_refused():
    with pytest.raises(UserError, match="no MLPs"):
        parametrize(nn.Sequential(nn.Linear(2, 2)))

    class Odd(nn.Linear):
        pass

    holder = nn.Module()
    holder.mlp = nn.Module()
    holder.mlp.c_fc = Odd(2, 2)
    with pytest.raises(UserError, match=r"mlp\.c_fc is of type Odd"):
        parametrize(holder)


def test_half_weights_are_split_in_double_and_come_back_as_they_were(wide):
    """The published code splits in half precision, where weights lose bits for good."""
    half = copy.deepcopy(wide).half()
    layer = half.text_model.encoder.layers[1].mlp.fc1
    before = layer.weight.detach().clone()
    parametrize(half.float())
    r = layer.r.detach().flatten()
    torch.testing.assert_close(r.double(), before.double().norm(dim=1), rtol=1e-7, atol=0)
    assert torch.equal(to_plain(half).half().text_model.encoder.layers[1].mlp.fc1.weight, before)
