"""Tables of latents and images: on the terminal, and as CSV and JSON files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from sparsight.cli.printing import WIDTH, plain_table
from sparsight.errors import UserError
from sparsight.figures import percent, rounded
from sparsight.files import json_bytes, write_bytes, write_text
from sparsight.latents.index_files import FILES, MANIFEST

COLUMNS = (
    "latent", "name", "name_score", "density", "n_active_images", "max_activation", "moran",
    "top_label", "top_label_share",
)  # fmt: skip
"""Columns of an index that a list of latents shows."""

_SHARES = {"density", "cls_share", "top_label_share", "relative", "share", "base_share"}
_NUMBERS = {"latent", "image", "row", "column"}
"""Columns that name something by its number."""
_LONGEST = 48
"""Characters of a text that a table shows."""


def console() -> Console:
    """Return a console that takes text as it is; a pipe is as wide as a wide terminal."""
    found = Console(markup=False, emoji=False, highlight=False)
    if found.is_terminal:
        return found
    return Console(width=WIDTH, markup=False, emoji=False, highlight=False)


def print_rows(rows: pa.Table, columns: Sequence[str]) -> None:
    """Print a table under the names of its columns, as `--where` and `--sort` know them.

    Args:
        rows: the rows.
        columns: columns to print; those that are absent, hold lists or are empty are left out.
    """
    shown = [
        name
        for name in dict.fromkeys(columns)
        if name in rows.column_names
        and not pa.types.is_nested(rows[name].type)
        and rows[name].null_count < rows.num_rows
    ]
    table = plain_table()
    for name in shown:
        is_text = pa.types.is_string(rows[name].type)
        table.add_column(
            name, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold"
        )
    for row in rows.select(shown).to_pylist():
        table.add_row(*(cell(name, row[name]) for name in shown))
    console().print(table)


def cell(name: str, value: Any) -> str:
    """Write a value of a column for people."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str):
        text = " ".join(value.split())
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    if name in _SHARES:
        return percent(value)
    if isinstance(value, int):
        return str(value) if name in _NUMBERS else f"{value:,}"
    return rounded(value)


def sorted_by(table: pa.Table, column: str | None) -> pa.Table:
    """Return a table ordered by a column; rows without a value come last.

    Args:
        table: the table.
        column: its name, after a minus if the largest value comes first; None keeps the order.

    Raises:
        UserError: the table lacks the column, or it holds lists.
    """
    if column is None:
        return table
    order: Literal["ascending", "descending"] = (
        "descending" if column.startswith("-") else "ascending"
    )
    name = column.removeprefix("-")
    if name not in table.column_names:
        raise UserError(
            f"--sort {column}: no column {name}. Columns: {', '.join(table.column_names)}."
        )
    if pa.types.is_nested(table[name].type):
        raise UserError(f"--sort {column}: {name} holds one list per latent, which has no order.")
    keys = [(name, order)] if name == "latent" else [(name, order), ("latent", "ascending")]
    return table.take(pc.sort_indices(table, keys))


def save_rows(rows: pa.Table, csv_file: Path | None, json_file: Path | None) -> None:
    """Write all rows and columns of a table; in CSV, lists are JSON and missing values are empty.

    Raises:
        UserError: a path cannot be written to, or is a file of an index.
        SparsightError: the disk is full or the folder cannot be written.
    """
    if csv_file is None and json_file is None:
        return
    for file in (csv_file, json_file):
        if file is not None:
            _refuse_file_of_index(file)
    found: list[dict[str, Any]] = rows.to_pylist()
    if csv_file is not None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(rows.column_names)
        writer.writerows([_csv_cell(value) for value in row.values()] for row in found)
        write_text(csv_file, text.getvalue())
    if json_file is not None:
        write_bytes(json_file, json_bytes([_without_nan(row) for row in found]))


def _refuse_file_of_index(file: Path) -> None:
    """Raise a `UserError` if writing a file would damage an index, a store or codes."""
    if file.name in FILES and (file.parent / MANIFEST).exists():
        raise UserError(
            f"{file}: belongs to an index, activations or codes, which this would damage. Choose "
            "another name."
        )


def _csv_cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def _without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def with_sort_joined(arguments: Sequence[str]) -> list[str]:
    """Join `--sort -COLUMN` by an equals sign, as the minus would make it an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--sort" and argument.startswith("-") and argument[1:2] != "-":
            joined[-1] = f"--sort={argument}"
        else:
            joined.append(argument)
    return joined
