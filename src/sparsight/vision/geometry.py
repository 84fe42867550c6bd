"""What preprocessing leaves of an image, from its description alone, without loading a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

_PROCESSORS = (
    "CLIPImageProcessor",
    "ViTImageProcessor",
    "SiglipImageProcessor",
    "BitImageProcessor",
)
"""Processors of transformers that only resize, crop the centre and change colours."""

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def seen_picture(image: Image.Image, preprocessing: Mapping[str, Any]) -> Image.Image | None:
    """Return the part of an image that the model sees, at its size; None if that is unknown.

    Args:
        image: RGB.
        preprocessing: as in `VisionModel.preprocessing`.
    """
    if preprocessing.get("library") == "open_clip":
        return _as_open_clip(image, preprocessing)
    if preprocessing.get("processor") in _PROCESSORS:
        return _as_transformers(image, preprocessing)
    return None


def _as_open_clip(image: Image.Image, said: Mapping[str, Any]) -> Image.Image | None:
    size, mode = said.get("size"), said.get("resize_mode", "shortest")
    method = _FILTERS.get(said.get("interpolation", "bicubic"))
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2 or method is None or mode not in ("shortest", "squash"):
        return None
    height, width = sides
    if mode == "squash":
        return image.resize((width, height), method)
    return None if height != width else _middle(_shortest(image, height, method), height, width)


def _as_transformers(image: Image.Image, said: Mapping[str, Any]) -> Image.Image | None:
    size, cut = said.get("size") or {}, said.get("crop_size") or {}
    if said.get("do_pad") or not isinstance(size, Mapping) or not isinstance(cut, Mapping):
        return None
    if said.get("do_resize", True):
        method = Image.Resampling(int(said.get("resample", Image.Resampling.BICUBIC)))
        if {"height", "width"} <= size.keys():
            image = image.resize((size["width"], size["height"]), method)
        elif size.keys() == {"shortest_edge"}:
            image = _shortest(image, size["shortest_edge"], method)
        else:
            return None
    if said.get("do_center_crop"):
        if not {"height", "width"} <= cut.keys():
            return None
        image = _middle(image, cut["height"], cut["width"])
    height, width = said.get("input_shape", (0, 0, 0))[1:]
    return image if image.size == (width, height) else None


def _shortest(image: Image.Image, side: int, method: Image.Resampling) -> Image.Image:
    short, long = sorted(image.size)
    other = int(side * long / short)
    wide = image.width >= image.height
    return image.resize((other, side) if wide else (side, other), method)


def _middle(image: Image.Image, height: int, width: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
