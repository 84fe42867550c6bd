"""The names that tables give to pictures, labels and captions, and the forms their values take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_name", "image_path", "path")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "fine_label", "cls")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentence", "sentences", "description", "comment")


def find_column(names: Iterable[str], candidates: Sequence[str]) -> str | None:
    """The first of `candidates` among `names`, whatever its case."""
    by_lower = {name.strip().lower(): name for name in reversed(list(names))}
    return next((by_lower[name] for name in candidates if name in by_lower), None)


def as_label(value: Any, class_names: Sequence[str] | None = None) -> str | None:
    """A cell as a label: a number is looked up in `class_names`; empty cells and −1 are None."""
    if value is None or isinstance(value, list | dict):
        return None
    if isinstance(value, int) and class_names:
        return class_names[value] if 0 <= value < len(class_names) else None
    return str(value).strip() or None


def as_captions(value: Any) -> tuple[str, ...]:
    """A cell as captions: a text is one, a list of texts several, an empty cell none."""
    if isinstance(value, list | tuple):
        return tuple(caption for item in value for caption in as_captions(item))
    if isinstance(value, dict) and "raw" in value:  # COCO on the Hub: {"raw": "A man …"}
        return as_captions(value["raw"])
    if not isinstance(value, str) or not value.strip():
        return ()
    return (value.strip(),)
