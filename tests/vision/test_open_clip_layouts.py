"""open_clip's own CLIP has OpenAI's layout: an independent check of every conversion."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from sparsight.errors import UserError
from sparsight.vision import load_model
from sparsight.vision.layouts import to_openai
from sparsight.vision.saving import save_model, write_model
from tiny_clips import OPEN_CLIP, open_clip_module, shake

open_clip = pytest.importorskip(
    "open_clip", reason="open_clip is not installed (extra open-clip)", exc_type=ImportError
)

TEXTS = ["a photo of a cat", "the SUN, in 1987!", "it's a red umbrella"]


@pytest.fixture(scope="module", params=[True, False], ids=["quick_gelu", "gelu"])
def theirs(request, tmp_path_factory):
    """A folder that open_clip loads, its module, and ours."""
    folder = tmp_path_factory.mktemp("local")
    torch.manual_seed(0)
    module = open_clip_module(open_clip, quick_gelu=request.param)
    torch.save(module.state_dict(), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {**OPEN_CLIP, "quick_gelu": request.param}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return module, load_model(f"open_clip:local-dir:{folder}", device="cpu")


@torch.no_grad()
def test_transformers_embed_as_open_clip_does(theirs, tmp_path, pixels):
    module, model = theirs
    saved = write_model(model, tmp_path / "hf")
    assert saved.difference < 1e-5
    again = load_model(str(saved.path), device="cpu")
    torch.testing.assert_close(
        again.embed_images(pixels), module.encode_image(pixels), rtol=1e-5, atol=1e-5
    )
    tokens = open_clip.tokenize(TEXTS)
    torch.testing.assert_close(
        again.embed_texts(TEXTS), module.encode_text(tokens), rtol=1e-5, atol=1e-5
    )
    assert again.logit_scale == pytest.approx(float(module.logit_scale.exp()))
    act = type(module.visual.transformer.resblocks[0].mlp.gelu).__name__
    said = {"QuickGELU": "quick_gelu", "GELU": "gelu"}[act]
    assert again.module.config.vision_config.hidden_act == said
    assert again.module.config.text_config.hidden_act == said
    from transformers import CLIPProcessor

    ids = CLIPProcessor.from_pretrained(saved.path)(text=TEXTS[:1])["input_ids"][0]
    assert ids == tokens[0][: len(ids)].tolist()
    assert again.preprocessing["image_mean"] == pytest.approx(model.preprocessing["mean"])


@torch.no_grad()
def test_around_all_three_layouts_and_back_keeps_every_bit(theirs, tmp_path, pixels):
    module, model = theirs
    first = load_model(str(save_model(model, tmp_path / "hf")), device="cpu")
    second = load_model(str(save_model(first, tmp_path / "openai", "openai")), device="cpu")
    last = load_model(str(save_model(second, tmp_path / "oc", "open_clip")), device="cpu")
    assert last.id.startswith("open_clip:local-dir:")
    end = last.module.state_dict()
    assert end.keys() == module.state_dict().keys()
    assert all(torch.equal(end[key], value) for key, value in module.state_dict().items())
    assert torch.equal(last.embed_images(pixels), model.embed_images(pixels))
    assert torch.equal(last.embed_texts(TEXTS), model.embed_texts(TEXTS))
    assert last.preprocessing == model.preprocessing


@torch.no_grad()
def test_the_same_weights_in_both_classes_give_the_same(pixels, tmp_path):
    """From transformers' side: a CLIPModel in OpenAI's layout, in open_clip's class."""
    ours = load_model("calibration", device="cpu")
    saved = write_model(ours, tmp_path / "oc", "open_clip")
    assert saved.difference < 1e-5
    model = open_clip.create_model(f"local-dir:{saved.path}").eval()
    state = model.state_dict()
    expected = to_openai(ours.module.state_dict())
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        model.encode_image(images), ours.embed_images(images), rtol=1e-5, atol=1e-5
    )
    tokenizer = open_clip.get_tokenizer(f"local-dir:{saved.path}")
    texts = ["a photo of a sun", "a red anchor"]
    torch.testing.assert_close(
        model.encode_text(tokenizer(texts)), ours.embed_texts(texts), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_custom_text_towers_of_open_clips_own_kind_are_saved_too(tmp_path, pixels):
    module = shake(open_clip.model.CustomTextCLIP(**OPEN_CLIP, quick_gelu=True)).eval()
    folder = tmp_path / "custom"
    folder.mkdir()
    torch.save(module.state_dict(), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {**OPEN_CLIP, "quick_gelu": True, "custom_text": True}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = load_model(f"open_clip:local-dir:{folder}", device="cpu")
    saved = write_model(model, tmp_path / "hf")
    assert saved.difference < 1e-5


@torch.no_grad()
def test_the_loader_of_openais_files_reads_a_pt_file(tmp_path, pixels):
    """open_clip's copy of OpenAI's `build_model`, which reads weights alone."""
    config = copy.deepcopy(OPEN_CLIP)
    config["vision_cfg"]["head_width"] = 64
    config["text_cfg"].update(width=64, heads=1)
    folder = tmp_path / "local"
    folder.mkdir()
    module = shake(open_clip.model.CLIP(**config, quick_gelu=True)).eval()
    torch.save(module.state_dict(), folder / "open_clip_pytorch_model.bin")
    said = {"model_cfg": {**config, "quick_gelu": True}}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    model = load_model(str(folder), device="cpu")
    saved = write_model(model, tmp_path / "clip.pt", "openai")
    assert saved.notes == ()
    state = torch.load(saved.path, weights_only=True)
    theirs = open_clip.model.build_model_from_openai_state_dict(state, cast_dtype=torch.float32)
    theirs.float()
    # open_clip rounds weights to float16 on loading.
    torch.testing.assert_close(
        theirs.encode_image(pixels), model.embed_images(pixels), rtol=2e-2, atol=2e-2
    )
    tokens = open_clip.tokenize(TEXTS)
    torch.testing.assert_close(
        theirs.encode_text(tokens), model.embed_texts(TEXTS), rtol=2e-2, atol=2e-2
    )


def test_features_that_clip_lacks_are_refused_by_name(theirs, tmp_path):
    _, model = theirs
    odd = copy.copy(model)
    odd.module = copy.deepcopy(model.module)
    odd.module.visual.pool_type = "avg"
    with pytest.raises(UserError, match="images pooled by 'avg'"):
        save_model(odd, tmp_path / "x")
    odd.module = copy.deepcopy(model.module)
    odd.module.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(UserError, match="'extra' does not belong"):
        save_model(odd, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_long_texts_are_refused_without_truncation(theirs):
    _, model = theirs
    with pytest.raises(UserError, match=r"Text 1 of 1 .* it has 102 tokens, and 77 fit"):
        model.embed_texts(["cat " * 100], truncate=False)
    assert model.tokenize(["cat " * 100])["input_ids"].shape == (1, 77)
    assert model.tokenize(["cat"], truncate=False)["input_ids"].shape == (1, 77)


def test_single_files_use_the_tokenizer_of_open_clip_if_the_hub_is_out_of_reach(theirs, tmp_path):
    _, model = theirs
    path = save_model(model, tmp_path / "clip.safetensors", "openai")
    again = load_model(str(path), device="cpu")
    torch.testing.assert_close(again.embed_texts(TEXTS), model.embed_texts(TEXTS))
