"""What a CLIP's weights alone do not say, and how each library says it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsight.errors import SparsightError, UserError
from sparsight.vision.layouts import State

HEAD_WIDTH = 64
"""Width of every head in OpenAI's CLIPs; their code assumes width / 64 heads for any weights."""

STANDARD_VOCABULARY = 49408
"""Size of OpenAI's vocabulary; its last two tokens are the start and the end of a text."""

_LEGACY_END = 2
"""With this `eos_token_id`, `transformers` pools at the largest token of a text, as OpenAI does;
its configurations said 2 before that was known to be wrong."""


@dataclass(frozen=True)
class TowerShape:
    """One of the two transformers."""

    width: int
    layers: int
    heads: int
    mlp: int
    """Width of the hidden layer of its MLPs."""
    activation: str = "quick_gelu"
    """`quick_gelu`, as in OpenAI's CLIPs, or `gelu`, or another name that `transformers` knows."""
    eps: float = 1e-5
    """Epsilon of its norms."""


@dataclass(frozen=True)
class ClipShape:
    """Everything that is needed to build a CLIP for its weights."""

    embed_dim: int
    image_size: int
    patch_size: int
    vision: TowerShape
    text: TowerShape
    context_length: int
    vocab_size: int
    end: int | None = None
    """The token at whose position the text is pooled; None: the largest token of each text."""

    @property
    def end_is_largest(self) -> bool:
        """Whether pooling at the largest token, as OpenAI's code does it, gives the same."""
        return self.end in (None, self.vocab_size - 1)

    def to_json(self) -> dict[str, Any]:
        """Return what the weights themselves do not say, for a file's metadata."""

        def tower(shape: TowerShape) -> dict[str, Any]:
            return {"heads": shape.heads, "activation": shape.activation, "eps": shape.eps}

        return {"vision": tower(self.vision), "text": tower(self.text), "end": self.end}

    def surprises(self) -> list[str]:
        """List what OpenAI's own code, which reads nothing but weights, would get wrong."""
        found = []
        for name, tower in (("vision", self.vision), ("text", self.text)):
            if tower.heads * HEAD_WIDTH != tower.width:
                found.append(
                    f"{tower.heads} heads in the {name} tower (OpenAI's code assumes width "
                    f"{tower.width} / {HEAD_WIDTH})"
                )
            if tower.activation != "quick_gelu":
                found.append(
                    f"{tower.activation} in the {name} tower (OpenAI's code assumes QuickGELU)"
                )
            if not math.isclose(tower.eps, 1e-5, rel_tol=1e-3):
                found.append(
                    f"norms of the {name} tower with eps {tower.eps:g} (OpenAI's code assumes 1e-5)"
                )
        if not self.end_is_largest:
            found.append(
                f"texts that end with token {self.end} (OpenAI's code assumes the largest token)"
            )
        return found


