"""Names of latents: what each stands for, how well, and the source of the name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from sparsight.errors import UserError
from sparsight.latents.index import LatentIndex

TRUTH_SOURCE = "truth (F1 on held-out images)"

COLUMNS = {
    "name": (pa.string(), "name"),
    "name_score": (pa.float64(), "score"),
    "name_threshold": (pa.float64(), "threshold"),
    "name_source": (pa.string(), "source"),
}
"""Columns of an index's table that hold names: their type, and the attribute of `LatentName`."""

_WORDING = {
    "symbol": "{}",
    "word": "the word “{}”",
    "object_colour": "{} object",
    "background": "{} background",
    "pattern": "{} pattern",
}


@dataclass(frozen=True)
class LatentName:
    """What a latent stands for.

    Attributes:
        name: the name, in words.
        score: how well the name fits; the source says on which scale.
        source: where the name comes from and what the score is, e.g. `truth (F1)`.
        threshold: the score that names from this source must exceed; None if there is none.
    """

    name: str
    score: float
    source: str
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UserError("A latent's name is empty.")
        if not math.isfinite(self.score):
            raise UserError(f"The score of the name {self.name!r} is {self.score}, not a number.")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UserError(
                f"The threshold of the name {self.name!r} is {self.threshold}, not a number."
            )


def set_names(index: LatentIndex, names: Mapping[int, LatentName]) -> LatentIndex:
    """Write names into `latents.parquet`; latents that are not in `names` keep theirs.

    If killed at any point, the index on disk stays intact, with the old names or the new.

    Raises:
        UserError: a latent does not exist.
    """
    for latent in names:
        if not 0 <= latent < index.n_latents:
            raise UserError(
                f"{index.folder}: no latent {latent} to name; it has latents 0 to "
                f"{index.n_latents - 1}."
            )
    index = index.latest()
    return index.with_table(with_names(index.table, names))


def names_of(index: LatentIndex) -> dict[int, LatentName]:
    """Return the names that an index gives its latents."""
    own = [column for column in ("latent", *COLUMNS) if column in index.table.column_names]
    rows = index.table.select(own).to_pylist()
    return {
        row["latent"]: LatentName(
            row["name"], row["name_score"], row["name_source"], row.get("name_threshold")
        )
        for row in rows
        if row["name"] is not None
    }


def with_names(
    table: pa.Table, names: Mapping[int, LatentName], *, forget: bool = False
) -> pa.Table:
    """Return the table of an index with these names instead of its own.

    Args:
        table: the table.
        names: names by latent.
        forget: drop the names of latents that are not in `names`.
    """
    for column, (kind, attribute) in COLUMNS.items():
        there = column in table.column_names  # version 1 has no thresholds
        values = table[column].to_pylist() if there and not forget else [None] * table.num_rows
        for latent, name in names.items():
            values[latent] = getattr(name, attribute)
        array = pa.array(values, kind)
        if there:
            table = table.set_column(table.column_names.index(column), column, array)
        else:
            table = table.append_column(column, array)
    return table


def name_from_truth(
    index: LatentIndex, metrics: Mapping[str, Any], min_score: float = 0.5
) -> LatentIndex:
    """Name each latent after the known attribute that it detects best.

    Args:
        index: index of the SAE that `metrics` are about.
        metrics: figures with `latent_names`, from `evaluate` on calibration images: latent →
            `attribute`, `f1`, ….
        min_score: lowest F1 on held-out images for a name. (`evaluate` keeps those of 0.5 or more.)

    Raises:
        UserError: the metrics lack a truth table, or are about another SAE.
    """
    about = index.manifest["sae"]
    names = names_from_truth(metrics, about["hash"], index.n_latents, index.folder, min_score)
    return set_names(index, names)


def names_from_truth(
    metrics: Mapping[str, Any],
    sae_hash: str,
    n_latents: int,
    folder: Path,
    min_score: float = 0.5,
) -> dict[int, LatentName]:
    """Return the names that `name_from_truth` gives the latents of an SAE.

    Args:
        metrics: see `name_from_truth`.
        sae_hash: fingerprint of the SAE.
        n_latents: its number of latents.
        folder: folder of the index, for messages.
        min_score: see `name_from_truth`.

    Raises:
        UserError: the metrics lack a truth table, or are about another SAE.
    """
    found = metrics.get("latent_names")
    if not isinstance(found, Mapping):
        raise UserError(
            f"{folder}: no names, because the metrics have no truth table. Evaluate on calibration "
            "images first; only their attributes are known."
        )
    if metrics.get("sae", sae_hash) != sae_hash:
        raise UserError(
            f"{folder}: the metrics are of another SAE. Evaluate this one with "
            "`sparsight evaluate`."
        )
    width = metrics.get("n_latents", n_latents)
    if width != n_latents:
        raise UserError(
            f"{folder}: has {n_latents} latents, but the metrics are of one with {width} latents."
        )
    return {
        int(latent): LatentName(wording(about["attribute"]), float(about["f1"]), TRUTH_SOURCE)
        for latent, about in found.items()
        if about["f1"] is not None and about["f1"] >= min_score
    }


def wording(attribute: str) -> str:
    """`symbol/anchor` → `anchor`; `object_colour/red` → `red object`."""
    kind, _, value = attribute.partition("/")
    return _WORDING.get(kind, "{}").format((value or kind).replace("_", " "))
