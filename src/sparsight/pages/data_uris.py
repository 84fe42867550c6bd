"""Images inside a page, as data URIs: a page loads nothing from anywhere."""

from __future__ import annotations

import base64
import io

from PIL import Image

SMALL = 96
"""Images up to this many pixels are shown unscaled, pixel by pixel."""


def is_crisp(picture: Image.Image) -> bool:
    """Return whether an image is so small that browsers should enlarge it pixel by pixel."""
    return max(picture.size) <= SMALL


def encode_picture(picture: Image.Image, side: int) -> str:
    """Return a WebP data URI: small images keep their pixels, others are scaled to `side`."""
    if is_crisp(picture):
        return _uri(picture, "WEBP", quality=92, method=4)
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _uri(picture, "WEBP", quality=78, method=4)


def png_uri(picture: Image.Image) -> str:
    """Return the data URI of a PNG, which keeps every pixel and its transparency."""
    return _uri(picture, "PNG", optimize=True)


def _uri(picture: Image.Image, kind: str, **options: int | bool) -> str:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