def shape_of_weights(state: State, stated: dict[str, Any] | None, name: str) -> ClipShape:
    """Find the shape of a CLIP from its weights.

    Args:
        state: plain weights in OpenAI's layout.
        stated: what `ClipShape.to_json` returned, or any part of it; the rest is as in OpenAI's
            code: width / 64 heads, QuickGELU, and a text is pooled at its largest token.
        name: the file, for messages.

    Raises:
        UserError: heads are not stated, and the width is not a multiple of 64.
        SparsightError: the weights do not fit together.
    """
    stated = stated or {}

    def tower(prefix: str, width: int, part: str) -> TowerShape:
        said = stated.get(part) or {}
        heads = said.get("heads")
        if heads is None:
            heads = width // HEAD_WIDTH
            if heads * HEAD_WIDTH != width:
                raise UserError(
                    f"{name}: its {part} tower is {width} wide, which is not a multiple of "
                    f"{HEAD_WIDTH}, and the file does not say how many heads it has. Give heads= "
                    "to sparsight.vision.openai_files.load_openai."
                )
        elif not (isinstance(heads, int) and heads > 0 and width % heads == 0):
            raise SparsightError(
                f"{name}: its {part} tower is {width} wide, which cannot be divided among "
                f"{heads!r} heads."
            )
        blocks = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
        return TowerShape(
            width=width,
            layers=len(blocks),
            heads=int(heads),
            mlp=len(state[f"{prefix}0.mlp.c_fc.weight"]),
            activation=str(said.get("activation", "quick_gelu")),
            eps=float(said.get("eps", 1e-5)),
        )

    try:
        patches = state["visual.conv1.weight"]
        positions = len(state["visual.positional_embedding"])
        grid = math.isqrt(positions - 1)
        if grid * grid != positions - 1:
            raise SparsightError(
                f"{name}: the vision tower has {positions} positions, which are not a square of "
                "patches plus a class token."
            )
        vocabulary, text_width = state["token_embedding.weight"].shape
        end = stated.get("end")
        return ClipShape(
            embed_dim=state["text_projection"].shape[1],
            image_size=grid * patches.shape[-1],
            patch_size=patches.shape[-1],
            vision=tower("visual.transformer.resblocks.", patches.shape[0], "vision"),
            text=tower("transformer.resblocks.", text_width, "text"),
            context_length=len(state["positional_embedding"]),
            vocab_size=vocabulary,
            end=None if end is None else int(end),
        )
    except KeyError as error:
        raise SparsightError(f"{name}: {error.args[0]} is missing from its weights.") from error


def shape_of_transformers(config: Any) -> ClipShape:
    """Return the shape that a `transformers.CLIPConfig` describes."""
    vision, text = config.vision_config, config.text_config

    def tower(part: Any) -> TowerShape:
        return TowerShape(
            width=part.hidden_size,
            layers=part.num_hidden_layers,
            heads=part.num_attention_heads,
            mlp=part.intermediate_size,
            activation=part.hidden_act,
            eps=part.layer_norm_eps,
        )

    return ClipShape(
        embed_dim=config.projection_dim,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        vision=tower(vision),
        text=tower(text),
        context_length=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        end=None if text.eos_token_id == _LEGACY_END else text.eos_token_id,
    )


def shape_of_open_clip(module: nn.Module, state: State, name: str) -> ClipShape:
    """Return the shape of open_clip's own CLIP, from its modules.

    Args:
        module: `open_clip.model.CLIP`, or a `CustomTextCLIP` with open_clip's own two towers.
        state: its plain weights in OpenAI's layout.
        name: the model, for messages.

    Raises:
        UserError: it does something that CLIP does not: timm's towers, other pooling, LayerScale.
    """
    visual: Any = module.visual
    text: Any = getattr(module, "text", module)
    odd = [
        what
        for what, found in {
            "a logit bias": getattr(module, "logit_bias", None) is not None,
            "attentional pooling": getattr(visual, "attn_pool", None) is not None,
            f"images pooled by {getattr(visual, 'pool_type', 'tok')!r}": (
                getattr(visual, "pool_type", "tok") != "tok"
            ),
            "texts without a causal mask": getattr(text, "attn_mask", None) is None,
            "a class token at the end of texts": getattr(text, "cls_emb", None) is not None,
            "towers of another library": not hasattr(visual, "conv1")
            or not hasattr(text, "transformer"),
        }.items()
        if found
    ]
    if odd:
        raise UserError(f"{name}: has {', '.join(odd)}; a CLIP of OpenAI's kind does not.")

    def said(transformer: Any) -> dict[str, Any]:
        block = transformer.resblocks[0]
        act = next(part for part in block.mlp.children() if not hasattr(part, "bias"))
        return {
            "heads": block.attn.num_heads,
            "activation": _activation(act, name),
            "eps": block.ln_1.eps,
        }

    pool = getattr(module, "text_pool_type", None) or getattr(text, "pool_type", "argmax")
    if pool not in ("argmax", "eos"):
        raise UserError(f"{name}: pools texts by {pool!r}; a CLIP of OpenAI's kind does not.")
    end = getattr(module, "text_eos_id", None) or getattr(text, "eos_id", None)
    stated = {
        "vision": said(visual.transformer),
        "text": said(text.transformer),
        "end": end if pool == "eos" else None,
    }
    return shape_of_weights(state, stated, name)


