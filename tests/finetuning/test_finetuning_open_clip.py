"""A CLIP from open_clip can be fine-tuned like any other; this needs the extra `open-clip`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sparsight.finetuning import FinetuneConfig, NeuronScaling, finetune
from sparsight.finetuning.groups import PARTS, members
from sparsight.images import open_images
from sparsight.vision import load_model
from tiny_clips import OPEN_CLIP, open_clip_module

open_clip = pytest.importorskip(
    "open_clip", reason="open_clip is not installed (extra open-clip)", exc_type=ImportError
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    torch.manual_seed(0)
    module = open_clip_module(open_clip, quick_gelu=True)
    torch.save(module.state_dict(), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {**OPEN_CLIP, "quick_gelu": True}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return load_model(f"open_clip:local-dir:{folder}", device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label in ("cat", "dog", "sun"):
        (folder / label).mkdir()
        for i in range(4):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return open_images(folder)


def test_every_part_is_found(model):
    assert {member.part for member in members(model)} == set(PARTS)


@pytest.mark.parametrize("layout", ["open_clip", "huggingface"])
def test_it_is_trained_and_exported(model, photos, layout, tmp_path):
    config = FinetuneConfig(
        steps=2, batch_size=6, lr=1e-3, log_every=1, parametrisation="geometric",
        scaling=NeuronScaling(5.0, top=2, until=1.0),
    )  # fmt: skip
    run = finetune(
        model, photos, config, tmp_path / "run", attack=photos, layout=layout, workers=0, quiet=True
    )
    pixels = torch.stack([model.transform(photos.load(i)) for i in range(3)])
    tuned = run.model("cpu")
    with torch.no_grad():
        before, after = (m.embed_images(pixels) for m in (model, tuned))
        texts = tuned.embed_texts(["a cat"])
    assert 1e-4 < float((after - before).norm() / before.norm()) < 2
    assert texts.shape[1] == after.shape[1]
    assert min(run.metrics()[-1]["gradient_norms"].values()) > 0
