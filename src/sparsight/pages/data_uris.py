"""Images inside a page, as data URIs: a page loads nothing from anywhere."""

from __future__ import annotations

import base64
import io

from PIL import Image

SMALL = 96
"""Pictures up to this many pixels are shown as they are, pixel by pixel."""


def is_crisp(picture: Image.Image) -> bool:
    """Whether a picture is so small that it is to be enlarged pixel by pixel."""
    return max(picture.size) <= SMALL


def encode_picture(picture: Image.Image, side: int) -> str:
    """Data URI: small pictures at their own pixels, others scaled to `side`; WebP."""
    if is_crisp(picture):
        return _uri(picture, "WEBP", quality=92, method=4)
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _uri(picture, "WEBP", quality=78, method=4)


def png_uri(picture: Image.Image) -> str:
    """Data URI of a PNG, which keeps every pixel and its transparency."""
    return _uri(picture, "PNG", optimize=True)


def _uri(picture: Image.Image, kind: str, **options: int | bool) -> str:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
