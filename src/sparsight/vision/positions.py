"""Which patch each position of the residual stream shows, found out with marked images.

Image A and image B are two noises. In image number b, the patches whose index has bit b set come
from B, all others from A. At a position that shows one patch, the b-th image looks like B or like
A, so that a dozen images spell out the index of every position's patch, whatever the architecture.
Where a convolution mixes neighbours, the nearer of the two still tells the patch of the strongest
influence. Only what comes before the first block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsight.errors import UserError

AT_ONCE = 8
"""Images in one pass: large images of small patches take much memory."""

_SAME = 1e-4
"""Relative difference below which two activations are the same."""

_ONE_PATCH = 0.1
"""How close, in distances between A and B, a position is to either if it shows one patch."""

Embed = Callable[[Tensor], Tensor]
"""From pixels `[batch, 3, height, width]` to what enters block 0, `[batch, positions, d_in]`."""


@dataclass(frozen=True)
class _Positions:
    """What the marked images said, one entry per position."""

    patch: Tensor
    """Index of the patch that each position shows."""
    shows: Tensor
    """Whether the position depends on the image at all."""
    pure: Tensor
    """Whether it depends on this one patch alone."""


def count_prefix(
    id: str, embed: Embed, input_shape: tuple[int, int, int], patch: tuple[int, int], hint: str = ""
) -> int:
    """How many positions stand before the patches, which must follow in reading order.

    Args:
        id: the model's, for messages.
        embed: the model up to its first block.
        input_shape: channels, height, width of a preprocessed image.
        patch: height and width of a patch, in pixels.
        hint: a setting of the model that may be the cause of a refusal, for messages.

    Raises:
        UserError: the positions are not a prefix and then each patch once, in reading order; the
            message says what they are.
    """
    grid = (input_shape[1] // patch[0], input_shape[2] // patch[1])
    found = _trace(id, embed, input_shape, patch, grid)
    n = grid[0] * grid[1]
    order = torch.arange(n)
    for prefix in range(max(0, len(found.patch) - n) + 1):
        here = slice(prefix, prefix + n)
        if torch.equal(found.patch[here], order) and bool(found.shows[here].all()):
            behind = len(found.patch) - prefix - n
            if not behind:
                return prefix
            raise UserError(
                f"{id}: {behind} of its {len(found.patch)} positions stand behind the patches "
                f"(detection tokens, queries or the like), after {prefix} before them. Sparsight "
                "reads models whose patches come last."
            )
    raise UserError(f"{id}: {_reason(found, grid)}{hint}.")


def _trace(
    id: str,
    embed: Embed,
    input_shape: tuple[int, int, int],
    patch: tuple[int, int],
    grid: tuple[int, int],
) -> _Positions:
    n = grid[0] * grid[1]
    noise = torch.randn((2, *input_shape), generator=torch.Generator().manual_seed(1))
    ends = embed(noise).float()
    apart = (ends[0] - ends[1]).norm(dim=-1)
    index = torch.arange(n).view(1, 1, *grid)
    code = torch.zeros(ends.shape[1], dtype=torch.int64)
    doubt = torch.zeros(ends.shape[1])
    bits = list(range(max(1, (n - 1).bit_length())))
    for first in range(0, len(bits), AT_ONCE):
        some = bits[first : first + AT_ONCE]
        images = [_mixed(noise, (index >> bit) & 1, patch) for bit in some]
        states = embed(torch.cat([noise[:1], *images])).float()
        # What comes in another pass, beside other images, must be what it was.
        if not float((states[0] - ends[0]).norm()) <= _SAME * float(ends[0].norm()):
            raise UserError(
                f"{id}: the same image gives other activations in another pass: the model draws "
                "at random which patches it sees, or in which order."
            )
        for bit, state in zip(some, states[1:], strict=True):
            to_a, to_b = ((state - end).norm(dim=-1) for end in ends)
            code |= (to_b < to_a).long().cpu() << bit
            nearer = torch.minimum(to_a, to_b) / apart.clamp(min=1e-30)
            doubt = torch.maximum(doubt, nearer.cpu())
    scale = ends.norm(dim=-1).sum(dim=0)
    return _Positions(code, (apart > _SAME * scale).cpu(), doubt < _ONE_PATCH)


def _mixed(noise: Tensor, chosen: Tensor, patch: tuple[int, int]) -> Tensor:
    """A batch of one image: the chosen patches of the second noise, the others of the first."""
    mask = chosen.repeat_interleave(patch[0], dim=2).repeat_interleave(patch[1], dim=3).bool()
    image = noise[:1].clone()
    height, width = mask.shape[2:]
    image[..., :height, :width] = torch.where(
        mask, noise[1:, :, :height, :width], noise[:1, :, :height, :width]
    )
    return image


def _reason(found: _Positions, grid: tuple[int, int]) -> str:
    """Why the positions are not a prefix and then the patches."""
    n = grid[0] * grid[1]
    patches = f"{grid[0]} × {grid[1]} patches"
    seen = found.shows & found.pure
    shown = found.patch[seen].tolist()
    if int(found.shows.sum()) > len(shown) and len(shown) < n:
        return (
            f"{len(found.patch)} positions do not show one of its {patches} each: the model merges "
            "or mixes patches before its first block"
        )
    if len(set(shown)) < len(shown):
        return f"some of its {patches} are shown by several positions"
    if len(shown) < n:
        return f"only {len(shown)} of its {patches} come to the first block, the others are dropped"
    wrong = next(i for i, patch in enumerate(shown) if patch != i) if sorted(shown) != shown else 0
    if sorted(shown) == shown:
        return f"other positions stand between its {patches}"
    return (
        f"its {patches} come in another order than that of reading (position {wrong} of them "
        f"shows patch {shown[wrong]}): the model shuffles them or cuts them into windows"
    )


def find_cls(embed: Embed, parameters: Sequence[Tensor], input_shape: tuple[int, int, int]) -> bool:
    """Whether position 0, and it alone, is made of one of these parameters.

    Args:
        embed: the model up to its first block.
        parameters: those that are called a class token; each is changed and put back.
        input_shape: channels, height, width of a preprocessed image.
    """
    pixels = torch.zeros((1, *input_shape))
    plain = embed(pixels)
    for parameter in parameters:
        kept = parameter.detach().clone()
        try:
            parameter.add_(1 + kept.abs().max())
            changed = (embed(pixels) != plain).any(dim=-1)[0].nonzero().flatten().tolist()
        finally:
            parameter.copy_(kept)
        if changed == [0]:
            return True
    return False
