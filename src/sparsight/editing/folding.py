"""Write an edit into the model's own weights, so that a plain model behaves like the edited one.

That is possible if the edit is affine, y ↦ A y + c, and comes directly after (or before) a linear
map that all positions share: W ← A W and b ← A b + c (or W ← W A and b ← b + W c).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.editing.actions import Keep, MeanAblation, Off, Scale, Set
from sparsight.editing.edits import DirectionAblation, Edit, LatentEdit, numbers
from sparsight.editing.interventions import check_site, intervene
from sparsight.errors import SparsightError, UserError
from sparsight.vision import VisionModel
from sparsight.vision.tower import ATTENTION_OUT, CLS, MLP_IN, MLP_OUT, find_part

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest error of the folded model's embeddings relative to their norm; half precision: 0.05."""

_RESIDUAL = (
    "The residual stream is a sum that every block reads while it grows: folding would also change "
    "what earlier blocks read. Ablate every write instead: every_write(model, directions)."
)


@dataclass(frozen=True)
class Affine:
    """y ↦ A y + c, in float64."""

    A: Float[Tensor, "d d"]
    c: Float[Tensor, " d"]

    def after(self, first: Affine) -> Affine:
        """Return the map that applies `first` and then this one."""
        return Affine(self.A @ first.A, self.A @ first.c + self.c)

    @property
    def shifts(self) -> bool:
        """Whether the map adds something."""
        return bool((self.c != 0).any())


@torch.no_grad()
def fold(model: VisionModel, edits: Sequence[Edit] | Edit, *, check: bool = True) -> VisionModel:
    """Return a copy of the model that by itself does what `intervene(model, edits)` does.

    `DirectionAblation` and `NeuronEdit` (off, set, scale, keep, mean) can be folded at all
    positions of `embedding`, `final_norm`, `blocks.I.attn_out`, `blocks.I.mlp_out`,
    `blocks.I.mlp_pre` and `blocks.I.mlp_post`; and of `blocks.0.resid_pre` if patches, positions
    and CLS reach it without a normalisation in between. Before it is returned, the copy is compared
    with the edited model on two images.

    Args:
        model: the model, which stays as it is.
        edits: as `intervene` takes them.
        check: as in `intervene`.

    Raises:
        UserError: an edit cannot be folded; the message says why.
        SparsightError: the copy does not do what the edits do.
    """
    given = [edits] if isinstance(edits, Edit) else list(edits)
    maps: dict[str, Affine] = {}
    # Neurons first, as in `Intervention`.
    for edit in sorted(given, key=lambda edit: isinstance(edit, DirectionAblation)):
        site = check_site(model, edit, check=check)
        affine = _affine(model, edit, site)
        maps[site] = affine.after(maps[site]) if site in maps else affine
    folded = copy.deepcopy(model)
    folded.__dict__.pop("weights_hash", None)
    for site, affine in maps.items():
        _target(folded, site).apply(affine)
    _compare(model, folded, given, check)
    return folded


def every_write(
    model: VisionModel,
    directions: Float[Tensor, "n d_in"],
    up_to: str | None = None,
    *,
    embeddings: bool = True,
) -> list[DirectionAblation]:
    """Ablate directions in every write into the residual stream, so that it never contains them.

    (Arditi et al. 2024, "Refusal in language models is mediated by a single direction", section
    2.4 and appendix E.) `intervene` takes the list; `fold` does so, too, if the model has no
    normalisation between patches and block 0. CLIP has one, so leave its embeddings out.

    Args:
        model: the model.
        directions: see `DirectionAblation`.
        up_to: the last `blocks.I.resid_pre` or `blocks.I.resid_post` to be free of them; None
            means the end.
        embeddings: include what patches, positions and CLS write (`blocks.0.resid_pre`).

    Raises:
        UserError: `up_to` is not in the residual stream, or the model has no `attn_out` and
            `mlp_out`.
    """
    last = model.n_blocks
    if up_to is not None:
        site = model.canonical_site(up_to)
        if ".resid_" not in site:
            raise UserError(f"up_to is {site}; give blocks.I.resid_pre or blocks.I.resid_post.")
        last = int(site.split(".")[1]) + site.endswith("resid_post")
    sites = ["blocks.0.resid_pre"] * embeddings
    sites += [f"blocks.{i}.{part}" for i in range(last) for part in ("attn_out", "mlp_out")]
    return [DirectionAblation(directions, model.canonical_site(site)) for site in sites]


