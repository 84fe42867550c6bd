"""A model's own files are not believed: what is wrong in them is named, code in them is not run."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AltCLIPConfig, AltCLIPModel

import tiny_models
from sparsight.errors import UserError
from sparsight.vision import load_model

SITE = "blocks.-1.resid_post"
DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"

Edited = Callable[..., str]


@pytest.fixture
def edited(folder, tmp_path) -> Edited:
    """A copy of a family's folder in which a JSON file has other values, or another text."""

    def copy(family: str, name: str, values: dict[str, Any] | str) -> str:
        place = tmp_path / "m"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder(family), place)
        found = place / name
        old = json.loads(found.read_text()) if found.exists() else {}
        text = values if isinstance(values, str) else json.dumps({**old, **values})
        found.write_text(text)
        return str(place)

    return copy


@pytest.mark.parametrize(
    "switches",
    [
        {"return_dict": False},
        {"use_return_dict": False, "torchscript": True},
        {"output_hidden_states": True, "output_attentions": True, "attn_implementation": "sdpa"},
        {"attn_implementation": "flash_attention_2", "gradient_checkpointing": True},
        {"attn_implementation": "kernels-community/flash-attn", "use_cache": True},
        {"dtype": "nonsense", "torch_dtype": "float16"},
        {"auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}},
    ],
)
@pytest.mark.parametrize("family", ["clip", "dinov2"])
def test_switches_in_a_config_change_nothing(switches, family, edited, model, pixels):
    if family == "clip":
        inner = model("clip").module.config.vision_config.to_diff_dict()
        switches = {**switches, "vision_config": {**inner, **switches}}
    ours = load_model(edited(family, "config.json", switches), device="cpu")
    assert torch.equal(ours.read(pixels, SITE)[SITE], model(family).read(pixels, SITE)[SITE])
    assert torch.equal(ours.embed_images(pixels), model(family).embed_images(pixels))
    assert ours.weights_hash == model(family).weights_hash


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "32"}, r"config\.json: hidden_size is '32'; expected a whole number"),
        ({"hidden_size": float("nan")}, r"config\.json: hidden_size is nan"),
        ({"num_hidden_layers": -3}, r"config\.json: num_hidden_layers is -3"),
        ({"num_hidden_layers": None}, r"config\.json.*num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000; .* to 1,000"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0"),
        ({"patch_size": [[8]]}, r"patch_size is \[\[8\]\]"),
        ({"patch_size": [8]}, r"patch_size is \[8\]; expected .* height and width"),
        ({"image_size": 10**400}, r"image_size is 1000"),
        ({"image_size": True}, r"image_size is True"),
        ({"layer_norm_eps": "small"}, r"layer_norm_eps is 'small'"),
        ({"hidden_act": "zork"}, r"hidden_act is 'zork'; expected the name of an activation"),
        ({"initializer_range": "x"}, r"config\.json.*initializer_range"),
        ({"id2label": ["cat"]}, r"id2label is \['cat'\]"),
        ({"architectures": "ViTModel"}, r"architectures is 'ViTModel'"),
        ({"model_type": ["vit"]}, r"model_type is \['vit'\]"),
        ({"model_type": "vit2"}, r"does not know the model_type 'vit2'. A newer"),
        ({"quantization_config": {"quant_method": "awq"}}, r"weights are quantised"),
        ("[1, 2]", r"config\.json: .*holds a list"),
        (DEEP, r"config\.json: is missing, damaged or cut off"),
        (
            {"a": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]},
            r"a has more than 32 nested",
        ),
    ],
)
def test_an_impossible_value_is_named_with_its_field_and_file(values, message, edited):
    with pytest.raises(UserError, match=message) as told:
        load_model(edited("vit", "config.json", values), device="cpu")
    assert "\n" not in str(told.value)


