"""Geometric parametrisation: each row of an MLP as a length and a direction, trained separately.

W = r · θ / ‖θ‖ in every output row of both linear layers of every MLP, in both towers. It is
weight normalisation (Salimans & Kingma 2016, arXiv:1602.07868, eq. 2) of the rows that zer0int
chose for CLIP (CLIP-fine-tune, "GmP"), with the names of its checkpoints: `.r` and `.theta`
instead of `.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.errors import UserError
from sparsight.vision.layouts import gmp_parts, gmp_weight

LAYERS = ("c_fc", "c_proj", "fc1", "fc2")
"""An MLP's two linear layers: in OpenAI's layout and open_clip, and in transformers."""

M = TypeVar("M", bound=nn.Module)


class GeometricLinear(nn.Linear):
    """A linear layer whose weight is computed from `r` and `theta` in every pass.

    `parametrize` converts an existing layer in place, so that hooks on it stay.

    With G = dL/dW and u = θ/‖θ‖, row by row: dL/dr = ⟨G, u⟩, and
    dL/dθ = r/‖θ‖ · (G − ⟨G, u⟩ u) (Salimans & Kingma 2016, eq. 3).

    Attributes:
        r: length of every row, `[out, 1]`.
        theta: direction of every row, of any length, `[out, in]`.
    """

    r: nn.Parameter
    theta: nn.Parameter

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # type: ignore[override]
        """W = r · θ / ‖θ‖; norms are computed in float32 or wider."""
        theta = self.theta
        wide = torch.promote_types(theta.dtype, torch.float32)
        norm = torch.linalg.vector_norm(theta, dim=1, keepdim=True, dtype=wide)
        unit = theta / norm.clamp(min=torch.finfo(wide).tiny)
        weight: Tensor = self.r * unit
        return weight.to(theta.dtype)


def parametrize(module: M) -> M:
    """Split the MLPs of both towers into lengths and directions, in place.

    The parts are computed in float64 and kept in the dtype of the weights; apart from rounding, the
    model's output stays the same. Layers that are already split stay as they are.

    Args:
        module: `transformers.CLIPModel`, a CLIP of open_clip, or any other with such MLPs.

    Returns:
        `module`.

    Raises:
        UserError: it has no such MLPs, or their layers are of a special kind (quantised, …).
    """
    layers = dict(_mlp_layers(module))
    if not layers:
        raise UserError(
            f"{type(module).__name__} has no MLPs with layers called {' and '.join(LAYERS[:2])}, "
            f"or {' and '.join(LAYERS[2:])}."
        )
    odd = [name for name, layer in layers.items() if type(layer) not in _KINDS]
    if odd:
        raise UserError(
            f"{odd[0]} is of type {type(layers[odd[0]]).__name__}; only plain linear layers can be "
            "split into length and direction."
        )
    for layer in layers.values():
        if type(layer) is nn.Linear:
            _split(layer)
    return module


def to_plain(module: M) -> M:
    """Merge what `parametrize` split, in place: the weight is computed in float64.

    Returns:
        `module`.
    """
    for layer in module.modules():
        if isinstance(layer, GeometricLinear):
            _merge(layer, layer.r, layer.theta)
    return module


def is_parametrized(module: nn.Module) -> bool:
    """Return whether any layer is split."""
    return any(isinstance(layer, GeometricLinear) for layer in module.modules())


_KINDS = (nn.Linear, GeometricLinear)


def _mlp_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in module.named_modules():
        holder, _, last = name.rpartition(".")
        if last in LAYERS and holder.rpartition(".")[2] == "mlp":
            yield name, layer


def _split(layer: nn.Linear) -> None:
    weight = layer.weight
    r, theta = gmp_parts(weight)
    del layer.weight
    layer.__class__ = GeometricLinear
    layer.register_parameter("r", nn.Parameter(r, weight.requires_grad))
    layer.register_parameter("theta", nn.Parameter(theta, weight.requires_grad))


def _merge(layer: nn.Linear, r: Tensor, theta: Tensor) -> None:
    del layer.r, layer.theta
    layer.__class__ = nn.Linear
    weight = gmp_weight(r, theta).to(theta.dtype)
    layer.register_parameter("weight", nn.Parameter(weight, theta.requires_grad))