def transformers_config(shape: ClipShape, *, end: int | None = None, **text: int | None) -> Any:
    """Return the `transformers.CLIPConfig` of a shape.

    Args:
        shape: the CLIP's.
        end: the token at the end of a text, if the tokenizer is known.
        text: further settings of the text tower: `bos_token_id`, `pad_token_id`.
    """
    from transformers import CLIPConfig

    last = shape.vocab_size - 1
    known = last if end == last or shape.vocab_size == STANDARD_VOCABULARY else _LEGACY_END
    eos = known if shape.end is None else shape.end

    def tower(part: TowerShape) -> dict[str, Any]:
        return {
            "hidden_size": part.width,
            "num_hidden_layers": part.layers,
            "num_attention_heads": part.heads,
            "intermediate_size": part.mlp,
            "hidden_act": part.activation,
            "layer_norm_eps": part.eps,
            "projection_dim": shape.embed_dim,
        }

    standard = shape.vocab_size == STANDARD_VOCABULARY
    start, pad = (last - 1, last) if standard else (None, None)
    text = {"bos_token_id": start, "pad_token_id": pad, **text}
    return CLIPConfig(
        text_config={
            **tower(shape.text),
            "vocab_size": shape.vocab_size,
            "max_position_embeddings": shape.context_length,
            "eos_token_id": eos,
            **text,
        },
        vision_config={
            **tower(shape.vision),
            "image_size": shape.image_size,
            "patch_size": shape.patch_size,
        },
        projection_dim=shape.embed_dim,
    )


def open_clip_config(shape: ClipShape, name: str) -> dict[str, Any]:
    """Return the `model_cfg` from which open_clip builds a CLIP of a shape.

    Raises:
        UserError: its two towers have activation functions that open_clip cannot give them.
    """
    activations = {shape.vision.activation, shape.text.activation}
    if activations not in ({"quick_gelu"}, {"gelu"}):
        raise UserError(
            f"{name}: its activation functions are {' and '.join(sorted(activations))}; "
            "open_clip's CLIP has QuickGELU in both towers or GELU in both."
        )

    def tower(part: TowerShape) -> dict[str, Any]:
        ratio = part.mlp / part.width
        if int(part.width * ratio) != part.mlp:  # open_clip rounds the product down
            ratio = math.nextafter(ratio, math.inf)
        given = {"width": part.width, "layers": part.layers, "mlp_ratio": ratio}
        if not math.isclose(part.eps, 1e-5, rel_tol=1e-3):
            given["norm_kwargs"] = {"eps": part.eps}  # type: ignore[assignment]
        return given

    pooling = {} if shape.end_is_largest else {"pool_type": "eos", "eos_id": shape.end}
    return {
        "embed_dim": shape.embed_dim,
        "quick_gelu": activations == {"quick_gelu"},
        "vision_cfg": {
            **tower(shape.vision),
            "image_size": shape.image_size,
            "patch_size": shape.patch_size,
            "head_width": shape.vision.width // shape.vision.heads,
        },
        "text_cfg": {
            **tower(shape.text),
            "heads": shape.text.heads,
            "context_length": shape.context_length,
            "vocab_size": shape.vocab_size,
            **pooling,
        },
    }


def _activation(module: nn.Module, name: str) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    if kind == "QuickGELU":
        return "quick_gelu"
    raise UserError(f"{name}: its activation function is {kind}; CLIPs have QuickGELU or GELU.")
