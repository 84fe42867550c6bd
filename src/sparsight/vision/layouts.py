"""The two layouts of a CLIP's weights, OpenAI's and Hugging Face's: names and shapes, not values.

OpenAI's layout is also that of open_clip's own CLIP. It stacks the query, key and value projections
of an attention in one matrix, and stores the two projections into the joint embedding so that they
multiply from the right; Hugging Face's keeps them separate, and transposed. Conversion in either
direction only splits, joins and transposes, so that every bit stays.

Two published ways to train add to either layout: the geometric parametrisation (`.r` and `.theta`
instead of a `.weight`; zer0int, CLIP-fine-tune) and Long-CLIP's table of positions in two parts
(`positional_embedding_res`; Zhang et al. 2024, arXiv:2403.15378). `plain` merges both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.errors import UserError

State = Mapping[str, Tensor]

KEPT_POSITIONS = 20
"""How many positions Long-CLIP keeps unchanged; its files do not say so (section 3.1)."""

RES = "positional_embedding_res"
"""Name of Long-CLIP's trained positions, next to the kept ones."""

_PARTS = (
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    (RES, f"text_model.embeddings.position_embedding.{RES}"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final", "text_model.final_layer_norm"),
    ("text_projection", "text_projection.weight"),
    ("logit_scale", "logit_scale"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre", "vision_model.pre_layrnorm"),
    ("visual.ln_post", "vision_model.post_layernorm"),
    ("visual.proj", "visual_projection.weight"),
)
"""Names outside the blocks; the name of a norm stands for its `.weight` and `.bias`."""

_BLOCKS = (
    ("visual.transformer.resblocks", "vision_model.encoder.layers"),
    ("transformer.resblocks", "text_model.encoder.layers"),
)

_IN_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)

_TRANSPOSED = ("visual.proj", "text_projection")

_NO_WEIGHTS = re.compile(
    r"(^|\.)(input_resolution|context_length|vocab_size|attn_mask|mask[12]|position_ids)$"
)
"""Sizes and masks that some files store among their weights; the rest determines them."""


def is_openai(keys: Iterable[str]) -> bool:
    """Return whether these are the names of a CLIP (vision transformer) in OpenAI's layout."""
    found = set(keys)
    return {"visual.conv1.weight", "visual.proj", "token_embedding.weight"} <= found


def is_huggingface(keys: Iterable[str]) -> bool:
    """Return whether these are the names of `transformers.CLIPModel`."""
    return {"visual_projection.weight", "vision_model.pre_layrnorm.weight"} <= set(keys)


def is_gmp(keys: Iterable[str]) -> bool:
    """Return whether there are weights in the geometric parametrisation."""
    return any(key.endswith(".theta") for key in keys)


def to_huggingface(state: State) -> dict[str, Tensor]:
    """Convert OpenAI's layout to that of `transformers.CLIPModel`, bit by bit.

    Weights in the geometric parametrisation and Long-CLIP's tables keep their parts.

    Raises:
        UserError: a name does not belong to OpenAI's layout.
    """
    found: dict[str, Tensor] = {}
    for key, value in _weights(state):
        block = _split(key, 0)
        if block is None:
            found[_rename(key, 0)] = _turned(key, value)
            continue
        (prefix, index), rest = block
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = rest.rpartition("_")[2]
            for name, part in zip("qkv", value.chunk(3), strict=True):
                found[f"{prefix}.{index}.self_attn.{name}_proj.{kind}"] = part.contiguous()
            continue
        found[f"{prefix}.{index}.{_inner(key, rest, 0)}"] = value
    return found


def to_openai(state: State) -> dict[str, Tensor]:
    """Convert the layout of `transformers.CLIPModel` to OpenAI's; see `to_huggingface`.

    Raises:
        UserError: a name does not belong to this layout, or an attention lacks a projection.
    """
    found: dict[str, Tensor] = {}
    for key, value in _weights(state):
        block = _split(key, 1)
        if block is None:
            name = _rename(key, 1)
            found[name] = _turned(name, value)
            continue
        (prefix, index), rest = block
        inner = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest)
        if inner is None:
            found[f"{prefix}.{index}.{_inner(key, rest, 1)}"] = value
        elif inner[1] == "q":
            others = [key.replace("q_proj", f"{name}_proj") for name in "kv"]
            missing = [name for name in others if name not in state]
            if missing:
                raise UserError(f"{key} is there, but {missing[0]} is missing.")
            joined = torch.cat([value, *(state[name] for name in others)])
            found[f"{prefix}.{index}.attn.in_proj_{inner[2]}"] = joined
    return found


