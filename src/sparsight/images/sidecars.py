"""Small files beside an image describe it: `.txt`, `.caption`, `.cls`, `.label`, `.json`."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from sparsight.images.columns import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    as_captions,
    as_label,
    find_column,
)
from sparsight.text import decoded, lines

SIDECARS = ("cls", "label", "txt", "caption", "json")
MAX_SIDECAR_BYTES = 2**20
"""A larger sidecar is ignored, with a warning."""

_BOX = re.compile(r"\d+(\s+[0-9.eE+-]+){4,}")


def too_large(id_: str, ending: str, size: int) -> bool:
    """Return whether a sidecar exceeds the limit, and warn if it does."""
    if size <= MAX_SIDECAR_BYTES:
        return False
    warnings.warn(
        f"{id_}: its .{ending} of {size:,} bytes is over the limit of {MAX_SIDECAR_BYTES:,}; "
        "it is ignored",
        stacklevel=4,
    )
    return True


def read_sidecars(id_: str, found: Mapping[str, bytes]) -> tuple[str | None, tuple[str, ...]]:
    """Read label and captions; text files take precedence over the JSON.

    Args:
        id_: the image's id, for warnings.
        found: the contents of the sidecars, by file ending.
    """
    texts = {ending: decoded(data) for ending, data in found.items()}
    described = _json_object(id_, texts.get("json"))
    label_key = find_column(described, LABEL_COLUMNS)
    caption_key = find_column(described, CAPTION_COLUMNS)
    label = as_label(texts.get("cls", texts.get("label")))
    captions = as_captions(texts.get("txt", texts.get("caption")))
    return (
        label or as_label(described.get(label_key or "")),
        captions or as_captions(described.get(caption_key or "")),
    )


def is_caption(text: str) -> bool:
    """Return whether a text is a caption, not boxes (a class and four numbers per line)."""
    return not all(_BOX.fullmatch(line.strip()) for line in lines(text))


def _json_object(id_: str, text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError) as error:
        value = error
    if not isinstance(value, dict):
        warnings.warn(f"{id_}: its .json is not a JSON object; it is ignored", stacklevel=5)
        return {}
    return value
