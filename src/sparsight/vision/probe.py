"""Put two images through a model that was just loaded, to see what its sites are really like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparsight.errors import SparsightError, UserError
from sparsight.vision.hooks import Place, StopForward, touching
from sparsight.vision.positions import count_prefix, find_cls
from sparsight.vision.settings import reason
from sparsight.vision.tower import MLP_WRITE, Tower

_POINTS = 65_536
_STEEPEST = 2.0
_STAY = 0.75
"""Least share of positions that resemble themselves most if a block keeps their order."""


@dataclass(frozen=True)
class Site:
    """A site, as measured."""

    place: Place
    d_in: int
    per_image: bool
    """One vector per image, not per position: `embedding`, and `final_norm` if the model normalises
    only its CLS position."""


@dataclass(frozen=True)
class Anatomy:
    """The sites of a model and the layout of its residual stream."""

    sites: Mapping[str, Site]
    n_blocks: int
    n_tokens: int
    n_prefix: int
    has_cls: bool
    patch_grid: tuple[int, int]


@torch.no_grad()
def probe(
    id: str,
    tower: Tower,
    embedding: Place | None,
    forward: Callable[[Tensor], Tensor],
    input_shape: tuple[int, int, int],
    hint: str = "",
) -> Anatomy:
    """Run `forward` on a grey and a random image and measure every site.

    Marked images (`positions.py`) show which positions are the prefix, and that the patches follow
    in reading order; each block is checked for keeping that order.

    `attn_out` and `mlp_out` are offered only if `resid_pre + attn_out + mlp_out = resid_post` holds
    in every block to float32 rounding, so that they are what is added to the residual stream,
    whatever the modules are called. `mlp_post` is offered only if the linear map after it gives
    `mlp_out`, up to LayerScale, and `mlp_pre` only if `mlp_post` is an elementwise function of it.

    Args:
        id: the model's id, for messages.
        tower: the parts that were found; weights must be float32.
        embedding: the place of the joint embedding, if there is one.
        forward: runs the vision part, embedding included.
        input_shape: channels, height, width of a preprocessed image.
        hint: a setting of the model that may be why its positions are refused, for messages.

    Raises:
        UserError: the model does not take images of that size, or its residual stream is not
            `[batch, prefix + patches, d_in]` from the first block to the last.
    """
    places = tower.places()
    if embedding is not None:
        places["embedding"] = embedding
    seen = _observe(id, places, forward, input_shape, tower)
    problem = _stream_problem(seen)
    if problem is not None:
        raise UserError(f"{id}: {problem}.")
    offered = {
        site: shape
        for site, shape in seen.shapes.items()
        if seen.holds.get(site.rpartition(".")[2], True)
        and seen.calls[site] == 1
        and (site != "final_norm" or seen.normalised_last)
    }
    embed = partial(_before_blocks, places["blocks.0.resid_pre"], forward, tower)
    patch = (int(tower.patches.stride[0]), int(tower.patches.stride[1]))
    n_prefix = count_prefix(id, embed, input_shape, patch, hint)
    return Anatomy(
        sites={
            site: Site(place, d_in=offered[site][-1], per_image=offered[site][1] == 1)
            for site, place in places.items()
            if site in offered
        },
        n_blocks=len(tower.blocks),
        n_tokens=seen.shapes["blocks.0.resid_pre"][1],
        n_prefix=n_prefix,
        has_cls=find_cls(embed, tower.cls_parameters(), input_shape, n_prefix),
        patch_grid=(input_shape[1] // patch[0], input_shape[2] // patch[1]),
    )


def _stream_problem(seen: _Observer) -> str | None:
    """Say why the residual stream changes its layout between blocks; None if it does not."""
    stream = seen.shapes.get("blocks.0.resid_pre")
    if stream is None or len(stream) != 3 or stream[0] != 2:
        return _odd_stream(stream)
    for site, shape in seen.shapes.items():
        if not site.endswith(("resid_pre", "resid_post")):
            continue
        if shape != stream:
            return (
                f"two images give {list(stream)} (images, positions, d_in) before block 0 and "
                f"{list(shape)} at {site}. Sparsight reads models whose positions stay the same "
                "from block to block"
            )
        if seen.calls[site] != 1:
            return f"block {site.split('.')[1]} runs {seen.calls[site]} times per image"
    if seen.moved:
        return (
            f"positions change their order {seen.moved[0]} (the model cuts images into windows or "
            "shuffles patches). Sparsight reads models whose positions keep their order from block "
            "to block"
        )
    return None


def _odd_stream(stream: torch.Size | None) -> str:
    """Say what is wrong with a residual stream of two images that has another shape."""
    expected = "expected [2, positions, d_in]"
    if stream is None:
        return f"two images give nothing at block 0, {expected}"
    found = f"two images give {list(stream)} at block 0, {expected}"
    if len(stream) == 3 and stream[1] == 2:
        return (
            f"{found}: positions come first (open_clip before 2.27 does that; install a newer "
            "version), or the model cuts each image into windows"
        )
    if len(stream) == 3:
        return f"{found}: the model cuts each image into windows, crops or frames"
    return (
        f"{found}: its patches stay in rows and columns, as in SAM and other models with windows "
        "or convolutions. Sparsight only opens plain vision transformers"
    )


def _before_blocks(
    place: Place, forward: Callable[[Tensor], Tensor], tower: Tower, pixels: Tensor
) -> Tensor:
    """Return the input of block 0; the forward pass stops there."""
    found: list[Tensor] = []

    def catch(x: Tensor) -> None:
        found.append(x.detach().clone())
        raise StopForward

    with touching(place, catch), suppress(StopForward):
        forward(pixels.to(tower.patches.weight.device))
    return found[0]


@dataclass
class _Observer:
    """The shapes of the sites, and the activations of one block at a time, to save memory."""

    n_blocks: int
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    """How often each site was reached."""
    normalised_last: bool = False
    """Whether the final norm comes after all blocks."""
    holds: dict[str, bool] = field(
        default_factory=lambda: dict.fromkeys(("attn_out", "mlp_out", "mlp_pre", "mlp_post"), True)
    )
    moved: list[str] = field(default_factory=list)
    """Where positions change their order, in words."""
    _block: dict[str, Tensor] = field(default_factory=dict)
    _last: Tensor | None = None
    """The output of the previous block."""

    def note(self, site: str, x: Tensor) -> None:
        if not site.endswith(MLP_WRITE):
            self.shapes[site] = x.shape
            self.calls[site] += 1
        if site == "final_norm":
            self.normalised_last = f"blocks.{self.n_blocks - 1}.resid_post" in self.shapes
        if not site.startswith("blocks."):
            return
        _, block, part = site.split(".")
        self._block[part] = x
        if part == "resid_pre" and self._last is not None and not _same_order(self._last, x):
            self.moved.append(f"before block {block}")
        if part == "resid_post":
            adds_up = _adds_up(self._block)
            if (
                not adds_up
                and not _adds_up_scaled(self._block)
                and not _same_order(self._block.get("resid_pre"), x)
            ):
                self.moved.append(f"in block {block}")
            self._last = x
            writes = adds_up and _writes(self._block)
            found = {"attn_out": adds_up, "mlp_out": adds_up, "mlp_post": writes}
            found["mlp_pre"] = writes and _is_activated(self._block)
            self.holds = {part: self.holds[part] and found[part] for part in self.holds}
            self._block.clear()


def _observe(
    id: str,
    places: Mapping[str, Place],
    forward: Callable[[Tensor], Tensor],
    input_shape: tuple[int, int, int],
    tower: Tower,
) -> _Observer:
    noise = torch.randn(input_shape, generator=torch.Generator().manual_seed(0))
    pixels = torch.stack([torch.zeros(input_shape), noise]).to(tower.patches.weight.device)
    observer = _Observer(len(tower.blocks))
    with ExitStack() as stack:
        for site, place in {**places, **tower.mlp_writes()}.items():
            stack.enter_context(touching(place, partial(observer.note, site)))
        try:
            forward(pixels)
        except SparsightError:
            raise
        except Exception as error:
            begun = "blocks.0.resid_pre" in observer.shapes
            if begun and (problem := _stream_problem(observer)) is not None:
                raise UserError(f"{id}: {problem}.") from error  # which makes the rest fail
            raise UserError(
                f"{id}: the model does not run on the {input_shape[1]} × {input_shape[2]} "
                f"images that its own preprocessing produces ({reason(error)})."
            ) from error
    return observer


def _same_order(before: Tensor | None, after: Tensor) -> bool:
    """Return whether most positions of the second image are still nearest to themselves.

    True if the shapes differ, which is checked separately.
    """
    if before is None or before.shape != after.shape or before.ndim != 3 or len(before) != 2:
        return True
    if torch.equal(before, after):
        return True
    one, two = (x[1].float() - x[1].float().mean(dim=0) for x in (before, after))
    alike = normalize(one, dim=-1) @ normalize(two, dim=-1).mT
    own = torch.arange(len(alike), device=alike.device)
    return bool((alike.argmax(dim=0) == own).float().mean() >= _STAY)


def _adds_up(block: Mapping[str, Tensor]) -> bool:
    total = block["resid_post"]
    parts = [block.get(part) for part in ("resid_pre", "attn_out", "mlp_out")]
    if any(part is None or part.shape != total.shape for part in parts):
        return False
    tensors = [part.cpu().double() for part in parts if part is not None]
    error = (sum(tensors, torch.zeros_like(tensors[0])) - total.cpu().double()).norm()
    return bool(error <= 1e-5 * sum(float(part.norm()) for part in tensors))


def _adds_up_scaled(block: Mapping[str, Tensor]) -> bool:
    """Return whether attention and MLP are added after scaling per dimension (BEiT, InternVL)."""
    parts = [block.get(part) for part in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    if any(part is None or part.shape != block["resid_post"].shape for part in parts):
        return False
    before, attention, mlp, after = (
        part.cpu().double().flatten(0, 1).mT for part in parts if part is not None
    )
    written = torch.stack([attention, mlp], dim=-1)
    added = (after - before).unsqueeze(-1)
    # Least squares in each dimension; the ridge is far below float32's rounding.
    squares = written.mT @ written
    ridge = 1e-12 * squares.diagonal(dim1=-2, dim2=-1).sum(dim=-1) + 1e-30
    scales = torch.linalg.solve(
        squares + ridge[:, None, None] * torch.eye(2, dtype=torch.float64), written.mT @ added
    )
    return bool((written @ scales - added).norm() <= 1e-5 * added.norm())


def _writes(block: Mapping[str, Tensor]) -> bool:
    """Return whether the second linear map gives `mlp_out`, up to one factor per dimension."""
    stream, neurons = block["resid_post"], block.get("mlp_post")
    written, out = block.get(MLP_WRITE), block["mlp_out"]
    if neurons is None or written is None:
        return False
    if neurons.shape[:2] != stream.shape[:2] or written.shape != out.shape:
        return False
    written, out = written.cpu().double().flatten(0, 1), out.cpu().double().flatten(0, 1)
    scale = (written * out).sum(dim=0) / written.square().sum(dim=0).clamp_min(1e-30)
    return bool((written * scale - out).norm() <= 1e-5 * out.norm())


def _is_activated(block: Mapping[str, Tensor]) -> bool:
    """Return whether `mlp_post` is one smooth function of `mlp_pre`, applied elementwise.

    If so, numbers that are close in `mlp_pre` are close in `mlp_post`. After a gate they are not.
    """
    before, after = block.get("mlp_pre"), block["mlp_post"]
    if before is None or before.shape != after.shape:
        return False
    step = max(1, before.numel() // _POINTS) | 1
    before, order = before.flatten()[::step].cpu().double().sort()
    after = after.flatten()[::step].cpu().double()[order]
    rounding = 1e-4 * float(after.abs().max())
    return bool((after.diff().abs() <= _STEEPEST * before.diff() + rounding).all())
