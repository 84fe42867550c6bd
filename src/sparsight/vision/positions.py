"""Which patch each position of the residual stream shows, found out with marked images.

Image A and image B are two noises. A marked image has some patches of B, all others of A. In marked
image number b those patches come from B whose index has bit b set. At a position that shows one
patch, the b-th image looks like B or like A, so that a dozen images spell out the index of every
position's patch, whatever the architecture. Where a convolution mixes neighbours (ViTPose pads its
patches), images with patches at random tell which one has the strongest influence. Only what comes
before the first block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsight.errors import UserError

AT_ONCE = 8
"""Images in one pass: large images of small patches take much memory."""

RANDOM_MARKS = 128
"""Images marked at random, where a dozen leave doubt."""

_SAME = 1e-4
"""Relative difference below which two activations are the same."""

_ONE_PATCH = 0.1
"""How close to A or B, on the way from one to the other, a position is that shows one patch."""

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
    noise = _noise(input_shape, seed=0)
    ends = embed(noise).float()
    apart = (ends[0] - ends[1]).norm(dim=-1)
    shows = (apart > _SAME * ends.norm(dim=-1).sum(dim=0)).cpu()
    index = torch.arange(n)
    bits = torch.stack([(index >> bit) & 1 for bit in range(max(1, (n - 1).bit_length()))])
    shares = _shares(id, embed, noise, ends, bits, patch, grid)
    read = (shares > 0.5).long()
    code = (read << torch.arange(len(bits))[:, None]).sum(dim=0)
    pure = ((shares - read).abs() < _ONE_PATCH).all(dim=0)
    if not bool(pure[shows].all()):
        influence = _influence(id, embed, input_shape, patch, grid)
        code = torch.where(pure, code, influence.argmax(dim=1))
    return _Positions(code, shows, pure)


def _influence(
    id: str,
    embed: Embed,
    input_shape: tuple[int, int, int],
    patch: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """How strongly each patch acts on each position, `[positions, patches]`, by random marks.

    Each pass has noises of its own: one patch of one noise may happen to change little.
    """
    random = torch.Generator().manual_seed(0)
    total: Tensor | None = None
    for seed in range(1, 1 + RANDOM_MARKS // AT_ONCE):
        marks = torch.randint(2, (AT_ONCE, grid[0] * grid[1]), generator=random)
        noise = _noise(input_shape, seed)
        shares = _shares(id, embed, noise, embed(noise).float(), marks, patch, grid)
        found = (shares - 0.5).mT @ (2.0 * marks - 1)
        total = found if total is None else total + found
    assert total is not None
    return total


def _noise(input_shape: tuple[int, int, int], seed: int) -> Tensor:
    return torch.randn((2, *input_shape), generator=torch.Generator().manual_seed(seed))


def _shares(
    id: str,
    embed: Embed,
    noise: Tensor,
    ends: Tensor,
    marks: Tensor,
    patch: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """How far each position is from A, 0, to B, 1, in each marked image: `[images, positions]`.

    Args:
        id: the model's, for messages.
        embed: the model up to its first block.
        noise: the images A and B.
        ends: what they give.
        marks: for each image, 1 for the patches of B, `[images, patches]`.
        patch: height and width of a patch.
        grid: rows and columns of patches.
    """
    way = ends[1] - ends[0]
    length = way.square().sum(dim=-1).clamp(min=1e-30)
    found = []
    for some in marks.split(AT_ONCE):
        images = [_mixed(noise, mark.view(1, 1, *grid), patch) for mark in some]
        states = embed(torch.cat([noise[:1], *images])).float()
        # What comes in another pass, beside other images, must be what it was.
        if not float((states[0] - ends[0]).norm()) <= _SAME * float(ends[0].norm()):
            raise UserError(
                f"{id}: the same image gives other activations in another pass: the model draws "
                "at random which patches it sees, or in which order."
            )
        found.append((((states[1:] - ends[0]) * way).sum(dim=-1) / length).cpu())
    return torch.cat(found)


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


def find_cls(
    embed: Embed, parameters: Sequence[Tensor], input_shape: tuple[int, int, int], n_prefix: int
) -> bool:
    """Whether position 0 is made of a class token, and no patch is.

    Args:
        embed: the model up to its first block.
        parameters: those that are called a class token; each is changed and put back.
        input_shape: channels, height, width of a preprocessed image.
        n_prefix: how many positions stand before the patches.
    """
    pixels = torch.zeros((1, *input_shape))
    plain = embed(pixels)
    for parameter in parameters:
        kept = parameter.detach().clone()
        try:
            parameter.add_(1 + kept.abs().max())
            changed = (embed(pixels) != plain).any(dim=-1)[0]
        finally:
            parameter.copy_(kept)
        if n_prefix and bool(changed[0]) and not bool(changed[n_prefix:].any()):
            return True
    return False
