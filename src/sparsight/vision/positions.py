"""Find out with marked images which patch each position of the residual stream shows.

Images A and B are noise. A marked image has some patches of B and all others of A: in marked image
number b, the patches whose index has bit b set come from B. At a position that shows one patch, the
b-th image looks like B or like A, so that a dozen images spell out the index of every position's
patch, whatever the architecture. If a convolution mixes neighbours (ViTPose pads its patches),
images with random patches show which patch has the strongest influence. Only the part of the model
before the first block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsight.errors import UserError

AT_ONCE = 8
"""Images in one pass: large images with small patches take much memory."""

RANDOM_MARKS = 128
"""Number of randomly marked images, used if a dozen leave doubt."""

_SAME = 1e-4
"""Relative difference below which two activations are the same."""

_ONE_PATCH = 0.1
"""Largest distance from A or B, relative to that between them, at a position with one patch."""

Embed = Callable[[Tensor], Tensor]
"""From pixels `[batch, 3, height, width]` to the input of block 0, `[batch, positions, d_in]`."""


@dataclass(frozen=True)
class _Positions:
    """The result of the marked images, one entry per position."""

    patch: Tensor
    """Index of the patch that each position shows."""
    shows: Tensor
    """Whether the position depends on the image at all."""
    pure: Tensor
    """Whether it depends only on this patch."""


def count_prefix(
    id: str, embed: Embed, input_shape: tuple[int, int, int], patch: tuple[int, int], hint: str = ""
) -> int:
    """Count the positions before the patches, which must follow in reading order.

    Args:
        id: the model's id, for messages.
        embed: the model up to its first block.
        input_shape: channels, height, width of a preprocessed image.
        patch: height and width of a patch, in pixels.
        hint: a setting of the model that may cause a refusal, for messages.

    Raises:
        UserError: the positions are not a prefix followed by each patch once, in reading order;
            the message says what they are.
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
                f"{id}: its {len(found.patch)} positions include {behind} after the patches "
                f"(detection tokens or queries, for example) and {prefix} before. Sparsight reads "
                "models whose patches come last."
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
    """Measure with random marks how each patch affects each position, `[positions, patches]`.

    Each pass has its own noise images: in a single one, a patch may happen to change little.
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
    """Measure where each position is between A (0) and B (1), `[images, positions]`.

    Args:
        id: the model's id, for messages.
        embed: the model up to its first block.
        noise: the images A and B.
        ends: their activations.
        marks: for each image, 1 for the patches of B, `[images, patches]`.
        patch: height and width of a patch.
        grid: rows and columns of patches.
    """
    way = ends[1] - ends[0]
    length = way.square().sum(dim=-1).clamp(min=1e-30)
    found = []
    for marks_in_pass in marks.split(AT_ONCE):
        images = [_mixed(noise, mark.view(1, 1, *grid), patch) for mark in marks_in_pass]
        states = embed(torch.cat([noise[:1], *images])).float()
        # The same image must give the same in another pass, together with other images.
        if not float((states[0] - ends[0]).norm()) <= _SAME * float(ends[0].norm()):
            raise UserError(
                f"{id}: the same image gives different activations in another pass: the model "
                "chooses at random which patches it sees, or in which order."
            )
        found.append((((states[1:] - ends[0]) * way).sum(dim=-1) / length).cpu())
    return torch.cat(found)


def _mixed(noise: Tensor, chosen: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return a batch of one image: chosen patches from the second noise, others from the first."""
    mask = chosen.repeat_interleave(patch[0], dim=2).repeat_interleave(patch[1], dim=3).bool()
    image = noise[:1].clone()
    height, width = mask.shape[2:]
    image[..., :height, :width] = torch.where(
        mask, noise[1:, :, :height, :width], noise[:1, :, :height, :width]
    )
    return image


def _reason(found: _Positions, grid: tuple[int, int]) -> str:
    """Say why the positions are not a prefix followed by the patches."""
    n = grid[0] * grid[1]
    patches = f"{grid[0]} × {grid[1]} patches"
    seen = found.shows & found.pure
    shown = found.patch[seen].tolist()
    if int(found.shows.sum()) > len(shown) and len(shown) < n:
        return (
            f"its {len(found.patch)} positions do not each show one of its {patches}: the model "
            "merges or mixes patches before its first block"
        )
    if len(set(shown)) < len(shown):
        return f"several positions show the same one of its {patches}"
    if len(shown) < n:
        return f"only {len(shown)} of its {patches} reach the first block; the others are dropped"
    wrong = next(i for i, patch in enumerate(shown) if patch != i) if sorted(shown) != shown else 0
    if sorted(shown) == shown:
        return f"there are other positions between its {patches}"
    return (
        f"its {patches} are not in reading order (position {wrong} among them shows patch "
        f"{shown[wrong]}): the model shuffles them or cuts them into windows"
    )


def find_cls(
    embed: Embed, parameters: Sequence[Tensor], input_shape: tuple[int, int, int], n_prefix: int
) -> bool:
    """Return whether position 0 depends on a class token and no patch does.

    Args:
        embed: the model up to its first block.
        parameters: parameters named as a class token; each is changed and then restored.
        input_shape: channels, height, width of a preprocessed image.
        n_prefix: number of positions before the patches.
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
