"""Marked images show which patch a position depends on; unclear layouts are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    PixioConfig,
    PixioModel,
    SamVisionConfig,
    SamVisionModel,
    ViTMAEConfig,
    ViTMAEModel,
    VitPoseBackbone,
    VitPoseBackboneConfig,
    YolosConfig,
    YolosModel,
)

import tiny_models
from sparsight.errors import UserError
from sparsight.vision import load_model
from sparsight.vision.positions import count_prefix, find_cls

GRID = (3, 4)
SIDE = 4
SHAPE = (3, GRID[0] * SIDE, GRID[1] * SIDE)
N = GRID[0] * GRID[1]


class Stem(nn.Module):
    """Patches after two prefix positions, put into an order, and perhaps mixed before."""

    def __init__(self, order: Tensor | None = None, *, behind: int = 0, padding: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, SIDE, SIDE)
        self.mix = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.extra = nn.Parameter(torch.randn(1, 2 + behind, 16))
        self.order = torch.arange(N) if order is None else order
        self.padding = padding

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.patches(pixels)
        if self.padding:
            maps = maps + 0.7 * self.mix(maps)
        states = maps.flatten(2).mT[:, self.order]
        extra = self.extra.expand(len(pixels), -1, -1)
        return torch.cat([extra[:, :2], states, extra[:, 2:]], dim=1)


def prefix(stem: Callable[[Tensor], Tensor]) -> int:
    return count_prefix("m", stem, SHAPE, (SIDE, SIDE))


def test_the_prefix_is_the_positions_before_patches_in_reading_order():
    assert prefix(Stem()) == 2
    assert prefix(Stem(padding=1)) == 2  # a convolution that mixes neighbours
    assert prefix(lambda pixels: Stem()(pixels)[:, 2:]) == 0


WINDOWS = torch.tensor([0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11])
SWAPPED = torch.arange(N).index_put((torch.tensor([5, 6]),), torch.tensor([6, 5]))


@pytest.mark.parametrize(
    ("stem", "message"),
    [
        (Stem(behind=3), r"its 17 positions include 3 after the patches"),
        (Stem(SWAPPED), r"not in reading order .*position 5 among them shows patch 6"),
        (Stem(WINDOWS), r"not in reading order .*position 2 among them shows patch 4.*windows"),
        (Stem(torch.arange(0, N, 2)), r"only 6 of its 3 × 4 patches reach the first block"),
        (Stem(torch.arange(N) // 2), r"several positions show the same one"),
        (
            lambda pixels: Stem()(pixels)[:, 2:].unflatten(1, (6, 2)).mean(dim=2),
            r"merges or mixes",
        ),
        (
            lambda pixels, stem=Stem(): stem(pixels)[:, torch.randperm(N + 2)],  # noqa: B008
            r"in another pass: the model chooses at random",
        ),
    ],
)
def test_other_layouts_of_positions_are_refused_with_a_description(stem, message):
    with pytest.raises(UserError, match=message):
        prefix(stem)


@torch.no_grad()
def test_a_class_token_is_known_by_the_position_that_it_moves():
    stem = Stem()
    token = stem.extra
    before = token.clone()
    assert find_cls(stem, [token], SHAPE, 2)
    assert torch.equal(token, before)
    assert not find_cls(lambda pixels: stem(pixels).roll(1, dims=1), [token], SHAPE, 3)
    assert not find_cls(stem, [nn.Parameter(torch.zeros(3))], SHAPE, 2)


def save(module: transformers.PreTrainedModel, folder: Path) -> str:
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    module.save_pretrained(folder)
    tiny_models.vit_processor().save_pretrained(folder)
    return str(folder)


MAE = {
    **tiny_models.TOWER,
    "intermediate_size": 64,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}


def test_a_masked_autoencoder_without_masking_keeps_reading_order(tmp_path, pixels):
    torch.manual_seed(0)
    module = ViTMAEModel(ViTMAEConfig(**MAE, mask_ratio=0.0)).eval()
    ours = load_model(save(module, tmp_path))
    noise = torch.arange(16.0).expand(len(pixels), -1)
    with torch.no_grad():
        states = module(pixels, noise=noise, output_hidden_states=True).hidden_states
    got = ours.read(pixels, ["blocks.0.resid_pre", "blocks.-1.resid_post"], "patches")
    assert torch.allclose(got["blocks.0.resid_pre"], states[0][:, 1:], atol=1e-5)
    assert torch.allclose(got["blocks.-1.resid_post"], states[-1][:, 1:], atol=1e-5)


def test_a_masked_autoencoder_that_masks_says_how_to_keep_its_patches(tmp_path):
    folder = save(ViTMAEModel(ViTMAEConfig(**MAE, mask_ratio=0.75)), tmp_path)
    with pytest.raises(UserError, match=r"only 4 of its 4 × 4 patches.*mask_ratio.*set it to 0"):
        load_model(folder)


def test_detection_tokens_after_the_patches_are_refused(tmp_path):
    sizes = {**tiny_models.TOWER, "image_size": [32, 32], "intermediate_size": 64}
    folder = save(YolosModel(YolosConfig(**sizes, num_detection_tokens=5)), tmp_path)
    with pytest.raises(UserError, match="its 22 positions include 5 after the patches"):
        load_model(folder)


def test_patches_that_stay_in_rows_and_columns_are_refused(tmp_path):
    config = SamVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        output_channels=8, mlp_dim=64, window_size=2, global_attn_indexes=[0],
    )  # fmt: skip
    folder = save(SamVisionModel(config), tmp_path)
    with pytest.raises(UserError, match=r"\[2, 4, 4, 32\] at block 0.*rows and columns"):
        load_model(folder)


def test_padded_patches_and_several_class_tokens_are_opened(tmp_path, pixels):
    torch.manual_seed(0)
    sizes = {key: tiny_models.TOWER[key] for key in ("hidden_size", "num_attention_heads")}
    pose = VitPoseBackboneConfig(
        **sizes, num_hidden_layers=2, image_size=[32, 32], patch_size=[8, 8]
    )
    ours = load_model(save(VitPoseBackbone(pose), tmp_path / "pose"))
    assert (ours.n_prefix, ours.has_cls, ours.patch_grid) == (0, False, (4, 4))
    assert ours.embed_images(pixels).shape == (4, 32)
    config = PixioConfig(**tiny_models.TOWER, n_cls_tokens=3)
    ours = load_model(save(PixioModel(config), tmp_path / "pixio"))
    assert (ours.n_prefix, ours.has_cls) == (3, True)


class Rearranged(nn.Module):
    """A block whose positions come out reversed."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.attention, self.mlp = block, block.attention, block.mlp

    def forward(self, *args, **kwargs):
        states = self.block(*args, **kwargs)
        return states.flip(1)


def test_positions_that_change_their_order_between_blocks_are_refused(folder, monkeypatch):
    from sparsight.vision import transformers_models

    find_tower = transformers_models.find_tower

    def rearranged(module: nn.Module, id: str):
        blocks = find_tower(module, id).blocks
        owner = next(part for part in module.modules() if blocks[1] in part.children())
        setattr(owner, "1", Rearranged(blocks[1]))
        return find_tower(module, id)

    monkeypatch.setattr(transformers_models, "find_tower", rearranged)
    with pytest.raises(UserError, match="positions change their order in block 1"):
        load_model(str(folder("vit")))
