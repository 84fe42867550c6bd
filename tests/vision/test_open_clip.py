"""open_clip's models, loaded with `load_model`; needs the extra `open-clip`."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from malicious_pickle import Opens
from sparsight.errors import SparsightError, UserError
from sparsight.vision import load_model

open_clip = pytest.importorskip(
    "open_clip", reason="open_clip is not installed (extra open-clip)", exc_type=ImportError
)

TINY = {
    "embed_dim": 20,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny architecture that open_clip knows by name, and a file with its random weights."""

    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "ViT-tiny-test.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-tiny-test")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


@pytest.fixture(scope="module")
def ours(checkpoint):
    return load_model(f"open_clip:ViT-tiny-test/{checkpoint}", device="cpu")


@pytest.fixture(scope="module")
def theirs(checkpoint):
    return open_clip.create_model("ViT-tiny-test", pretrained=str(checkpoint)).eval()


@torch.no_grad()
def test_images_and_texts_embed_as_in_open_clip(ours, theirs, pixels):
    assert torch.equal(ours.embed_images(pixels), theirs.encode_image(pixels))
    texts = ["a photo of a cat", "the sun"]
    tokens = open_clip.get_tokenizer("ViT-tiny-test")(texts)
    torch.testing.assert_close(ours.embed_texts(texts), theirs.encode_text(tokens))
    assert ours.logit_scale == pytest.approx(float(theirs.logit_scale.exp()))


@torch.no_grad()
def test_sites_are_the_streams_of_open_clip(ours, theirs, pixels):
    inside = theirs.visual.forward_intermediates(pixels, indices=3, normalize_intermediates=False)
    read = ours.read(pixels, ours.sites)
    for i, patches in enumerate(inside["image_intermediates"]):
        stream = read[f"blocks.{i}.resid_post"][:, 1:]
        assert torch.equal(stream.transpose(1, 2).reshape(patches.shape), patches)
        parts = [read[f"blocks.{i}.{part}"] for part in ("resid_pre", "attn_out", "mlp_out")]
        torch.testing.assert_close(sum(parts), read[f"blocks.{i}.resid_post"])
        mlp = theirs.visual.transformer.resblocks[i].mlp
        torch.testing.assert_close(
            mlp.gelu(read[f"blocks.{i}.mlp_pre"]), read[f"blocks.{i}.mlp_post"]
        )
        torch.testing.assert_close(mlp.c_proj(read[f"blocks.{i}.mlp_post"]), parts[2])
    assert read["final_norm"].shape == (4, 17, 64)
    assert torch.equal(read["embedding"][:, 0], theirs.encode_image(pixels))
    assert (ours.n_prefix, ours.has_cls, ours.patch_grid) == (1, True, (4, 4))


def test_the_transform_is_open_clips_own(ours, theirs):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 100, 3), dtype=np.uint8))
    settings = open_clip.get_model_preprocess_cfg(theirs)
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**settings), is_train=False
    )
    assert torch.equal(pickle.loads(pickle.dumps(ours.transform))(image), preprocess(image))
    assert ours.preprocessing["library"] == "open_clip"


def test_edits_take_effect_and_are_removed(ours, pixels):
    plain = ours.embed_images(pixels)
    with ours.edit(dict.fromkeys(ours.sites, torch.clone)):
        assert torch.equal(ours.embed_images(pixels), plain)
    with ours.edit({"blocks.1.mlp_out": torch.zeros_like}):
        assert not torch.allclose(ours.embed_images(pixels), plain)
    assert torch.equal(ours.embed_images(pixels), plain)


def test_a_misspelt_name_is_answered_with_a_similar_one():
    with pytest.raises(UserError, match=r"no model 'ViT-B-23'.*ViT-B-32"):
        load_model("open_clip:ViT-B-23/openai")


def test_unknown_weights_are_refused_with_the_known_tags():
    with pytest.raises(UserError, match=r"'laion' is neither a tag.*laion2b_s34b_b79k"):
        load_model("open_clip:ViT-B-32/laion")
    with pytest.raises(UserError, match="'' is neither a tag"):
        load_model("open_clip:ViT-B-32")


def test_damaged_weights_are_refused(checkpoint, tmp_path):
    path = tmp_path / "cut.pt"
    path.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(SparsightError, match=r"could not load|damaged"):
        load_model(f"open_clip:ViT-tiny-test/{path}")


def test_code_in_weights_is_not_run(checkpoint, tmp_path):
    path, made = tmp_path / "weights.pt", tmp_path / "made"
    torch.save({"logit_scale": Opens(made)}, path)
    with pytest.raises(SparsightError, match="does not run code in weights") as caught:
        load_model(f"open_clip:ViT-tiny-test/{path}")
    assert not made.exists()
    assert "weights_only" not in str(caught.value)


def test_mixtures_of_words_run_through_the_text_tower(ours):
    from sparsight.attacks import clip_opinion
    from sparsight.vision.soft_text import SoftText

    text = SoftText(ours)
    names = list(text.words.values())
    chosen = torch.tensor([[names.index("cat"), names.index("sun")]])
    with torch.no_grad():
        torch.testing.assert_close(text.embed_ids(chosen), ours.embed_texts(["cat sun"]))
    images = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    (opinion,) = clip_opinion(ours, images, words=2, steps=3, swaps=1)
    with torch.no_grad():
        random = ours.embed_texts(
            [f"{one} {two}" for one, two in zip(names[:40], names[40:80], strict=True)]
        )
    cosines = torch.nn.functional.cosine_similarity(random, images)
    assert opinion.similarity > float(cosines.max())


def test_code_beside_a_text_tower_is_neither_run_nor_asked_about(tmp_path, monkeypatch, checkpoint):
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass C: pass\n")
    auto_map = {"AutoConfig": "code.C", "AutoTokenizer": ["code.C", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": auto_map}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    towers = {
        "a text tower": {"hf_model_name": str(tmp_path)},
        "a tokenizer": {
            **TINY["text_cfg"],
            "hf_tokenizer_name": str(tmp_path),
            "tokenizer_kwargs": {"trust_remote_code": True},
        },
    }
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for text in towers.values():
        described = {"model_cfg": {**TINY, "text_cfg": text}, "preprocess_cfg": {"size": 32}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
        torch.save(torch.load(checkpoint), tmp_path / "open_clip_pytorch_model.bin")
        with pytest.raises(UserError, match=r"code"):
            load_model(f"open_clip:local-dir:{tmp_path}", device="cpu").embed_texts(["a cat"])
        assert not ran.exists()
