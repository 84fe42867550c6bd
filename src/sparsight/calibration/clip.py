"""The small CLIP of the calibration world: its shape, its files and its zero-shot figures."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sparsight.calibration.captions import (
    CONTEXT_LENGTH,
    SPECIAL_TOKENS,
    TEMPLATES,
    WORD_TEMPLATES,
)
from sparsight.calibration.symbols import SYMBOLS
from sparsight.calibration.world import (
    IMAGE_SIZE,
    PATCH_SIZE,
    CalibrationWorld,
    WorldConfig,
    render,
    write_on,
)

HELD_OUT_SEED = 990_000


def new_clip(vocabulary_size: int) -> Any:
    """Return an untrained `transformers.CLIPModel` with the shape of the calibration CLIP."""
    from transformers import CLIPConfig, CLIPModel

    pad, end, start = range(len(SPECIAL_TOKENS))
    config = CLIPConfig(
        text_config={
            "vocab_size": vocabulary_size,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT_LENGTH,
            "pad_token_id": pad,
            "eos_token_id": end,
            "bos_token_id": start,
            "projection_dim": 128,
        },
        vision_config={
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "projection_dim": 128,
        },
        projection_dim=128,
    )
    # At 65 tokens plain attention is faster than the fused kernels, especially backwards.
    config._attn_implementation = "eager"
    return CLIPModel(config)


def to_input(images: UInt8[Tensor, "batch 64 64 3"]) -> Float[Tensor, "batch 3 64 64"]:
    """Convert images to what the model takes: channels first, −1 to 1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def tokenize(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return token ids and mask, padded to the longest text."""
    encoded = tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=CONTEXT_LENGTH,
        return_tensors="pt",
    )
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def embed_images(model: Any, pixels: Float[Tensor, "batch 3 64 64"]) -> Float[Tensor, "batch d"]:
    """Return unit-norm embeddings of images."""
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    return torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)


def embed_texts(model: Any, tokens: dict[str, Tensor]) -> Float[Tensor, "batch d"]:
    """Return unit-norm embeddings of tokenized texts."""
    pooled = model.text_model(**tokens).pooler_output
    return torch.nn.functional.normalize(model.text_projection(pooled), dim=-1)


@torch.no_grad()
def zero_shot_figures(model: Any, tokenizer: Any, n_scenes: int = 512) -> dict[str, float]:
    """Measure held-out zero-shot accuracy over all symbols, with the prompt "a photo of a ...".

    Args:
        model: a `transformers.CLIPModel`.
        tokenizer: its tokenizer.
        n_scenes: number of single-object scenes.

    Returns:
        `clean`: top-1 accuracy on scenes without a word; `attacked`: on the same scenes with
            another
        symbol's name written on them; `fooled`: share of those in which the written name wins;
        `reads`: top-1 accuracy of the word among prompts that ask for written words.
    """
    device = model.visual_projection.weight.device
    world = CalibrationWorld(n_scenes, HELD_OUT_SEED, WorldConfig.single())
    rng = np.random.default_rng(HELD_OUT_SEED)
    scenes = [world.scene(index) for index in range(n_scenes)]
    labels = torch.tensor([SYMBOLS.index(scene.label) for scene in scenes])
    steps = torch.from_numpy(1 + (rng.random(n_scenes) * (len(SYMBOLS) - 1)).astype(int))
    words = (labels + steps) % len(SYMBOLS)
    attacked = [
        write_on(scene, SYMBOLS[word], rng)
        for scene, word in zip(scenes, words.tolist(), strict=True)
    ]

    def class_of(some_scenes: Sequence[Any], template: str) -> Tensor:
        prompts = [template.format(symbol) for symbol in SYMBOLS]
        tokens = tokenize(tokenizer, prompts)
        weights = embed_texts(model, {name: each.to(device) for name, each in tokens.items()})
        found = []
        for first in range(0, len(some_scenes), 128):
            images = np.stack([render(scene).image for scene in some_scenes[first : first + 128]])
            embeddings = embed_images(model, to_input(torch.from_numpy(images)).to(device))
            found.append((embeddings @ weights.T).argmax(dim=-1).cpu())
        return torch.cat(found)

    on_clean = class_of(scenes, TEMPLATES[0])
    on_attacked = class_of(attacked, TEMPLATES[0])
    read = class_of(attacked, WORD_TEMPLATES[0])

    def share(hits: Tensor) -> float:
        return round(hits.float().mean().item(), 4)

    return {
        "clean": share(on_clean == labels),
        "attacked": share(on_attacked == labels),
        "fooled": share(on_attacked == words),
        "reads": share(read == words),
    }


def export(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model (float16), tokenizer and image processor in the format of `transformers`."""
    from transformers import CLIPImageProcessor

    folder.mkdir(parents=True, exist_ok=True)
    # A copy: saving touches the configuration, and a compiled model would have to compile again.
    copy.deepcopy(model).half().cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(folder)
    for file in folder.iterdir():
        # safetensors gives its file to its owner alone, but everybody reads a package.
        file.chmod(0o644)
