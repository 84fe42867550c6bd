from __future__ import annotations

import re

import numpy as np
import torch

from sparsight.latents.outlines import outline, view_box


def corners(path: str) -> list[np.ndarray]:
    """The loops of a path: the control points and ends of its curves, in absolute units."""
    loops = []
    for loop in path.strip("z").split("z"):
        points = []
        for kind, text in re.findall(r"([Mlq])([-\d ]+)", loop):
            numbers = [int(x) for x in re.findall(r"-?\d+", text)]
            here = points[-1] if points else (0, 0)
            for x, y in zip(numbers[0::2], numbers[1::2], strict=True):
                points.append((here[0] + x, here[1] + y) if kind != "M" else (x, y))
        loops.append(np.array(points))
    return loops


def area(path: str) -> float:
    """The area inside a path, a little enlarged at its corners; holes count as negative."""
    return float(
        sum(
            (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2
            for x, y in (loop.T for loop in corners(path))
        )
    )


def test_an_outline_encloses_the_active_region() -> None:
    grid = torch.zeros(16, 16)
    grid[4:10, 3:12] = 2.0
    path = outline(grid)
    assert path.count("M") == path.count("z") == 1
    assert view_box(16, 16) == "0 0 128 128"
    (numbers,) = corners(path)
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
    assert outline(touching).count("z") >= 1


def test_a_latent_that_is_not_active_has_no_outline() -> None:
    assert outline(torch.zeros(4, 4)) == ""
    assert outline(-torch.ones(4, 4)) == ""
    everywhere = outline(torch.ones(4, 4))
    assert everywhere.count("M") == 1 and area(everywhere) > 0.97 * 32 * 32
