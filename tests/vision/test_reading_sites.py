"""What `read` gives, against transformers' own hidden states and against algebra."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
)
from transformers.modeling_outputs import BaseModelOutput

import tiny_models
from sparsight.errors import UserError
from sparsight.vision import load_model, select_tokens, tower
from sparsight.vision import transformers_files as loading
from sparsight.vision.hashing import weights_hash
from sparsight.vision.hooks import first_tensor
from sparsight.vision.probe import probe
from tiny_models import FAMILIES, WITH_TEXT

every_family = pytest.mark.parametrize("family", FAMILIES)
PARTS = ("resid_pre", "attn_out", "mlp_pre", "mlp_post", "mlp_out", "resid_post")
JOINT = {"clip": 20, "siglip": 32}


def reference(folder, family, pixels):
    """Hidden states, last hidden state and pooled output of transformers itself."""
    whole = AutoModel.from_pretrained(folder(family)).eval()
    tower = getattr(whole, "vision_model", whole)
    with torch.no_grad():
        out = tower(pixel_values=pixels, output_hidden_states=True)
    return whole, tower, out


@every_family
def test_residual_stream_is_bitwise_that_of_transformers(family, folder, model, pixels):
    _, _, out = reference(folder, family, pixels)
    ours = model(family)
    for i in range(3):
        read = ours.read(pixels, [f"blocks.{i}.resid_pre", f"blocks.{i}.resid_post"])
        assert torch.equal(read[f"blocks.{i}.resid_pre"], out.hidden_states[i])
        assert torch.equal(read[f"blocks.{i}.resid_post"], out.hidden_states[i + 1])


@every_family
def test_attention_and_mlp_outputs_add_up_to_the_stream(family, model, pixels):
    ours = model(family)
    read = ours.read(pixels, ours.sites)
    for i in range(3):
        before, attn, mlp, after = (
            read[f"blocks.{i}.{part}"]
            for part in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        torch.testing.assert_close(before + attn + mlp, after, rtol=1e-5, atol=1e-5)
        assert attn.abs().mean() > 1e-3
        assert mlp.abs().mean() > 1e-3


@every_family
def test_neurons_lie_between_the_two_linear_maps_of_the_mlp(family, model, pixels):
    ours = model(family)
    for i in range(3):
        block = ours._tower.blocks[i]
        read = ours.read(pixels, [f"blocks.{i}.{part}" for part in PARTS])
        before, after = read[f"blocks.{i}.mlp_pre"], read[f"blocks.{i}.mlp_post"]
        assert torch.equal(block.mlp.activation_fn(before), after)
        with torch.no_grad():
            out = block.mlp.fc2(after)
        scale = getattr(block, "layer_scale2", None)
        out = out if scale is None else out * scale.lambda1.detach()
        torch.testing.assert_close(out, read[f"blocks.{i}.mlp_out"])


def test_a_gated_mlp_has_neurons_only_after_the_gate(tmp_path, pixels):
    config = Dinov2Config(**tiny_models.TOWER, mlp_ratio=2, use_swiglu_ffn=True)
    Dinov2Model(config).save_pretrained(tmp_path)
    tiny_models._bit().save_pretrained(tmp_path)
    ours = load_model(str(tmp_path))
    assert "blocks.1.mlp_post" in ours.sites
    assert not any(site.endswith("mlp_pre") for site in ours.sites)
    read = ours.read(pixels, ["blocks.1.mlp_post", "blocks.1.mlp_out"])
    with ours.edit({"blocks.1.mlp_post": torch.zeros_like}):
        nothing = ours.read(pixels, "blocks.1.mlp_out")["blocks.1.mlp_out"]
    assert not torch.allclose(nothing, read["blocks.1.mlp_out"])


@pytest.mark.parametrize("wrong", ["mlp_pre", "mlp_post"])
def test_a_linear_map_that_was_guessed_wrong_is_a_missing_site(wrong, folder, monkeypatch):
    if wrong == "mlp_pre":  # one of attention's in its place
        monkeypatch.setattr(tower, "MLP_IN", ("self_attn.q_proj",))
        lost = {"mlp_pre"}
    else:
        monkeypatch.setattr(tower, "MLP_OUT", ("self_attn.out_proj",))
        lost = {"mlp_pre", "mlp_post"}
    parts = {site.rpartition(".")[2] for site in load_model(str(folder("clip"))).sites}
    assert set(PARTS) - parts == lost


def test_neurons_of_different_kinds_do_not_pass_for_one_function(folder, monkeypatch):
    """As behind a gate: a number's place decides what becomes of it."""
    whole = CLIPModel.from_pretrained(folder("clip"))

    class Mixed(nn.Module):
        def forward(self, x):
            return torch.cat([x[..., ::2].relu(), -x[..., 1::2].relu()], dim=-1)

    for layer in whole.vision_model.encoder.layers:
        layer.mlp.activation_fn = Mixed()
    found = tower.find_tower(whole, "mixed")
    anatomy = probe("mixed", found, None, lambda x: found.module(pixel_values=x), (3, 32, 32))
    assert "blocks.0.mlp_post" in anatomy.sites
    assert "blocks.0.mlp_pre" not in anatomy.sites


