"""Refuse images so thin that preprocessing would enlarge them to gigabytes."""

from __future__ import annotations

from typing import Any

from PIL import Image

from sparsight.images import ImageError

MAX_RESIZED_PIXELS = 2**25
"""Pixels that an image may have after its shorter side is resized to the model's input; a side of
224 allows 1 : 668. Preprocessing takes some 12 bytes per pixel, 400 MB."""


def shorter_side(size: Any) -> int | None:
    """Return the length to which the shorter side is resized; None if both sides are squashed.

    Args:
        size: the field of transformers' processors: `{"shortest_edge": 224}`.
    """
    side = size.get("shortest_edge") if hasattr(size, "get") else None
    return side if isinstance(side, int) else None


def check_resized(image: Image.Image, side: int | None) -> None:
    """Refuse an image that would be too large with its shorter side resized to `side`.

    Raises:
        ImageError: the image would be too large.
    """
    if side is None:
        return
    short, long = sorted(image.size)
    resized = round(side * side * long / max(1, short))
    if resized > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"{image.width} × {image.height} pixels are too thin: with the shorter side resized to "
            f"{side}, they become {resized:,} pixels, over the limit of {MAX_RESIZED_PIXELS:,}"
        )
