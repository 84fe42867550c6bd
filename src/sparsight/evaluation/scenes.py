"""The ground truth of calibration scenes as matrices: which scene shows what, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional


@runtime_checkable
class TruthSource(Protocol):
    """Images with a ground truth, such as those of the calibration world."""

    def scene(self, index: int) -> Any:
        """Return the truth about an image: `.attributes()` gives the values of each attribute."""

    def render(self, index: int) -> Any:
        """Return the image with its masks: `.scene`, `.mask(attribute, value)`."""


@dataclass(frozen=True)
class SceneTruth:
    """What scenes show.

    Attributes:
        attributes: `symbol/anchor`, …, sorted by kind in the order of the world, then value.
        shows: which scene shows which attribute.
        scene: for each pair of a scene and an attribute that it shows, the scene.
        attribute: the attribute of each pair.
        masks: the patches that show it; no rows without a grid of patches.
    """

    attributes: tuple[str, ...]
    shows: Bool[Tensor, "scenes attributes"]
    scene: Int[Tensor, " shown"]
    attribute: Int[Tensor, " shown"]
    masks: Bool[Tensor, "masked patches"]

    @classmethod
    def of(
        cls, images: TruthSource, indices: Sequence[int], grid: tuple[int, int] | None
    ) -> SceneTruth:
        """Return the truth about the images at `indices`, in that order.

        Args:
            images: the source of the images.
            indices: places in the source.
            grid: rows and columns of the model's patches; masks of another size are scaled to it (a
                patch counts if half of it does). None leaves masks out.
        """
        found: list[tuple[int, str]] = []
        masks: list[np.ndarray] = []
        kinds: dict[str, set[str]] = {}
        for number, index in enumerate(indices):
            rendered = images.render(index) if grid else None
            scene = rendered.scene if rendered is not None else images.scene(index)
            for kind, values in scene.attributes().items():
                kinds.setdefault(kind, set()).update(values)
                for value in sorted(values):
                    found.append((number, f"{kind}/{value}"))
                    if rendered is not None:
                        masks.append(rendered.mask(kind, value))
        attributes = tuple(
            f"{kind}/{value}" for kind, values in kinds.items() for value in sorted(values)
        )
        column = {attribute: i for i, attribute in enumerate(attributes)}
        scene_of = torch.tensor([number for number, _ in found], dtype=torch.int64)
        attribute_of = torch.tensor([column[name] for _, name in found], dtype=torch.int64)
        shows = torch.zeros(len(indices), len(attributes), dtype=torch.bool)
        shows[scene_of, attribute_of] = True
        return cls(attributes, shows, scene_of, attribute_of, _to_grid(masks, grid))

    def kind(self, attribute: int) -> str:
        """Return the kind of an attribute, e.g. `symbol`."""
        return self.attributes[attribute].split("/")[0]


def _to_grid(
    masks: list[np.ndarray], grid: tuple[int, int] | None
) -> Bool[Tensor, "shown patches"]:
    if grid is None or not masks:
        return torch.zeros(0, 0, dtype=torch.bool)
    stacked = torch.from_numpy(np.stack(masks))
    if tuple(stacked.shape[1:]) != tuple(grid):
        resized = functional.interpolate(stacked[:, None].float(), size=grid, mode="area")
        stacked = resized[:, 0] >= 0.5
    return stacked.flatten(1)
