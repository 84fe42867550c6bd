"""Two pictures through a model that was just loaded: what its sites are really like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.vision.hooks import Place, touching
from sparsight.vision.tower import MLP_WRITE, Tower

_POINTS = 65_536
_STEEPEST = 2.0


@dataclass(frozen=True)
class Site:
    """A site, measured."""

    place: Place
    d_in: int
    per_image: bool
    """One vector an image, not one a position: `embedding`, and `final_norm` where the model
    normalises its CLS position alone."""


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
) -> Anatomy:
    """Run `forward` on a grey and a random picture and measure every site.

    `attn_out` and `mlp_out` are offered only if
    `resid_pre + attn_out + mlp_out = resid_post` holds in every block to float32 rounding; so
    they are what is added to the residual stream, whatever the modules are called. `mlp_post` is
    offered only if the linear map behind it gives `mlp_out`, up to LayerScale, and `mlp_pre` only
    if `mlp_post` is one function of it, number by number.

    Args:
        id: the model's, for messages.
        tower: the parts found; weights must be float32.
        embedding: where the joint embedding comes out, if there is one.
        forward: runs the vision part, embedding included.
        input_shape: channels, height, width of a preprocessed picture.

    Raises:
        UserError: the model does not take pictures of that size, or its residual stream is not
            `[batch, prefix + patches, d_in]`.
    """
    places = tower.places()
    if embedding is not None:
        places["embedding"] = embedding
    seen = _observe(id, places, forward, input_shape, tower)

    stream = seen.shapes.get("blocks.0.resid_pre")
    if stream is None or len(stream) != 3 or stream[0] != 2:
        found = "nothing" if stream is None else str(list(stream))
        raise UserError(
            f"{id}: two pictures give {found} at block 0, expected [2, positions, d_in]. "
            "(open_clip before 2.27 puts positions first; install a newer one.)"
        )
    offered = {
        site: shape
        for site, shape in seen.shapes.items()
        if seen.holds.get(site.rpartition(".")[2], True)
    }

    height, width = input_shape[1:]
    grid = (height // tower.patches.stride[0], width // tower.patches.stride[1])
    n_tokens = stream[1]
    n_prefix = n_tokens - grid[0] * grid[1]
    if n_prefix < 0:
        raise UserError(
            f"{id}: {n_tokens} positions for {grid[0]} × {grid[1]} patches; models that merge "
            "patches before the first block are not supported."
        )
    return Anatomy(
        sites={
            site: Site(place, d_in=offered[site][-1], per_image=offered[site][1] == 1)
            for site, place in places.items()
            if site in offered
        },
        n_blocks=len(tower.blocks),
        n_tokens=n_tokens,
        n_prefix=n_prefix,
        has_cls=n_prefix > 0 and tower.has_cls_parameter,
        patch_grid=grid,
    )


@dataclass
class _Observer:
    """Shapes of the sites; the activations of one block at a time, big models have many."""

    shapes: dict[str, torch.Size] = field(default_factory=dict)
    holds: dict[str, bool] = field(
        default_factory=lambda: dict.fromkeys(("attn_out", "mlp_out", "mlp_pre", "mlp_post"), True)
    )
    _block: dict[str, Tensor] = field(default_factory=dict)

    def note(self, site: str, x: Tensor) -> None:
        if not site.endswith(MLP_WRITE):
            self.shapes[site] = x.shape
        if not site.startswith("blocks."):
            return
        part = site.rpartition(".")[2]
        self._block[part] = x
        if part == "resid_post":
            adds_up = _adds_up(self._block)
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
    observer = _Observer()
    with ExitStack() as stack:
        for site, place in {**places, **tower.mlp_writes()}.items():
            stack.enter_context(touching(place, partial(observer.note, site)))
        try:
            forward(pixels)
        except SparsightError:
            raise
        except (ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"{id}: the model does not run on the {input_shape[1]} × {input_shape[2]} "
                f"pictures that its own preprocessing makes ({error})."
            ) from error
    return observer


def _adds_up(block: Mapping[str, Tensor]) -> bool:
    total = block["resid_post"]
    parts = [block.get(part) for part in ("resid_pre", "attn_out", "mlp_out")]
    if any(part is None or part.shape != total.shape for part in parts):
        return False
    tensors = [part.double() for part in parts if part is not None]
    error = (sum(tensors, torch.zeros_like(tensors[0])) - total.double()).norm()
    return bool(error <= 1e-5 * sum(float(part.norm()) for part in tensors))


def _writes(block: Mapping[str, Tensor]) -> bool:
    """Whether what the second linear map gives is `mlp_out`, times one number a dimension."""
    stream, neurons = block["resid_post"], block.get("mlp_post")
    written, out = block.get(MLP_WRITE), block["mlp_out"]
    if neurons is None or written is None:
        return False
    if neurons.shape[:2] != stream.shape[:2] or written.shape != out.shape:
        return False
    written, out = written.double().flatten(0, 1), out.double().flatten(0, 1)
    scale = (written * out).sum(dim=0) / written.square().sum(dim=0).clamp_min(1e-30)
    return bool((written * scale - out).norm() <= 1e-5 * out.norm())


def _is_activated(block: Mapping[str, Tensor]) -> bool:
    """Whether `mlp_post` is one smooth function of `mlp_pre`, applied to each number.

    Seen in the order of `mlp_pre`: what lies close together there does so in `mlp_post`. Behind a
    gate it does not.
    """
    before, after = block.get("mlp_pre"), block["mlp_post"]
    if before is None or before.shape != after.shape:
        return False
    step = max(1, before.numel() // _POINTS) | 1
    before, order = before.flatten()[::step].double().sort()
    after = after.flatten()[::step].double()[order]
    rounding = 1e-4 * float(after.abs().max())
    return bool((after.diff().abs() <= _STEEPEST * before.diff() + rounding).all())
