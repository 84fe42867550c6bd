"""Assign parameters to parts of a CLIP, for rates, decay, freezing and gradient norms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from sparsight.config import check_types
from sparsight.errors import UserError
from sparsight.vision import VisionModel

Part = Literal[
    "visual_blocks", "text_blocks", "token_embedding", "positions", "rest", "logit_scale"
]
PARTS: tuple[Part, ...] = get_args(Part)

_NUMBERED = re.compile(r"\.(\d+)\.")
_POSITIONS = ("position_embedding", "positional_embedding", "class_embedding", "cls_token")
_FIRST_NORMS = ("pre_layrnorm", "ln_pre")
_SCALES = ("logit_scale", "logit_bias")

# Decay would have no effect on these weights, or should have none: in W = r θ/‖θ‖ the length of θ
# does not matter, and r alone is the size.
_GEOMETRIC = ("r", "theta")


@dataclass(frozen=True)
class Rates:
    """The learning rate of each part, as a multiple of `lr`; 0 freezes it.

    The defaults are the ratios of zer0int's script, where the scheduler overwrote them.
    """

    visual_blocks: float = 1.0
    """Attention, MLP and norms of the vision tower's blocks."""

    text_blocks: float = 0.1
    """The same parts of the text tower."""

    token_embedding: float = 1.0
    """The text tower's token embeddings."""

    positions: float = 0.33
    """Position embeddings of both towers, and the CLS embedding."""

    rest: float = 0.033
    """Projections, the norms before and after the blocks, and the patch convolution."""

    logit_scale: float = 1.0
    """The learned logit scale (and SigLIP's bias)."""

    def __post_init__(self) -> None:
        check_types(self)
        for part in PARTS:
            if getattr(self, part) < 0:
                raise UserError(f"rates.{part} is {getattr(self, part)}; it must be 0 or more.")


@dataclass(frozen=True)
class Member:
    """A parameter and the part it belongs to."""

    name: str
    parameter: nn.Parameter
    part: Part
    block: int | None
    """The number of its block, in `visual_blocks` and `text_blocks`."""
    decays: bool
    """Whether weight decay applies: to matrices, not to biases, norms and position embeddings."""

    @property
    def layer(self) -> str:
        """The name for gradient norms: `visual.3`, `text.0`, or the part."""
        tower = self.part.removesuffix("_blocks")
        return self.part if self.block is None else f"{tower}.{self.block}"


def members(model: VisionModel) -> list[Member]:
    """Return every parameter of a model with its part, in the model's order."""
    return list(_members(model))


def set_trainable(model: VisionModel, rates: Rates, first_block: int = 0) -> list[Member]:
    """Turn on gradients where the rate is not 0, and off elsewhere.

    Args:
        model: the model to train.
        rates: learning rates of the parts.
        first_block: the first vision block to train; earlier blocks and the layers before them are
            frozen.

    Returns:
        The parameters to train.

    Raises:
        UserError: there are none, or the model has no such block.
    """
    if not 0 <= first_block < model.n_blocks:
        raise UserError(
            f"first_block is {first_block}; {model.id} has blocks 0 to {model.n_blocks - 1}."
        )
    trained, before = [], _before(model, first_block)
    for member in members(model):
        on = getattr(rates, member.part) > 0 and id(member.parameter) not in before
        member.parameter.requires_grad_(on)
        if on:
            trained.append(member)
    if not any(member.part != "logit_scale" for member in trained):
        raise UserError("Nothing to train: every part is frozen (its rate is 0).")
    return trained


def _members(model: VisionModel) -> Iterator[Member]:
    blocks = model.tower.blocks
    visual = {id(p): i for i, block in enumerate(blocks) for p in block.parameters()}
    norms = {
        f"{name}.{key}"
        for name, module in model.module.named_modules()
        if "norm" in type(module).__name__.lower()
        for key, _ in module.named_parameters(recurse=False)
    }
    for name, parameter in model.module.named_parameters():
        last = name.rsplit(".", 1)[-1]
        block: int | None = None
        if last in _SCALES:
            part: Part = "logit_scale"
        elif id(parameter) in visual:
            part, block = "visual_blocks", visual[id(parameter)]
        elif any(word in name for word in _POSITIONS):
            part = "positions"
        elif "token_embedding" in name:
            part = "token_embedding"
        elif numbered := _NUMBERED.search(name):
            part, block = "text_blocks", int(numbered[1])
        else:
            part = "rest"
        plain = parameter.ndim >= 2 and name not in norms and last not in _GEOMETRIC
        yield Member(name, parameter, part, block, plain and part not in ("positions",))


def _before(model: VisionModel, first_block: int) -> set[int]:
    """Return the identities of the vision tower's parameters before a block."""
    if not first_block:
        return set()
    tower = model.tower
    found = set(map(id, tower.patches.parameters()))
    for block in tower.blocks[:first_block]:
        found.update(map(id, block.parameters()))
    for name, parameter in tower.module.named_parameters():
        if any(word in name for word in (*_POSITIONS, *_FIRST_NORMS)):
            found.add(id(parameter))
    return found
