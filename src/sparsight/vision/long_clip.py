"""Long-CLIP: extend a text tower from 77 positions to 248, of which the first 20 stay unchanged.

Zhang et al. 2024, arXiv:2403.15378, section 3.1: short captions trained the first positions well
and the others hardly, so the first 20 are kept and the others are interpolated to four times as
many; 20 + 4 · 57 = 248. In training the kept ones are fixed. `save_model` writes both parts as one
table again, unless Long-CLIP's own two tables are requested.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.errors import UserError
from sparsight.vision.layouts import KEPT_POSITIONS, RES, merged_positions

FACTOR = 4
"""How far the positions after the kept ones are stretched."""

M = TypeVar("M", bound=nn.Module)


def stretched(
    table: Float[Tensor, "positions d"], kept: int = KEPT_POSITIONS, factor: int = FACTOR
) -> Float[Tensor, "more d"]:
    """Stretch a table of positions to `kept + factor · (positions - kept)`, for longer texts.

    With p the table, k kept and f the factor, q[i] = p[i] for i < k, and

        q[k + f·i + j] = (1 - j/f) · p[k + i] + j/f · p[k + i + 1],    0 ≤ j < f,

    where the position after the last one is p[-1] + (p[-1] - p[-2]), as published: the table
    continues with its last step. It is computed in float64 and returned in the table's dtype.

    Raises:
        UserError: fewer than two positions follow the kept ones, or the factor is below 1.
    """
    if factor < 1 or not 0 <= kept <= len(table) - 2:
        raise UserError(
            f"{len(table)} positions, of which {kept} are kept, cannot be stretched {factor}-fold: "
            "at least two must follow the kept ones, and the factor must be 1 or more."
        )
    wide = table.detach().double()
    rest = wide[kept:]
    after = torch.cat([rest[1:], 2 * rest[-1:] - rest[-2:-1]])
    share = torch.arange(factor, dtype=torch.float64, device=table.device) / factor
    between = (1 - share)[:, None] * rest[:, None] + share[:, None] * after[:, None]
    return torch.cat([wide[:kept], between.flatten(0, 1)]).to(table.dtype)


def factor_for(positions: int, before: int, kept: int = KEPT_POSITIONS) -> int:
    """Return the factor that stretches `before` positions to `positions`.

    Raises:
        UserError: no whole factor does; the message names lengths that are possible.
    """
    rest = before - kept
    factor, left = divmod(positions - kept, max(rest, 1))
    if rest < 2 or left or factor < 1:
        can = ", ".join(str(kept + f * rest) for f in (2, 3, 4)) if rest >= 2 else "none"
        raise UserError(
            f"{before} positions, of which {kept} are kept, cannot be stretched to {positions}. "
            f"Stretching two-, three- and four-fold gives: {can}."
        )
    return factor


def lengthen(module: M, *, kept: int = KEPT_POSITIONS, factor: int = FACTOR) -> M:
    """Let a CLIP take longer texts, in place; new positions can be trained, kept ones cannot.

    Texts of at most `kept` tokens, start and end included, embed as before.

    Args:
        module: `transformers.CLIPModel`, or a CLIP with open_clip's own text tower.
        kept: positions at the start that stay unchanged.
        factor: how far the others are stretched.

    Returns:
        `module`.

    Raises:
        UserError: its text tower is not CLIP's, or its table of positions is too short.
    """
    merge_positions(module)
    tower = _tower(module)
    table = tower.table
    new = nn.Parameter(stretched(table, kept, factor), table.requires_grad)
    tower.set_table(new)
    tower.set_length(len(new))
    return keep_positions(module, kept)


def keep_positions(module: M, kept: int = KEPT_POSITIONS) -> M:
    """Split the table of positions for training, in place: the first ones are fixed.

    The parameter `positional_embedding_res` is trained; its first `kept` rows are not used and get
    no gradient. `lengthen` calls this; call it yourself for a CLIP that is long already.

    Returns:
        `module`.

    Raises:
        UserError: its text tower is not CLIP's, or has no more than `kept` positions.
    """
    tower = _tower(module)
    table = tower.table
    if not 0 <= kept < len(table):
        raise UserError(
            f"{kept} of {len(table)} positions cannot be kept; give 0 to {len(table) - 1}."
        )
    tower.split(kept)
    return module


def merge_positions(module: M) -> M:
    """Merge the two parts into one plain table of positions, in place.

    Returns:
        `module`.
    """
    tower = _tower(module)
    if is_split(tower.holder):
        tower.merge()
    return module


def is_split(module: nn.Module) -> bool:
    """Return whether the table of positions is in two parts."""
    return any(getattr(each, "kept_positions", None) is not None for each in module.modules())


class LongPositions(nn.Embedding):
    """The table of positions of a text tower in transformers, in two parts.

    Attributes:
        kept_positions: how many rows are fixed.
        positional_embedding_res: the parameter that holds the other rows.
    """

    kept_positions: int
    positional_embedding_res: nn.Parameter

    @property
    def weight(self) -> Float[Tensor, "positions d"]:  # type: ignore[override]
        """The table that texts are embedded with."""
        return _merged(self, "weight")


def _long_class(base: type[nn.Module]) -> type[nn.Module]:
    """Derive a class from open_clip's tower that joins its two tables in every pass."""

    def positional_embedding(self: nn.Module) -> Tensor:
        return _merged(self, "positional_embedding")

    return type(
        f"Long{base.__name__}",
        (base,),
        {
            "positional_embedding": property(
                positional_embedding, doc="The table that texts are embedded with."
            )
        },
    )


