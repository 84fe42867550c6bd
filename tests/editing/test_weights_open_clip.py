"""GmP and Long-CLIP in open_clip's own classes; needs the extra `open-clip`."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from sparsight.editing import (
    keep_positions,
    lengthen,
    merge_positions,
    parametrize,
    to_plain,
)
from sparsight.vision import load_model
from sparsight.vision.layouts import RES
from sparsight.vision.saving import write_model

open_clip = pytest.importorskip(
    "open_clip", reason="open_clip is not installed (extra open-clip)", exc_type=ImportError
)

CONFIG = {
    "embed_dim": 20,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
}
TEXTS = ["a photo of a cat", "the SUN, in 1987!", "it's a red umbrella"]
LONG = "a cat sits beside a red umbrella and a dog looks at the sun " * 8


@pytest.fixture(scope="module", params=["CLIP", "CustomTextCLIP"])
def theirs(request, tmp_path_factory):
    """A module of open_clip's, and ours of the same weights."""
    folder = tmp_path_factory.mktemp("local")
    torch.manual_seed(0)
    module = getattr(open_clip.model, request.param)(**CONFIG).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save(module.state_dict(), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {**CONFIG, "custom_text": request.param != "CLIP"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return module, load_model(f"open_clip:local-dir:{folder}", device="cpu")


@pytest.fixture
def pixels():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_geometric_parametrisation_of_open_clips_class(theirs, tmp_path, pixels):
    module, model = theirs
    plain = copy.deepcopy(module).double()
    split = parametrize(copy.deepcopy(plain))
    tokens = open_clip.tokenize(TEXTS)
    with torch.enable_grad():
        for each in (split, plain):
            images = each.encode_image(pixels.double())
            (images.square().sum() + each.encode_text(tokens).sum()).backward()
    same = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(
        split.encode_image(pixels.double()), plain.encode_image(pixels.double()), **same
    )
    torch.testing.assert_close(split.encode_text(tokens), plain.encode_text(tokens), **same)
    text = "" if hasattr(module, "transformer") else "text."
    for name in (
        "visual.transformer.resblocks.1.mlp.c_fc",
        f"{text}transformer.resblocks.0.mlp.c_proj",
    ):
        layer, gradient = split.get_submodule(name), plain.get_submodule(name).weight.grad
        unit = layer.theta / layer.theta.norm(dim=1, keepdim=True)
        along = (gradient * unit).sum(dim=1, keepdim=True)
        torch.testing.assert_close(layer.r.grad, along, **same)
        torch.testing.assert_close(layer.theta.grad, layer.r * (gradient - along * unit), **same)

    trained = copy.copy(model)
    trained.module = parametrize(copy.deepcopy(module))
    saved = write_model(trained, tmp_path / "gmp.safetensors", "openai", gmp=True)
    if hasattr(module, "transformer"):  # its names are OpenAI's: none is missing or left over
        fresh = parametrize(copy.deepcopy(module))
        fresh.load_state_dict(load_file(saved.path))
        torch.testing.assert_close(
            fresh.encode_image(pixels), module.encode_image(pixels), rtol=1e-4, atol=1e-5
        )
    for layout in ("huggingface", "openai", "open_clip"):
        assert write_model(trained, tmp_path / layout, layout).difference < 1e-5
    back = to_plain(trained.module).state_dict()
    for key, value in module.state_dict().items():
        torch.testing.assert_close(back[key], value, rtol=1e-6, atol=0)


@torch.no_grad()
def test_long_texts_in_open_clips_class(theirs, tmp_path):
    module, model = theirs
    before = module.encode_text(open_clip.tokenize(TEXTS))
    longer = copy.copy(model)
    longer.module = lengthen(copy.deepcopy(module))
    holder = getattr(longer.module, "text", longer.module)
    assert longer.context_length == 248
    assert holder.positional_embedding.shape == (248, 24)
    torch.testing.assert_close(longer.embed_texts(TEXTS), before, rtol=1e-4, atol=1e-5)
    tokens = longer.tokenize([LONG], truncate=False)["input_ids"]
    assert tokens.shape == (1, 248)
    assert int(tokens.argmax()) > 77

    holder.positional_embedding_res[20:] += 0.2
    expected = longer.embed_texts([*TEXTS, LONG])
    for layout in ("huggingface", "open_clip", "openai"):
        saved = write_model(longer, tmp_path / layout, layout)
        assert saved.difference < 1e-5
        again = load_model(saved.loads_as, device="cpu")
        assert again.context_length == 248
        torch.testing.assert_close(
            again.embed_texts([*TEXTS, LONG]), expected, rtol=1e-4, atol=1e-5
        )
    path = tmp_path / "long.safetensors"
    write_model(longer, path, "openai", long=True)
    assert load_file(path)[RES].shape == (248, 24)
    kind = type(module)
    assert type(merge_positions(longer.module)) is kind
    assert longer.module.state_dict().keys() == module.state_dict().keys()
    torch.testing.assert_close(longer.embed_texts([*TEXTS, LONG]), expected)


def test_only_the_positions_after_the_kept_ones_are_trained(theirs):
    module = lengthen(copy.deepcopy(theirs[0])).requires_grad_(True)
    holder = getattr(module, "text", module)
    tokens = open_clip.tokenize([LONG], context_length=248)
    module.encode_text(tokens).square().sum().backward()
    assert any(parameter is holder.positional_embedding_res for parameter in module.parameters())
    gradient = holder.positional_embedding_res.grad
    end = int(tokens.argmax()) + 1
    assert not gradient[:20].any()
    assert gradient[20:end].abs().sum(dim=1).gt(0).all()
    assert holder._parameters["positional_embedding"].grad is None
    again = keep_positions(copy.deepcopy(module), 30)
    assert getattr(again, "text", again).kept_positions == 30