@every_family
def test_final_norm_is_what_the_model_normalises(family, folder, model, pixels):
    _, _, out = reference(folder, family, pixels)
    read = model(family).read(pixels, "final_norm")["final_norm"]
    if family == "clip":
        assert torch.equal(read, out.pooler_output[:, None])
    else:
        assert torch.equal(read, out.last_hidden_state)


@pytest.mark.parametrize("family", WITH_TEXT)
def test_embedding_is_that_of_get_image_features(family, folder, model, pixels):
    whole, _, _ = reference(folder, family, pixels)
    with torch.no_grad():
        features = whole.get_image_features(pixel_values=pixels)
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    ours = model(family)
    assert torch.equal(ours.embed_images(pixels), features)
    assert torch.equal(ours.read(pixels, "embedding")["embedding"], features[:, None])
    assert ours.d_in("embedding") == features.shape[1] == JOINT[family]


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "vit"])
def test_models_without_a_joint_space_embed_with_their_normalised_cls(
    family, folder, model, pixels
):
    _, _, out = reference(folder, family, pixels)
    ours = model(family)
    assert "embedding" not in ours.sites
    assert torch.equal(ours.embed_images(pixels), out.last_hidden_state[:, 0])


@every_family
def test_reading_many_sites_at_once_gives_the_bits_of_reading_one_by_one(family, model, pixels):
    ours = model(family)
    together = ours.read(pixels, ours.sites)
    for site in ours.sites:
        assert torch.equal(ours.read(pixels, [site])[site], together[site]), site


@every_family
def test_sites_are_named_in_forward_order_with_their_true_widths(family, model, pixels):
    ours = model(family)
    expected = [f"blocks.{i}.{part}" for i in range(3) for part in PARTS] + ["final_norm"]
    assert ours.sites == tuple(expected + (["embedding"] if family in WITH_TEXT else []))
    read = ours.read(pixels, ours.sites)
    for site in ours.sites:
        assert read[site].shape == (4, ours.token_count(site, "all"), ours.d_in(site))
        assert not read[site].requires_grad


@pytest.mark.parametrize(
    ("family", "n_prefix", "has_cls"),
    [
        ("clip", 1, True),
        ("siglip", 0, False),
        ("dinov2", 1, True),
        ("dinov2_with_registers", 4, True),
        ("vit", 1, True),
    ],
)
def test_the_layout_of_positions_is_found(family, n_prefix, has_cls, model, pixels):
    ours = model(family)
    assert (ours.n_prefix, ours.has_cls) == (n_prefix, has_cls)
    assert ours.patch_grid == (4, 4)
    assert ours.n_tokens == n_prefix + 16


@every_family
def test_tokens_are_the_slices_they_are_named_for(family, model, pixels):
    ours = model(family)
    site = "blocks.1.resid_post"
    everything = ours.read(pixels, site)[site]
    patches = ours.read(pixels, site, tokens="patches")[site]
    assert torch.equal(patches, everything[:, -16:])  # registers are no patches
    assert ours.token_count(site, "patches") == 16
    mean = ours.read(pixels, site, tokens="mean")[site]
    assert torch.equal(mean, patches.mean(dim=1, keepdim=True))
    if ours.has_cls:
        assert torch.equal(ours.read(pixels, site, tokens="cls")[site], everything[:, :1])
    else:
        with pytest.raises(UserError, match="no CLS position"):
            ours.read(pixels, site, tokens="cls")


