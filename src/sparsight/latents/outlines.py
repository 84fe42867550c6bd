"""The region of an image in which a latent is active, as an outline: the image stays bright."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from torch import Tensor

SHARE = 0.5
"""The outline encloses the region of at least this share of the strongest activation."""

FINE = 2
"""Steps of the outline per patch."""

_Point = tuple[int, int]


def outline(
    grid: Float[Tensor, "rows columns"] | npt.NDArray[np.float32], share: float = SHARE
) -> str:
    """Return an SVG path around the region of an image in which a latent is most active.

    The activations are smoothed by half a patch, so that a lone patch beside a large region does
    not clutter the image. Units: a patch is `4 * FINE` wide; see `view_box`.

    Args:
        grid: activations, row 0 at the top.
        share: the smallest activation inside, relative to the maximum.

    Returns:
        The path; empty if the latent is active on no patch.
    """
    values = np.asarray(grid, dtype=np.float32)
    if not values.max(initial=0) > 0:
        return ""
    smooth = _finer(_finer(_smoothed(values), 0), 1)
    return "".join(map(_rounded, _loops(smooth >= share * smooth.max())))


def view_box(rows: int, columns: int) -> str:
    """Return the `viewBox` of outlines on a grid of patches."""
    return f"0 0 {4 * FINE * columns} {4 * FINE * rows}"


def _smoothed(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Blur with (1 4 1) / 6 along rows and columns."""
    for axis in (0, 1):
        padded = np.pad(values, [(1, 1) if i == axis else (0, 0) for i in (0, 1)], mode="edge")
        n = values.shape[axis]
        parts = [np.take(padded, np.arange(i, i + n), axis) for i in range(3)]
        values = ((parts[0] + 4 * parts[1] + parts[2]) / 6).astype(np.float32)
    return values


def _finer(values: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    """Interpolate linearly to `FINE` values per patch."""
    n = values.shape[axis]
    at = (np.arange(FINE * n) + 0.5) / FINE - 0.5
    low = np.clip(np.floor(at).astype(int), 0, n - 1)
    weight = np.clip(at - low, 0, 1).astype(np.float32)
    weight = weight[:, None] if axis == 0 else weight
    below, above = (np.take(values, np.minimum(low + i, n - 1), axis) for i in (0, 1))
    finer: npt.NDArray[np.float32] = below * (1 - weight) + above * weight
    return finer


def _loops(mask: npt.NDArray[np.bool_]) -> list[list[_Point]]:
    """Return the borders of the cells of a mask as closed loops of points; inside is right."""
    padded = np.pad(mask, 1)
    after: dict[_Point, list[_Point]] = {}
    for y, x in np.argwhere(mask).tolist():
        corners = [(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)]
        neighbours = [(y, x + 1), (y + 1, x + 2), (y + 2, x + 1), (y + 1, x)]
        for i, place in enumerate(neighbours):
            if not padded[place]:
                after.setdefault(corners[i], []).append(corners[(i + 1) % 4])
    loops = []
    while after:
        loop = [next(iter(after))]
        while True:
            here = loop[-1]
            nexts = after[here]
            # Where two cells touch at a corner, turn right: each keeps an outline of its own.
            following = max(nexts, key=lambda to: _right(loop[-2:], to)) if loop[1:] else nexts[0]
            nexts.remove(following)
            if not nexts:
                del after[here]
            if following == loop[0]:
                break
            loop.append(following)
        loops.append(loop)
    return loops


def _right(last: list[_Point], to: _Point) -> int:
    """Return 1 if going on from the last two points to `to` is a right turn, −1 if a left one."""
    (x0, y0), (x1, y1) = last
    return (x1 - x0) * (to[1] - y1) - (y1 - y0) * (to[0] - x1)


def _rounded(loop: list[_Point]) -> str:
    """Write a loop as a path, in quarters of its steps: stairs become slopes, corners curves."""
    points = [
        (x0 + x1, y0 + y1) for (x0, y0), (x1, y1) in zip(loop, [*loop[1:], loop[0]], strict=True)
    ]
    parts: list[str] = []
    end: _Point | None = None
    for i, (x, y) in enumerate(points):
        (x0, y0), (x1, y1) = points[i - 1], points[(i + 1) % len(points)]
        if x0 + x1 == 2 * x and y0 + y1 == 2 * y:
            continue
        start = (x + x0, y + y0)
        if end is None:
            parts.append(f"M{start[0]} {start[1]}")
        elif start != end:
            parts.append(f"l{start[0] - end[0]} {start[1] - end[1]}")
        end = (x + x1, y + y1)
        parts.append(f"q{x - x0} {y - y0} {x1 - x0} {y1 - y0}")
    return "".join(parts).replace(" -", "-") + "z"
