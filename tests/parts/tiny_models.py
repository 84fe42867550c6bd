"""Small real models with random weights, saved as `save_pretrained` saves them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

WORDS = "a photo of the cat dog sun anchor drawing red blue . itap many".split()  # noqa: SIM905
TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
FAMILIES = ("clip", "siglip", "dinov2", "dinov2_with_registers", "vit")
WITH_TEXT = ("clip", "siglip")

transformers.utils.logging.set_verbosity_error()


def build(family: str, folder: Path, seed: int = 0) -> Path:
    """Save a random model of `family` with its processor (and tokenizer) to `folder`."""
    torch.manual_seed(seed)
    model, processor = {
        "clip": _clip,
        "siglip": _siglip,
        "dinov2": _dinov2,
        "dinov2_with_registers": _registers,
        "vit": _vit,
    }[family]()
    _shake(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if family in WITH_TEXT:
        tokenizer().save_pretrained(folder)
    return folder


def tokenizer(length: int = 16) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<start>", *WORDS, "<end>"])}
    tok = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    end = vocabulary["<end>"]
    tok.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=length,
    )


def _shake(model: torch.nn.Module) -> None:
    """Biases, norms, LayerScale and registers away from 0 and 1, so that each one matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def text_tower(end: int = len(WORDS) + 3) -> dict[str, int]:
    return {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(WORDS) + 4,
        "max_position_embeddings": 16,
        "bos_token_id": 2,
        "eos_token_id": end,
        "pad_token_id": 0,
    }


def _clip() -> tuple[CLIPModel, CLIPImageProcessor]:
    config = CLIPConfig(
        text_config=text_tower(),
        vision_config={**TOWER, "intermediate_size": 64, "projection_dim": 20},
        projection_dim=20,
    )
    size = {"shortest_edge": 32}
    crop = {"height": 32, "width": 32}
    return CLIPModel(config), CLIPImageProcessor(size=size, crop_size=crop)


def _siglip() -> tuple[SiglipModel, SiglipImageProcessor]:
    config = SiglipConfig(
        text_config={**text_tower(), "projection_size": 32},
        vision_config={**TOWER, "intermediate_size": 64},
    )
    return SiglipModel(config), SiglipImageProcessor(size={"height": 32, "width": 32})


def _dinov2() -> tuple[Dinov2Model, BitImageProcessor]:
    # As in the published ones: position embeddings for a larger picture, interpolated.
    config = Dinov2Config(**{**TOWER, "image_size": 48}, mlp_ratio=2, layerscale_value=0.5)
    return Dinov2Model(config), _bit()


def _registers() -> tuple[Dinov2WithRegistersModel, BitImageProcessor]:
    config = Dinov2WithRegistersConfig(
        **TOWER, mlp_ratio=2, num_register_tokens=3, layerscale_value=0.5
    )
    return Dinov2WithRegistersModel(config), _bit()


def _bit() -> BitImageProcessor:
    return BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})


def _vit() -> tuple[ViTModel, ViTImageProcessor]:
    # Saved without its pooler, as classification checkpoints are.
    config = ViTConfig(**TOWER, intermediate_size=64)
    model = ViTModel(config, add_pooling_layer=False)
    return model, vit_processor()


def vit_processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 32, "width": 32})