def test_a_field_of_the_vision_part_is_named_in_full(edited):
    with pytest.raises(UserError, match=r"config\.json: vision_config\.patch_size is 'eight'"):
        load_model(edited("clip", "config.json", {"vision_config": {"patch_size": "eight"}}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "large"}, r"size is 'large'; expected sides"),
        ({"size": {"height": -4, "width": 32}}, r"size is .*-4"),
        ({"size": {"height": 10**6, "width": 10**6}}, r"size is .* to 8,192 pixels"),
        ({"image_mean": [float("nan")] * 3}, r"image_mean is \[nan"),
        ({"image_mean": [0.5, 0.5]}, r"preprocessor_config\.json"),
        ({"image_std": [0, 0, 0]}, r"image_std is \[0, 0, 0\]; expected finite numbers above 0"),
        ({"image_std": "0.5"}, r"image_std is '0\.5'"),
        ({"rescale_factor": None, "do_rescale": True}, r"preprocessor_config\.json"),
        ({"do_resize": "yes"}, r"do_resize is 'yes'; expected true or false"),
        ({"resample": 17}, r"resample is 17"),
        ({"image_processor_type": 3}, r"image_processor_type is 3"),
        (DEEP, r"preprocessor_config\.json: is missing, damaged or cut off"),
    ],
)
def test_a_processor_that_cannot_work_is_named_with_its_field(values, message, edited):
    with pytest.raises(UserError, match=message) as told:
        load_model(edited("vit", "preprocessor_config.json", values), device="cpu")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [("tokenizer.json", '{"model": 5}'), ("tokenizer_config.json", DEEP)],
)
def test_a_tokenizer_that_cannot_be_read_is_one_error_at_the_first_text(name, values, edited):
    ours = load_model(edited("clip", name, values), device="cpu")
    with pytest.raises(UserError, match="its tokenizer could not be loaded"):
        ours.embed_texts(["a cat"])


@pytest.fixture
def code(monkeypatch, tmp_path) -> Callable[[str], Path]:
    """Put code into a model's folder, and answer yes if asked whether to run it."""

    def put(folder: str) -> Path:
        ran = tmp_path / "ran"
        text = f"open({str(ran)!r}, 'w').close()\nclass C: pass\n"
        (Path(folder) / "code.py").write_text(text)
        return ran

    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    return put


def test_a_model_that_needs_its_own_code_is_refused_and_it_is_not_run(edited, code):
    values = {"model_type": "homemade", "auto_map": {"AutoConfig": "code.C"}}
    folder = edited("vit", "config.json", values)
    ran = code(folder)
    with pytest.raises(UserError, match=r"'homemade'\. It needs code .* never runs") as caught:
        load_model(folder)
    assert not ran.exists() and "\n" not in str(caught.value)


def test_a_known_model_is_loaded_with_the_librarys_code(edited, code, model):
    values = {"auto_map": {"AutoConfig": "code.C", "AutoModel": "code.C"}}
    folder = edited("vit", "config.json", values)
    ran = code(folder)
    assert load_model(folder, device="cpu").weights_hash == model("vit").weights_hash
    assert not ran.exists()


def test_processors_and_tokenizers_never_run_their_own_code(edited, code):
    auto_map = {"auto_map": {"AutoImageProcessor": "code.C"}, "image_processor_type": "C"}
    folder = edited("vit", "preprocessor_config.json", auto_map)
    config = Path(folder) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "pixio"}))
    ran = code(folder)
    with pytest.raises(UserError, match=r"preprocessor_config\.json.*needs code"):
        load_model(folder, device="cpu")
    folder = edited(
        "clip",
        "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": ["code.C", None]}, "tokenizer_class": "C"},
    )
    code(folder)
    ours = load_model(folder, device="cpu")
    try:
        ours.embed_texts(["a cat"])  # a known family's own tokenizer, or none
    except UserError as error:
        assert "asks for code" in str(error)
    assert not ran.exists()


def test_texts_are_cut_where_the_positions_of_a_roberta_end(tmp_path):
    """The first position stands behind the padding's: of 18, 16 can be used."""
    torch.manual_seed(0)
    text = {**tiny_models.text_tower(), "max_position_embeddings": 18, "pad_token_id": 1}
    config = AltCLIPConfig(
        vision_config={**tiny_models.TOWER, "intermediate_size": 64},
        text_config={**text, "project_dim": 20},
        projection_dim=20,
    )
    AltCLIPModel(config).save_pretrained(tmp_path)
    tiny_models.vit_processor().save_pretrained(tmp_path)
    tiny_models.tokenizer(length=99).save_pretrained(tmp_path)
    ours = load_model(str(tmp_path), device="cpu")
    assert ours.context_length == 16
    assert ours.embed_texts(["cat " * 40]).shape == (1, 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_have_the_same_scale_in_half_precision(dtype, folder, model):
    ours = load_model(str(folder("siglip")), device="cpu", dtype=dtype)
    assert ours.logit_scale == model("siglip").logit_scale
    assert ours.logit_bias == model("siglip").logit_bias
    assert {weight.dtype for weight in ours.tower.module.parameters()} == {dtype}
