"""Folding into open_clip's models; needs the extra `open-clip`."""

from __future__ import annotations

import json

import pytest
import torch

from sparsight.editing import DirectionAblation, NeuronEdit, Set, every_write, fold, intervene
from sparsight.vision import load_model

open_clip = pytest.importorskip(
    "open_clip", reason="open_clip is not installed (extra open-clip)", exc_type=ImportError
)

TINY = {
    "embed_dim": 20,
    "vision_cfg": {
        "image_size": 32,
        "layers": 3,
        "width": 64,
        "head_width": 32,
        "patch_size": 8,
        "ls_init_value": 0.5,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "ViT-tiny-fold.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-tiny-fold")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save(model.state_dict(), folder / "weights.pt")
    return load_model(f"open_clip:ViT-tiny-fold/{folder / 'weights.pt'}", device="cpu")


def rows(d: int) -> torch.Tensor:
    return torch.randn(3, d, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize(
    "edits",
    [
        lambda model: DirectionAblation(rows(20), "embedding"),
        lambda model: DirectionAblation(rows(64), "final_norm"),
        lambda model: DirectionAblation(rows(64), "blocks.1.attn_out", mean=torch.ones(64)),
        lambda model: NeuronEdit("blocks.2.mlp_post", [3, 5], Set(0.3)),
        lambda model: NeuronEdit("blocks.0.mlp_pre", [3, 5], Set(0.3)),
        lambda model: every_write(model, rows(64), embeddings=False),
    ],
    ids=["embedding", "final norm", "attention", "after neurons", "before neurons", "every write"],
)
def test_the_folded_state_dict_in_a_plain_open_clip_is_the_intervention(model, pixels, edits):
    edits = edits(model)
    with intervene(model, edits):
        wanted = model.embed_images(pixels)
    plain = open_clip.create_model("ViT-tiny-fold").eval()
    plain.load_state_dict(fold(model, edits).module.state_dict())
    found = plain.encode_image(pixels)
    assert float((wanted - model.embed_images(pixels)).norm() / wanted.norm()) > 1e-3
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