def plain(state: State, kept: int = KEPT_POSITIONS) -> dict[str, Tensor]:
    """Return plain weights: parts that were split for training are merged.

    Args:
        state: weights in either layout.
        kept: how many of Long-CLIP's positions come from `positional_embedding`.

    Raises:
        UserError: one of `.r` and `.theta` is missing, or the two tables of positions differ in
            shape.
    """
    found: dict[str, Tensor] = {}
    for key, value in _weights(state):
        base, _, last = key.rpartition(".")
        if last in ("theta", "r"):
            other = f"{base}.{'r' if last == 'theta' else 'theta'}"
            if other not in state:
                raise UserError(f"{key} is there, but {other} is missing.")
            if last == "theta":
                found[f"{base}.weight"] = gmp_weight(state[other].reshape(-1, 1), value)
        elif not key.endswith(RES):
            res = state.get(_res_beside(key))
            found[key] = value if res is None else merged_positions(value, res, kept)
    return found


def gmp_parts(
    weight: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "out 1"], Float[Tensor, "out in"]]:
    """Compute r = ‖W‖ and θ = W / ‖W‖ of every row in float64; return the weight's dtype.

    A row of zeros has r = 0 and a θ of equal values, so that its length can grow in training.
    """
    wide = weight.detach().double()
    r = wide.norm(dim=1, keepdim=True)
    even = torch.full_like(wide, weight.shape[1] ** -0.5)
    theta = torch.where(r > 0, wide / r.clamp(min=torch.finfo(torch.float64).tiny), even)
    return r.to(weight.dtype), theta.to(weight.dtype)


def gmp_weight(
    r: Float[Tensor, "out 1"], theta: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """Compute W = r · θ / ‖θ‖, the norm over each row, in float64; return float32 or wider.

    Half-precision parts are not rounded a second time: their product has more digits.
    """
    wide = theta.detach().double()
    norm = wide.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    weight: Tensor = r.detach().double() * (wide / norm)
    return weight.to(torch.promote_types(theta.dtype, torch.float32))


def merged_positions(
    fixed: Float[Tensor, "positions d"], trained: Float[Tensor, "positions d"], kept: int
) -> Float[Tensor, "positions d"]:
    """Join the first `kept` positions of one table with the remaining ones of the other.

    Raises:
        UserError: the tables differ in shape, or have no more than `kept` positions.
    """
    if fixed.shape != trained.shape or not 0 <= kept < len(fixed):
        raise UserError(
            f"{RES} has shape {list(trained.shape)}, and positional_embedding, of which {kept} "
            f"positions are kept, {list(fixed.shape)}; they must match and be longer."
        )
    return torch.cat([fixed[:kept], trained[kept:]])


def _weights(state: State) -> Iterator[tuple[str, Tensor]]:
    return ((key, value) for key, value in state.items() if not _NO_WEIGHTS.search(key))


def _split(key: str, side: int) -> tuple[tuple[str, str], str] | None:
    """Split a key into block (name in the other layout, number) and rest; None outside blocks."""
    for names in _BLOCKS:
        found = re.fullmatch(rf"{re.escape(names[side])}\.(\d+)\.(.+)", key)
        if found:
            return (names[1 - side], found[1]), found[2]
    return None


def _inner(key: str, rest: str, side: int) -> str:
    for names in _IN_BLOCK:
        if rest.startswith(f"{names[side]}."):
            return names[1 - side] + rest.removeprefix(names[side])
    raise _unknown(key, side)


def _rename(key: str, side: int) -> str:
    for names in _PARTS:
        ours = names[side]
        if key == ours:
            return names[1 - side]
        if key in (f"{ours}.weight", f"{ours}.bias") and ".ln_" in f".{names[0]}":
            return names[1 - side] + key.removeprefix(ours)
    raise _unknown(key, side)


def _unknown(key: str, side: int) -> UserError:
    name = ("OpenAI's", "Hugging Face's")[side]
    return UserError(
        f"{key!r} does not belong to a CLIP in {name} layout, which only holds vision transformers "
        "with CLIP's own text tower."
    )


def _turned(openai_name: str, value: Tensor) -> Tensor:
    return value.T.contiguous() if openai_name in _TRANSPOSED else value


def _res_beside(key: str) -> str:
    """Return the name of the trained positions if `key` names the kept ones, otherwise ""."""
    head, _, last = key.rpartition(".")
    if key.startswith("visual.") or "vision_model" in key:
        return ""
    if last == "positional_embedding":
        return f"{head}.{RES}" if head else RES
    return f"{head}.{RES}" if head.endswith("position_embedding") else ""
