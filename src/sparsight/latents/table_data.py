"""All latents of a run as data for the report's own table: found, sorted and clicked there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from sparsight.latents.choosing import understanding
from sparsight.latents.index import LatentIndex
from sparsight.redaction import without_folders

MOST_ROWS = 8192
"""Rows in the page; of more latents, the best understood are listed."""


def table_data(index: LatentIndex, shown: Sequence[int]) -> dict[str, Any]:
    """Return columns about the latents, best understood first.

    Args:
        index: of the SAE.
        shown: latents with a card, which are listed whatever their score.

    Returns:
        Columns of equal length: `latent`, `name`, `label` (a place in `labels`, or −1), `share`,
        `density`, `mean`, `max`, `images`; and the list `labels`, and the number `of` latents.
    """
    order = np.argsort(-understanding(index).score, kind="stable")
    listed = order[:MOST_ROWS]
    listed = np.concatenate([listed, np.setdiff1d(np.array(shown, dtype=np.int64), listed)])
    table = index.table.take(pa.array(listed))
    tops = [label and without_folders(label) for label in table["top_label"].to_pylist()]
    labels = sorted({label for label in tops if label is not None})
    place = {label: i for i, label in enumerate(labels)}

    def numbers(column: str) -> list[float | None]:
        return [None if x is None else _short(x) for x in table[column].to_pylist()]

    return {
        "of": index.n_latents,
        "labels": labels,
        "latent": listed.tolist(),
        "name": [name and without_folders(name) for name in table["name"].to_pylist()],
        "label": [-1 if label is None else place[label] for label in tops],
        "share": numbers("top_label_share"),
        "density": numbers("density"),
        "mean": numbers("mean_activation"),
        "max": numbers("max_activation"),
        "images": table["n_active_images"].to_pylist(),
    }


def as_json(value: Any) -> Markup:
    """Write JSON that can stand in a `<script>`: no character in it begins a tag or an entity."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&'":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _short(value: float) -> float:
    """Round to four digits, which a table shows at most."""
    return float(f"{value:.4g}")
