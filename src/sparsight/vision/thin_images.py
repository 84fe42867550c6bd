"""Images so thin that preprocessing would blow them up to gigabytes."""

from __future__ import annotations

from typing import Any

from PIL import Image

from sparsight.images import ImageError

MAX_RESIZED_PIXELS = 2**25
"""Pixels that an image may have once its shorter side is resized to what the model takes; 224 of
them allow 1 : 668. Preprocessing takes some 12 bytes for each, 400 MB."""


def shorter_side(size: Any) -> int | None:
    """To what a preprocessing resizes the shorter side; None where it squashes both sides.

    Args:
        size: as transformers' processors have it: `{"shortest_edge": 224}`.
    """
    side = size.get("shortest_edge") if hasattr(size, "get") else None
    return side if isinstance(side, int) else None


def check_resized(image: Image.Image, side: int | None) -> None:
    """Refuse an image that would be too large with its shorter side resized to `side`.

    Raises:
        ImageError: it would.
    """
    if side is None:
        return
    short, long = sorted(image.size)
    resized = round(side * side * long / max(1, short))
    if resized > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"{image.width} × {image.height} pixels are too thin: with the shorter side resized to "
            f"{side}, {resized:,} pixels are over the limit of {MAX_RESIZED_PIXELS:,}"
        )
