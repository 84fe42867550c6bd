"""Small real parts: a folder of JPEGs, a CLIP with random weights, and what a store holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from sparsight.activations import ActivationSource

BLOCK_0, BLOCK_1 = "blocks.0.resid_post", "blocks.1.resid_post"
N_IMAGES = 23

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def save_clip(folder: Path) -> Path:
    """A CLIP vision tower: 2 blocks, width 32, 32-pixel pictures, 2 × 2 patches + CLS."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=16,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)
    return folder


def save_photos(folder: Path, n: int = N_IMAGES, broken: tuple[int, ...] = ()) -> Path:
    """JPEGs of smooth noise in two sub-folders; the broken ones are cut off."""
    random = np.random.default_rng(0)
    for i in range(n):
        small = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        path = folder / ("even" if i % 2 == 0 else "odd") / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((40, 32), Image.Resampling.BICUBIC).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:100])
    return folder


def everything(source: ActivationSource, site: str) -> Tensor:
    """All activations of a site [images, tokens, d_in], in order."""
    return torch.cat([batch.activations[site] for batch in source.ordered([site], 7)])


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def flip_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
