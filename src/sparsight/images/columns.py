"""The column names under which tables keep images, labels and captions, and how to read a cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sparsight.text import decoded, without_surrogates

IMAGE_COLUMNS = (
    "image", "img", "picture", "jpg", "jpeg", "png", "webp", "avif", "image_bytes", "bytes",
)  # fmt: skip
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_name", "image_path", "path")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "fine_label", "cls")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentence", "sentences", "description", "comment")

NO_LABEL = frozenset({"", "none", "null", "nan", "n/a", "<na>", "-1", "-1.0"})
"""Values that mean "no label" in a label column, in lower case."""


def find_column(names: Iterable[str], candidates: Sequence[str]) -> str | None:
    """Return the first of `candidates` that is among `names`, in upper or lower case."""
    by_lower = {name.strip().lower(): name for name in reversed(list(names))}
    return next((by_lower[name] for name in candidates if name in by_lower), None)


def left_out(names: Iterable[str], *chosen: tuple[str | None, Sequence[str]]) -> list[str]:
    """Return a note that lists the suitable columns that are not read, or nothing if there are
    none.

    Args:
        names: all columns.
        chosen: for labels and for captions, the column that is read and the names that would do.
    """
    taken = {column for column, _ in chosen}
    others = [
        name
        for name in names
        if name not in taken and any(name.strip().lower() in like for _, like in chosen)
    ]
    if not others:
        return []
    read = [column for column, _ in chosen if column is not None]
    return [
        f"Columns of labels and captions that are read: {', '.join(read)}; not read: "
        f"{', '.join(others)}."
    ]


def as_label(value: Any, class_names: Sequence[str] | None = None) -> str | None:
    """Read a cell as a label; None if it says that there is none (`NO_LABEL`, or not a text).

    An integer is looked up in `class_names`. So is 3.0, because a column of integers with gaps
    becomes a column of floats.
    """
    if isinstance(value, bytes):
        value = decoded(value)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    if value is None or isinstance(value, list | tuple | dict):
        return None
    if isinstance(value, int) and class_names:
        return class_names[value] if 0 <= value < len(class_names) else None
    text = without_surrogates(str(value).strip())
    return None if text.lower() in NO_LABEL else text


def as_captions(value: Any) -> tuple[str, ...]:
    """Read a cell as captions: a text is one, a list of texts several, an empty cell none."""
    if isinstance(value, list | tuple):
        return tuple(caption for item in value for caption in as_captions(item))
    if isinstance(value, dict) and "raw" in value:  # COCO on the Hub: {"raw": "A man …"}
        return as_captions(value["raw"])
    if isinstance(value, bytes):
        value = decoded(value)
    if not isinstance(value, str) or not value.strip():
        return ()
    return (value.strip(),)
