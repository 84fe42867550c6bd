"""What preprocessing leaves of a picture, from its description alone: no model need be loaded."""

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
"""Processors of transformers that resize, cut the middle out and change colours, nothing else."""

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def seen_picture(picture: Image.Image, preprocessing: Mapping[str, Any]) -> Image.Image | None:
    """The part of a picture that the model sees, at its size; None where that is not known.

    Args:
        picture: RGB.
        preprocessing: as `VisionModel.preprocessing` describes it.
    """
    if preprocessing.get("library") == "open_clip":
        return _as_open_clip(picture, preprocessing)
    if preprocessing.get("processor") in _PROCESSORS:
        return _as_transformers(picture, preprocessing)
    return None


def _as_open_clip(picture: Image.Image, said: Mapping[str, Any]) -> Image.Image | None:
    size, mode = said.get("size"), said.get("resize_mode", "shortest")
    method = _FILTERS.get(said.get("interpolation", "bicubic"))
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2 or method is None or mode not in ("shortest", "squash"):
        return None
    height, width = sides
    if mode == "squash":
        return picture.resize((width, height), method)
    return None if height != width else _middle(_shortest(picture, height, method), height, width)


def _as_transformers(picture: Image.Image, said: Mapping[str, Any]) -> Image.Image | None:
    size, cut = said.get("size") or {}, said.get("crop_size") or {}
    if said.get("do_pad") or not isinstance(size, Mapping) or not isinstance(cut, Mapping):
        return None
    if said.get("do_resize", True):
        method = Image.Resampling(int(said.get("resample", Image.Resampling.BICUBIC)))
        if {"height", "width"} <= size.keys():
            picture = picture.resize((size["width"], size["height"]), method)
        elif size.keys() == {"shortest_edge"}:
            picture = _shortest(picture, size["shortest_edge"], method)
        else:
            return None
    if said.get("do_center_crop"):
        if not {"height", "width"} <= cut.keys():
            return None
        picture = _middle(picture, cut["height"], cut["width"])
    height, width = said.get("input_shape", (0, 0, 0))[1:]
    return picture if picture.size == (width, height) else None


def _shortest(picture: Image.Image, side: int, method: Image.Resampling) -> Image.Image:
    short, long = sorted(picture.size)
    other = int(side * long / short)
    wide = picture.width >= picture.height
    return picture.resize((other, side) if wide else (side, other), method)


def _middle(picture: Image.Image, height: int, width: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
