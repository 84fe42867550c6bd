from __future__ import annotations

import re

import numpy as np
import torch

from sparsight.latents.outlines import outline, view_box


def area(path: str) -> float:
    """The area inside a path by its corners and ends of curves, holes subtracted (shoelace)."""
    total = 0.0
    for loop in path.strip("Z").split("Z"):
        numbers = [int(x) for x in re.findall(r"\d+", re.sub(r"Q(\d+) (\d+) ", "L", loop))]
        x, y = np.array(numbers[0::2]), np.array(numbers[1::2])
        total += float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
    return total


def test_an_outline_encloses_the_active_region() -> None:
    grid = torch.zeros(16, 16)
    grid[4:10, 3:12] = 2.0
    path = outline(grid)
    assert path.count("M") == path.count("Z") == 1
    assert view_box(16, 16) == "0 0 128 128"
    numbers = np.array([int(x) for x in re.findall(r"\d+", path)]).reshape(-1, 2)
    assert numbers.min(axis=0).tolist() == [24, 32] and numbers.max(axis=0).tolist() == [96, 80]
    assert 0.93 * 54 * 64 < area(path) <= 54 * 64


def test_a_hole_and_two_regions_have_outlines_of_their_own() -> None:
    ring = torch.zeros(16, 16)
    ring[2:13, 2:13] = 1.0
    ring[5:10, 5:10] = 0.0
    path = outline(ring)
    assert path.count("M") == 2
    assert 0.9 * 96 * 64 < area(path) < 1.05 * 96 * 64
    two = torch.zeros(16, 16)
    two[2, 2], two[12, 13] = 1.0, 0.9
    assert outline(two).count("M") == 2
    touching = torch.zeros(2, 2)
    touching[0, 0] = touching[1, 1] = 1.0
    assert outline(touching).count("Z") >= 1


def test_a_latent_that_is_not_active_has_no_outline() -> None:
    assert outline(torch.zeros(4, 4)) == ""
    assert outline(-torch.ones(4, 4)) == ""
    everywhere = outline(torch.ones(4, 4))
    assert everywhere.count("M") == 1 and area(everywhere) > 0.97 * 32 * 32