def _affine(model: VisionModel, edit: Edit, site: str) -> Affine:
    """Return what an edit does at its site."""
    if isinstance(edit, LatentEdit):
        raise UserError(
            f"{site}: an edit of latents cannot be folded into weights, since which latents are "
            "active depends on the vector. Use DirectionAblation.of_latents(sae, latents)."
        )
    if edit.tokens != "all" and model.token_count(site, "all") > 1:
        raise UserError(
            f"{site}: an edit of {edit.tokens!r} only cannot be folded, since all positions share "
            "the weights. Use tokens='all'."
        )
    d = model.d_in(site)
    A, c = torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    if isinstance(edit, DirectionAblation):
        basis = edit.basis().cpu()
        A -= basis.T @ basis
        if edit.mean is not None:
            c = basis.T @ (basis @ edit.mean.detach().cpu().double())
        return Affine(A, c)
    chosen = list(numbers(edit.neurons, d))
    action = edit.action.of(chosen, d)
    if isinstance(action, Keep):
        dropped = sorted(set(range(d)) - set(chosen))
        A[dropped] = 0
    elif isinstance(action, Off | Set | MeanAblation):
        A[chosen] = 0
        c[chosen] = action(torch.zeros(len(chosen), dtype=torch.float64))
    elif isinstance(action, Scale):
        A[chosen] *= action.factor
    else:
        raise UserError(
            f"{site}: {type(action).__name__} cannot be folded into weights, since it is not "
            "linear. Use intervene."
        )
    return Affine(A, c)


@dataclass(frozen=True)
class _Behind:
    """y = W x + b (times LayerScale's γ, which goes into W)."""

    site: str
    linear: nn.Module
    gamma: nn.Parameter | None = None

    def apply(self, map: Affine) -> None:
        weight, bias = _weights(self.linear)
        if map.shifts and bias is None:
            raise _no_bias(self.site)
        A = map.A.to(weight.device)
        if self.gamma is not None:
            A = A * self.gamma.double()
            self.gamma.fill_(1.0)
        weight.copy_(A @ weight.double())
        if bias is not None:
            bias.copy_(A @ bias.double() + map.c.to(bias.device))


@dataclass(frozen=True)
class _Before:
    """y = W x + b, where x is changed."""

    site: str
    linear: nn.Module

    def apply(self, map: Affine) -> None:
        weight, bias = _weights(self.linear)
        wide = weight.double()
        if map.shifts:
            if bias is None:
                raise _no_bias(self.site)
            bias.add_((wide @ map.c.to(wide.device)).to(bias.dtype))
        weight.copy_(wide @ map.A.to(wide.device))


@dataclass(frozen=True)
class _Projection:
    """open_clip's projection, a bare matrix: y = x P."""

    site: str
    matrix: nn.Parameter
    behind: bool

    def apply(self, map: Affine) -> None:
        if map.shifts:
            raise _no_bias(self.site)
        wide, A = self.matrix.double(), map.A.to(self.matrix.device)
        self.matrix.copy_(wide @ A.T if self.behind else A.T @ wide)


@dataclass(frozen=True)
class _Embeddings:
    """The weights with which patches, positions, CLS and registers write into the stream."""

    site: str
    patches: nn.Conv2d
    others: Sequence[nn.Parameter]

    def apply(self, map: Affine) -> None:
        if map.shifts:
            raise _no_bias(self.site)
        for other in self.others:
            other.copy_(other.double() @ map.A.T.to(other.device))
        weight = self.patches.weight
        A = map.A.to(weight.device)
        weight.copy_((A @ weight.double().flatten(1)).view_as(weight))
        if self.patches.bias is not None:
            self.patches.bias.copy_(A @ self.patches.bias.double())