def _merged(holder: Any, name: str) -> Tensor:
    fixed = holder._parameters[name].detach()
    return merged_positions(fixed, holder.positional_embedding_res, holder.kept_positions)


class _Tower(ABC):
    """A text tower's table of positions, wherever a library keeps it."""

    def __init__(self, module: nn.Module, holder: nn.Module, name: str) -> None:
        self.module, self.holder, self.name = module, holder, name

    @property
    def table(self) -> nn.Parameter:
        found = self.holder._parameters[self.name]
        assert found is not None
        return found

    def set_table(self, table: nn.Parameter) -> None:
        self.holder._parameters[self.name] = table

    def split(self, kept: int) -> None:
        table = self.table
        if not is_split(self.holder):
            trained = nn.Parameter(table.detach().clone(), table.requires_grad)
            self.holder.register_parameter(RES, trained)
            self._become(long=True)
        table.requires_grad_(False)
        holder: Any = self.holder
        holder.kept_positions = kept

    def merge(self) -> None:
        holder: Any = self.holder
        trained = holder.positional_embedding_res.requires_grad
        merged = nn.Parameter(_merged(holder, self.name).detach().clone(), trained)
        self._become(long=False)
        del holder.positional_embedding_res, holder.kept_positions
        self.set_table(merged)

    @abstractmethod
    def set_length(self, length: int) -> None:
        """Let the tower take texts of `length` tokens."""

    @abstractmethod
    def _become(self, *, long: bool) -> None:
        """Change the holder's class to one with a table in two parts, or back."""


class _Transformers(_Tower):
    def set_length(self, length: int) -> None:
        module: Any = self.module
        embeddings, holder = module.text_model.embeddings, self.holder
        ids = torch.arange(length, device=self.table.device)
        embeddings.position_ids = ids.expand((1, -1))
        holder.num_embeddings = length  # type: ignore[assignment]
        module.config.text_config.max_position_embeddings = length
        module.text_model.config.max_position_embeddings = length

    def _become(self, *, long: bool) -> None:
        self.holder.__class__ = LongPositions if long else nn.Embedding


class _OpenClip(_Tower):
    def set_length(self, length: int) -> None:
        mask = torch.full((length, length), float("-inf"), device=self.table.device).triu_(1)
        holder: Any = self.holder
        holder.attn_mask = mask.to(holder.attn_mask.dtype)
        for each in {id(part): part for part in (self.holder, self.module)}.values():
            for name in ("context_length", "num_pos"):
                if hasattr(each, name):
                    setattr(each, name, length)

    def _become(self, *, long: bool) -> None:
        kind = type(self.holder)
        self.holder.__class__ = _long_class(kind) if long else kind.__bases__[0]


def _tower(module: nn.Module) -> _Tower:
    text: Any = getattr(module, "text_model", None)
    positions = getattr(getattr(text, "embeddings", None), "position_embedding", None)
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if isinstance(positions, nn.Embedding) and kind == "clip":
        return _Transformers(module, positions, "weight")
    holder = getattr(module, "text", module)
    table = holder._parameters.get("positional_embedding")
    if table is not None and getattr(holder, "attn_mask", None) is not None:
        return _OpenClip(module, holder, "positional_embedding")
    raise UserError(
        f"{type(module).__name__} has no text tower of CLIP's kind (with a table of positions)."
    )
