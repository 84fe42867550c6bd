"""Whatever holds a plain vision tower is opened, whatever stands on top of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import tiny_models
from sparsight.errors import UserError
from sparsight.vision import VisionModel, load_model

TOWER = {**tiny_models.TOWER, "num_hidden_layers": 2, "intermediate_size": 64}
PLAIN = {key: value for key, value in TOWER.items() if key != "intermediate_size"}
TEXT = {
    **tiny_models.text_tower(),
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "max_position_embeddings": 18,
    "pad_token_id": 1,
}


def clip() -> hf.CLIPConfig:
    return hf.CLIPConfig(vision_config=TOWER, text_config=TEXT, projection_dim=20)


def blip() -> hf.BlipConfig:
    text = {**TEXT, "encoder_hidden_size": 32}
    return hf.BlipConfig(vision_config=TOWER, text_config=text, projection_dim=20)


def blip_2() -> hf.Blip2Model:
    language = {
        "model_type": "opt", "vocab_size": 99, "hidden_size": 32, "ffn_dim": 32,
        "word_embed_proj_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    queries = {**TEXT, "encoder_hidden_size": 32}
    return hf.Blip2Model(
        hf.Blip2Config(vision_config=TOWER, qformer_config=queries, text_config=language)
    )


def llava() -> hf.LlavaForConditionalGeneration:
    vision = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
    language = {
        "model_type": "llama", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=language, image_token_index=5)
    )


def captioner() -> hf.VisionEncoderDecoderModel:
    both = hf.ViTConfig(**TOWER), hf.BertConfig(**TEXT)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*both)
    return hf.VisionEncoderDecoderModel(config)


def depth() -> hf.DepthAnythingForDepthEstimation:
    backbone = hf.Dinov2Config(
        **PLAIN, out_features=["stage1", "stage2"], reshape_hidden_states=False
    )
    return hf.DepthAnythingForDepthEstimation(
        hf.DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8],
            reassemble_factors=[2, 1], fusion_hidden_size=8, head_in_index=-1,
        )
    )  # fmt: skip


WITHOUT_JOINT_SPACE: dict[str, tuple[Callable[[], Any], str, int]] = {
    "a classifier on a CLIP": (
        lambda: hf.CLIPForImageClassification(clip()), "vision_model", 1,
    ),
    "a BLIP that writes captions": (
        lambda: hf.BlipForConditionalGeneration(blip()), "vision_model", 1,
    ),
    "GIT": (
        lambda: hf.GitModel(hf.GitConfig(vision_config=TOWER, **TEXT)), "image_encoder", 1,
    ),
    "BLIP-2": (blip_2, "vision_model", 1),
    "LLaVA on a SigLIP": (llava, "model.vision_tower", 0),
    "an encoder with a decoder": (captioner, "encoder", 1),
    "a backbone that gives maps": (depth, "backbone", 1),
    "a teacher's student": (
        lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**TOWER)), "deit", 2,
    ),
}  # fmt: skip


def save(module: Any, folder: Path) -> VisionModel:
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    module.eval().save_pretrained(folder)
    tiny_models.vit_processor().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return load_model(str(folder), device="cpu")


@pytest.mark.parametrize("name", WITHOUT_JOINT_SPACE)
def test_a_tower_is_read_as_transformers_runs_it(name, tmp_path, pixels):
    make, place, n_prefix = WITHOUT_JOINT_SPACE[name]
    torch.manual_seed(0)
    module = make()
    ours = save(module, tmp_path)
    seen: list[torch.Tensor] = []
    for block in find_blocks(module.get_submodule(place)):
        block.register_forward_hook(
            lambda _, __, output: seen.append(output if torch.is_tensor(output) else output[0])
        )
    with torch.no_grad():
        module.get_submodule(place)(pixel_values=pixels)
    got = ours.read(pixels, ["blocks.0.resid_post", "blocks.1.resid_post"])
    for states, expected in zip(got.values(), seen, strict=True):
        assert torch.allclose(states, expected, atol=1e-5)
    assert (ours.n_prefix, ours.patch_grid) == (n_prefix, (4, 4))
    assert "embedding" not in ours.sites and not ours.has_text
    assert ours.embed_images(pixels).shape == (4, 32)


def find_blocks(tower: torch.nn.Module) -> list[torch.nn.Module]:
    lists = [part for part in tower.modules() if isinstance(part, torch.nn.ModuleList)]
    return list(next(part for part in lists if len(part) == 2))


@pytest.mark.parametrize(
    ("text", "length"),
    [(hf.BertConfig, 18), (hf.RobertaConfig, 16), (hf.XLMRobertaConfig, 16), (hf.MPNetConfig, 16)],
)
def test_two_towers_joined_later_share_a_space(text, length, tmp_path, pixels):
    torch.manual_seed(0)
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(
        hf.ViTConfig(**TOWER), text(**TEXT), projection_dim=20
    )
    module = hf.VisionTextDualEncoderModel(config)
    ours = save(module, tmp_path)
    assert (ours.has_text, ours.context_length) == (True, length)
    with torch.no_grad():
        features = module.get_image_features(pixel_values=pixels)
    expected = features if torch.is_tensor(features) else features.pooler_output
    assert torch.allclose(ours.embed_images(pixels), expected, atol=1e-5)
    assert ours.embed_texts(["cat " * 40]).shape == (1, 20)


def test_a_text_tower_without_embeddings_is_reported_at_the_first_text(tmp_path):
    text = hf.DistilBertConfig(
        vocab_size=99, dim=32, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=18
    )
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(
        hf.ViTConfig(**TOWER), text, projection_dim=20
    )
    ours = save(hf.VisionTextDualEncoderModel(config), tmp_path)
    with pytest.raises(UserError, match="cannot get text embeddings"):
        ours.embed_texts(["a cat"])