_Target = _Behind | _Before | _Projection | _Embeddings


def _target(model: VisionModel, site: str) -> _Target:
    """Return the weights directly before or after a site."""
    if site in ("embedding", "final_norm"):
        return _head(model, site)
    _, number, part = site.split(".")
    block = model.tower.blocks[int(number)]
    if part in ("resid_pre", "resid_post"):
        if (number, part) != ("0", "resid_pre"):
            raise UserError(f"{site} cannot be folded. {_RESIDUAL}")
        return _embeddings(model, site)
    names = {"attn_out": ATTENTION_OUT, "mlp_pre": MLP_IN}.get(part, MLP_OUT)
    linear = find_part(block, names)
    if linear is None:
        raise UserError(
            f"{site} of {model.id} cannot be folded: its linear map was not found. Use intervene."
        )
    if part == "mlp_post":
        return _Before(site, linear)
    return _Behind(site, linear, None if part == "mlp_pre" else _layer_scale(block, part))


def _head(model: VisionModel, site: str) -> _Target:
    behind = site == "embedding"
    projection = getattr(model.module, "visual_projection", None)
    if isinstance(projection, nn.Linear):
        return _Behind(site, projection) if behind else _Before(site, projection)
    matrix = getattr(model.tower.module, "proj", None)
    if isinstance(matrix, nn.Parameter) and matrix.ndim == 2:
        return _Projection(site, matrix, behind)
    raise UserError(
        f"{site} of {model.id} ({model.family}) cannot be folded: no linear projection comes "
        f"directly {'before' if behind else 'after'} it. Use intervene."
    )


def _embeddings(model: VisionModel, site: str) -> _Target:
    tower = model.tower
    blocks = {id(module) for block in tower.blocks for module in block.modules()}
    for name, module in tower.module.named_modules():
        outside = id(module) not in blocks and module is not tower.final_norm
        if outside and "Norm" in type(module).__name__ and not name.startswith(("head", "pooler")):
            raise UserError(
                f"{site} of {model.id} cannot be folded: a normalisation ({name}) comes between "
                "the embeddings of patches and positions and block 0. Leave the embeddings out: "
                "every_write(model, directions, embeddings=False)."
            )
    written = ("position_embedding", "pos_embed", "positional_embedding", "register", "reg_token")
    others = [
        weight
        for name, weight in tower.module.named_parameters()
        if any(word in name for word in (*written, *CLS)) and weight.shape[-1] == model.d_in(site)
    ]
    return _Embeddings(site, tower.patches, others)


def _layer_scale(block: nn.Module, part: str) -> nn.Parameter | None:
    """Return γ of LayerScale, if the block has it."""
    number = {"attn_out": "1", "mlp_out": "2"}[part]
    found = find_part(block, (f"layer_scale{number}", f"ls_{number}", f"ls{number}"))
    own = [] if found is None else list(found.parameters())
    return own[0] if own else None


def _weights(linear: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise UserError(
            f"{type(linear).__name__} has no weight matrix of its own to fold into; convert a "
            "parametrised model to plain weights first (to_plain)."
        )
    return weight, bias


def _no_bias(site: str) -> UserError:
    return UserError(
        f"{site}: this edit adds a constant, but the linear map there has no bias to hold it. "
        "Ablate to 0 instead of the mean."
    )


def _compare(model: VisionModel, folded: VisionModel, edits: Sequence[Edit], check: bool) -> None:
    """Run both models on noise and compare their embeddings."""
    noise = torch.randn((2, *model.input_shape), generator=torch.Generator().manual_seed(0))
    with intervene(model, edits, check=check):
        wanted = model.embed_images(noise).double()
    found = folded.embed_images(noise).double()
    error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    if not error <= TOLERANCE.get(model.dtype, 0.05):
        raise SparsightError(
            f"{model.id}: the embeddings of the folded model differ from those of the edited model "
            f"by {error:.1e} of their norm. Something else writes or reads there; use intervene."
        )