def test_clip_final_norm_has_no_patches_and_says_where_they_are(model, pixels):
    with pytest.raises(UserError, match=r"only its CLS position.*blocks\.2\.resid_post"):
        model("clip").read(pixels, "final_norm", tokens="patches")
    assert model("clip").token_count("final_norm", "cls") == 1


@pytest.mark.unchecked
def test_unknown_tokens_are_refused():
    with pytest.raises(UserError, match="all, patches, cls, mean"):
        select_tokens(torch.zeros(1, 2, 3), "patch", 1, True)  # type: ignore[arg-type]


def count_calls(modules: Any) -> tuple[list[int], list[Any]]:
    """Numbers of the modules that run, in order, and the handles to stop noting them."""
    ran: list[int] = []
    handles = [
        module.register_forward_pre_hook(lambda m, a, i=i: ran.append(i))
        for i, module in enumerate(modules)
    ]
    return ran, handles


@every_family
@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("blocks.0.resid_pre", [0]),
        ("blocks.0.resid_post", [0]),
        ("blocks.1.attn_out", [0, 1]),
        ("blocks.-1.resid_post", [0, 1, 2]),
    ],
)
def test_the_forward_pass_stops_after_the_last_site(family, site, expected, model, pixels):
    ours = model(family)
    ran, handles = count_calls(ours._tower.blocks)
    ours.read(pixels, ["blocks.0.resid_pre", site])
    for handle in handles:
        handle.remove()
    assert ran == expected


@pytest.mark.parametrize("family", WITH_TEXT)
def test_neither_blocks_after_the_last_site_nor_the_text_tower_run(family, model, pixels):
    ours = model(family)
    mlp = ours._anatomy.sites["blocks.2.mlp_out"].place.module
    tail = [mlp, ours._tower.final_norm]
    text = list(ours.module.text_model.modules())
    ran, handles = count_calls(tail)
    ran_text, text_handles = count_calls(text)
    ours.read(pixels, "blocks.2.attn_out")
    assert ran == []
    ours.read(pixels, ours.sites)
    assert ran == [0, 1]
    assert ran_text == []
    for handle in [*handles, *text_handles]:
        handle.remove()


class Layer(nn.Module):
    """An encoder layer that returns a tensor (transformers 5) or a tuple (before), as told."""

    def __init__(self, layer: nn.Module, kind: type) -> None:
        super().__init__()
        self.layer, self.kind = layer, kind
        parameters = list(inspect.signature(layer.forward).parameters.values())[1:]
        self.rest = [None for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD]

    def get_submodule(self, target: str) -> nn.Module:
        return self.layer.get_submodule(target)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, None]:
        x = first_tensor(self.layer(x, *self.rest))
        return x if self.kind is torch.Tensor else (x, None)


