"""Find the parts of a vision transformer inside any module tree.

There is no class per architecture: a tower is the smallest module that holds both a patch
convolution and one list of transformer blocks, and its parts are found by the names below. The
parts are then tried on two images (`probe.py`), so that a wrong guess leads to an error or a
missing site, never to a mislabelled one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from sparsight.errors import UserError
from sparsight.vision.hooks import Place

# Names of a block's parts; the first that exists counts. LayerScale is listed before the part that
# it scales: a site is what is added to the residual stream.
ATTENTION = (
    "layer_scale1",  # transformers: DINOv2, DINOv3
    "ls_1",  # open_clip
    "ls1",  # timm
    "self_attn",  # transformers: CLIP, SigLIP
    "attention",  # transformers: ViT, DeiT
    "attn",  # open_clip, timm
)
MLP = (
    "layer_scale2",
    "ls_2",
    "ls2",
    "mlp",
    "ffn",  # transformers: AIMv2
    "output.dropout",  # transformers < 5: ViT, DeiT, whose `output` adds the residual itself
)
# The two linear maps of a block's MLP. Some MLPs have a gate in parallel with the first one; the
# output of either is then not a neuron, and the probe leaves it out.
MLP_IN = (
    "mlp.fc1",  # transformers: CLIP, SigLIP, DINOv2, ViT; timm
    "mlp.c_fc",  # open_clip
    "mlp.up_proj",  # transformers: DINOv3
    "ffn.up_proj",  # transformers: AIMv2
    "intermediate.dense",  # transformers < 5: ViT, DeiT
)
MLP_OUT = (
    "mlp.fc2",
    "mlp.c_proj",
    "mlp.down_proj",
    "mlp.weights_out",  # transformers < 5: DINOv2 with a gate
    "ffn.down_proj",
    "output.dense",
)
ATTENTION_OUT = (
    "self_attn.out_proj",  # transformers: CLIP, SigLIP
    "attention.o_proj",  # transformers: ViT, DINOv2
    "attention.output.dense",  # transformers < 5: ViT, DINOv2
    "attention.out_proj",
    "attn.out_proj",  # open_clip
    "attn.proj",  # timm
)
FINAL_NORM = (
    "post_layernorm",  # transformers: CLIP, SigLIP
    "layernorm",  # transformers: DINOv2, ViT, DeiT
    "ln_post",  # open_clip
    "norm",  # transformers: DINOv3; timm
    "rms_norm",  # transformers: AIMv2
)
MLP_WRITE = "mlp_write"
CLS = ("class_embedding", "cls_token", "class_token")


@dataclass(frozen=True)
class Tower:
    """The parts of a vision transformer."""

    module: nn.Module
    name: str
    """Its path in the model that holds it; empty if it is the whole model."""
    patches: nn.Conv2d
    blocks: tuple[nn.Module, ...]
    final_norm: nn.Module | None

    def places(self) -> dict[str, Place]:
        """Return the sites of the blocks and the final norm, in forward order."""
        places: dict[str, Place] = {}
        for i, block in enumerate(self.blocks):
            attention, mlp = find_part(block, ATTENTION), find_part(block, MLP)
            assert attention is not None and mlp is not None
            places[f"blocks.{i}.resid_pre"] = Place(block, "input")
            places[f"blocks.{i}.attn_out"] = Place(attention)
            first, second = find_part(block, MLP_IN), find_part(block, MLP_OUT)
            if first is not None:
                places[f"blocks.{i}.mlp_pre"] = Place(first)
            if second is not None:
                places[f"blocks.{i}.mlp_post"] = Place(second, "input")
            places[f"blocks.{i}.mlp_out"] = Place(mlp)
            places[f"blocks.{i}.resid_post"] = Place(block)
        if self.final_norm is not None:
            places["final_norm"] = Place(self.final_norm)
        return places

    def cls_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are named as a class token."""
        named = self.module.named_parameters()
        return [weight for key, weight in named if key.rsplit(".", 1)[-1] in CLS]

    def mlp_writes(self) -> dict[str, Place]:
        """Return the outputs of the MLPs' second linear maps: not sites, but used for checks."""
        seconds = {i: find_part(block, MLP_OUT) for i, block in enumerate(self.blocks)}
        return {f"blocks.{i}.{MLP_WRITE}": Place(part) for i, part in seconds.items() if part}


def find_tower(model: nn.Module, id: str) -> Tower:
    """Find the vision tower in `model`.

    Raises:
        UserError: there is no patch convolution, or not exactly one list of transformer blocks
            with it (Swin and other hierarchical models have one per stage).
    """
    for conv_name, conv in model.named_modules():
        if not isinstance(conv, nn.Conv2d) or not _cuts_patches(conv):
            continue
        for name in _ancestors(conv_name):
            module = model.get_submodule(name)
            lists = [part for part in module.modules() if _is_block_list(part)]
            if len(lists) > 1:
                raise UserError(
                    f"{id}: its vision model has {len(lists)} lists of blocks (is it "
                    "hierarchical?). Sparsight opens plain vision transformers, which have one."
                )
            if lists:
                norm = next((n for n in map(module._modules.get, FINAL_NORM) if n), None)
                return Tower(
                    module=module,
                    name=name,
                    patches=conv,
                    blocks=tuple(lists[0].children()),
                    final_norm=None if isinstance(norm, nn.Identity) else norm,
                )
    raise UserError(
        f"{id}: no vision transformer found in it ({type(model).__name__}{_other_patches(model)}). "
        "Sparsight looks for a convolution (Conv2d) that cuts images with 3 channels into patches "
        "without overlap, and for one list of blocks, each with attention and an MLP."
    )


def _other_patches(model: nn.Module) -> str:
    """Say how a model without a suitable convolution seems to cut patches, for a message."""
    for name, part in model.named_modules():
        if not re.search(r"patch|embed|stem", name) or "text" in name:
            continue
        if isinstance(part, nn.Conv3d):
            return f"; its {name} cuts videos"
        if isinstance(part, nn.Conv2d) and part.kernel_size != part.stride:
            return f"; the patches of its {name} overlap"
        if isinstance(part, nn.Conv2d) and part.in_channels != 3 and part.stride[0] > 1:
            return f"; its {name} takes images with {part.in_channels} channels"
        if isinstance(part, nn.Linear) and "patch" in name:
            return f"; its {name} takes patches that are already cut"
    return ""


def _cuts_patches(conv: nn.Conv2d) -> bool:
    """Return whether the convolution cuts images with three channels into separate patches."""
    return conv.in_channels == 3 and conv.kernel_size == conv.stride and conv.stride[0] > 1


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    children = list(module.children())
    return bool(children) and all(
        find_part(child, ATTENTION) is not None and find_part(child, MLP) is not None
        for child in children
    )


def find_part(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """Return the first of these parts that a block has; None if it has none."""
    for name in names:
        try:
            return block.get_submodule(name)
        except AttributeError:
            continue
    return None


def _ancestors(name: str) -> Iterator[str]:
    """Yield the paths of the modules that hold the module `name`, the closest first, "" last."""
    while name:
        name = name.rpartition(".")[0]
        yield name