class Encoder(nn.Module):
    """Calls its layers as transformers does, before 5 and since."""

    def __init__(self, layers: nn.ModuleList, kind: type) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(layer, kind) for layer in layers])

    def forward(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        x = inputs_embeds
        for layer in self.layers:
            output = layer(x)
            x = output if isinstance(output, torch.Tensor) else output[0]
        return BaseModelOutput(last_hidden_state=x)


@pytest.mark.parametrize("kind", [torch.Tensor, tuple])
def test_layers_that_return_tensors_and_layers_that_return_tuples_read_and_edit_alike(
    kind, folder, model, pixels, monkeypatch
):
    def wrap(*args: Any) -> Any:
        module, missing = load(*args)
        module.vision_model.encoder = Encoder(module.vision_model.encoder.layers, kind)
        return module, missing

    plain = model("clip")
    load = loading._load_module
    monkeypatch.setattr(loading, "_load_module", wrap)
    wrapped = load_model(str(folder("clip")), device="cpu")
    assert isinstance(wrapped._tower.blocks[0](torch.zeros(2, 17, 32)), kind)
    assert wrapped.sites == plain.sites
    expected, found = plain.read(pixels, plain.sites), wrapped.read(pixels, plain.sites)
    for site in plain.sites:
        assert found[site].shape[0] == 4, "every image of the batch comes back"
        assert torch.equal(found[site], expected[site])
    edits = {"blocks.1.resid_post": lambda x: x * 2, "blocks.2.attn_out": lambda x: -x}
    with plain.edit(edits), wrapped.edit(edits):
        assert torch.equal(plain.embed_images(pixels), wrapped.embed_images(pixels))


def test_negative_blocks_count_from_the_end_and_keep_their_name_in_the_answer(model, pixels):
    ours = model("dinov2")
    assert ours.canonical_site("blocks.-1.resid_post") == "blocks.2.resid_post"
    read = ours.read(pixels, ["blocks.-3.mlp_out", "blocks.0.mlp_out"])
    assert torch.equal(read["blocks.-3.mlp_out"], read["blocks.0.mlp_out"])


@pytest.mark.parametrize("site", ["blocks.3.resid_post", "blocks.-4.resid_post", "resid_post", ""])
def test_an_unknown_site_is_refused_with_the_list_of_sites(site, model, pixels):
    with pytest.raises(UserError, match=r"blocks\.\{0\.\.2\}.*resid_post.*final_norm"):
        model("vit").read(pixels, site)


def test_a_misspelt_site_is_answered_with_a_similar_one(model):
    with pytest.raises(UserError, match=r"Did you mean .*blocks\.1\.resid_post"):
        model("vit").canonical_site("blocks.1.resid_pots")


@pytest.mark.unchecked
def test_pixels_of_a_wrong_shape_are_refused(model):
    with pytest.raises(UserError, match=r"\[batch, 3, height, width\]"):
        model("vit").read(torch.zeros(3, 32, 32), "final_norm")


def test_no_site_is_refused(model, pixels):
    with pytest.raises(UserError, match="No site"):
        model("vit").read(pixels, [])


def test_bfloat16_reads_bfloat16_close_to_float32(folder, model, pixels):
    half = load_model(str(folder("clip")), device="cpu", dtype="bfloat16")
    site = "blocks.2.resid_post"
    x, y = half.read(pixels, site)[site], model("clip").read(pixels, site)[site]
    assert x.dtype == half.dtype == torch.bfloat16
    assert (x.float() - y).norm() / y.norm() < 0.02
    assert half.embed_images(pixels).dtype == torch.float32


@every_family
def test_the_transform_gives_exactly_the_pixels_of_the_models_own_processor(family, folder, model):
    noise = np.random.default_rng(0).integers(0, 256, (75, 100, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    theirs = AutoImageProcessor.from_pretrained(folder(family), use_fast=False)
    expected = theirs(images=image, return_tensors="pt")["pixel_values"][0]
    ours = pickle.loads(pickle.dumps(model(family).transform))
    assert torch.equal(ours(image), expected)
    assert ours(image).dtype == torch.float32
    assert tuple(expected.shape) == model(family).input_shape


@every_family
def test_weights_hash_is_stable_and_belongs_to_the_weights(family, folder, model, tmp_path):
    again = load_model(str(folder(family)), device="cpu")
    assert again.weights_hash == model(family).weights_hash
    other = load_model(str(tiny_models.build(family, tmp_path / "other", seed=1)), device="cpu")
    assert other.weights_hash != again.weights_hash


def test_weights_hash_sees_one_changed_bit_and_swapped_blocks_but_no_text(folder):
    fresh = load_model(str(folder("clip")), device="cpu")
    before = fresh.weights_hash
    fresh.module.text_model.encoder.layers[0].mlp.fc1.bias.data.add_(1)
    assert weights_hash(fresh._weight_groups()) == before
    bits = fresh._tower.blocks[1].mlp.fc1.bias.data.view(torch.int32)
    bits[0] ^= 1
    assert weights_hash(fresh._weight_groups()) != before
    bits[0] ^= 1
    groups = fresh._weight_groups()
    groups["blocks.0"], groups["blocks.1"] = groups["blocks.1"], groups["blocks.0"]
    assert weights_hash(groups) != before


def test_a_classification_checkpoint_loads_without_its_head_and_hashes_the_same_twice(
    tmp_path, folder, pixels
):
    """Its pooler is in no file: it is random at every load, and part of no site."""
    config = ViTConfig.from_pretrained(folder("vit"), num_labels=5)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    processor = folder("vit") / "preprocessor_config.json"
    (tmp_path / processor.name).write_bytes(processor.read_bytes())
    first, second = (load_model(str(tmp_path), device="cpu") for _ in range(2))
    assert first.weights_hash == second.weights_hash
    assert torch.equal(first.embed_images(pixels), second.embed_images(pixels))
