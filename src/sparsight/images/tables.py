"""Labels and captions of a folder's pictures, from a CSV, text, JSON-lines or Parquet table."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.errors import UserError
from sparsight.images.columns import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    LABEL_COLUMNS,
    as_captions,
    as_label,
    find_column,
)

FOUND_BY_NAME = tuple(
    f"{stem}{suffix}"
    for stem in ("metadata", "labels", "captions")
    for suffix in (".csv", ".tsv", ".txt", ".jsonl", ".parquet")
    if (stem, suffix) != ("labels", ".txt")  # by custom a bare list of class names
)
"""Tables that are used when they lie in the folder of the pictures."""


@dataclass
class Annotation:
    """What the rows of a table say about one picture."""

    label: str | None = None
    captions: list[str] = field(default_factory=list)


@dataclass
class AnnotationTable:
    """Annotations by file name; several rows of one file bring several captions."""

    path: Path
    has_labels: bool
    by_file: dict[str, Annotation]

    def match(self, ids: Iterable[str]) -> tuple[dict[str, Annotation], tuple[str, ...]]:
        """Annotations by picture id, and notes about what did not fit.

        A row names a picture by its path relative to the folder or, where that fits nothing, by
        its bare file name if only one picture bears it.

        Raises:
            UserError: not one row names a picture.
        """
        by_path = {_normal(id_): id_ for id_ in ids}
        by_name: dict[str, str | None] = {}
        for path, id_ in by_path.items():
            name = PurePosixPath(path).name
            by_name[name] = None if name in by_name else id_
        matched: dict[str, Annotation] = {}
        unmatched: list[str] = []
        for file, annotation in self.by_file.items():
            found = by_path.get(file) or by_name.get(PurePosixPath(file).name)
            if found is None:
                unmatched.append(file)
            else:
                matched[found] = annotation
        if not matched and by_path:
            first = next(iter(self.by_file), None)
            says = f"its first row names {first!r}" if first else "it has no rows"
            raise UserError(
                f"{self.path}: names no picture of the folder ({says}, "
                f"the folder holds {next(iter(by_path))!r}). File names must be relative to the "
                "folder of the pictures."
            )
        notes = []
        if unmatched:
            notes.append(
                f"{self.path.name}: {len(unmatched):,} of {len(self.by_file):,} files named there "
                f"are not in the folder ({unmatched[0]!r}, …)."
            )
        if len(matched) < len(by_path):
            notes.append(
                f"{self.path.name}: says nothing of {len(by_path) - len(matched):,} images."
            )
        return matched, tuple(notes)


def read_table(path: Path) -> AnnotationTable:
    """Read a table of labels and captions.

    The picture stands in a column named as in `FILE_COLUMNS`, the rest as in `LABEL_COLUMNS` and
    `CAPTION_COLUMNS`. Text files may be parted by comma, tab, semicolon or `|`.

    Raises:
        UserError: the file is missing, cannot be read, or lacks the columns.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such table.")
    try:
        names, rows = _rows(path)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}).") from error
    file_column = find_column(names, FILE_COLUMNS)
    label_column = find_column(names, LABEL_COLUMNS)
    caption_column = find_column(names, CAPTION_COLUMNS)
    if file_column is None or (label_column is None and caption_column is None):
        raise UserError(
            f"{path}: has the columns {', '.join(names) or '(none)'}; expected a file column "
            f"({', '.join(FILE_COLUMNS)}) and a label ({LABEL_COLUMNS[0]}) or caption "
            f"({CAPTION_COLUMNS[0]}) column."
        )
    by_file: dict[str, Annotation] = {}
    for row in rows:
        if not isinstance(row.get(file_column), str):
            raise UserError(
                f"{path}: column {file_column!r} holds {row.get(file_column)!r}, no text."
            )
        annotation = by_file.setdefault(_normal(row[file_column]), Annotation())
        if label_column is not None and annotation.label is None:
            annotation.label = as_label(row.get(label_column))
        if caption_column is not None:
            annotation.captions += as_captions(row.get(caption_column))
    return AnnotationTable(path, label_column is not None, by_file)


def _rows(path: Path) -> tuple[list[str], Iterable[dict[str, Any]]]:
    if path.suffix.lower() == ".parquet":
        names = pq.read_schema(path).names
        known = {*FILE_COLUMNS, *LABEL_COLUMNS, *CAPTION_COLUMNS}
        wanted = [name for name in names if name.strip().lower() in known]
        return names, pq.read_table(path, columns=wanted).to_pylist()
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is not a JSON object")
        return list(dict.fromkeys(name for row in rows for name in row)), rows
    return _delimited(text)


def _delimited(text: str) -> tuple[list[str], Iterable[dict[str, Any]]]:
    lines = text.splitlines(keepends=True)
    header = lines[0] if lines else ""
    delimiter = max("\t,|;", key=header.count)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    names = [name.strip() for name in next(reader, [])]
    return names, _records(names, reader)


def _records(names: list[str], reader: Iterator[list[str]]) -> list[dict[str, Any]]:
    records = []
    for number, cells in enumerate(reader, start=2):
        if not cells:
            continue
        if len(cells) < len(names):
            raise ValueError(f"row {number} has {len(cells)} cells, the header {len(names)}")
        records.append(dict(zip(names, cells, strict=False)))
    return records


def _normal(file: str) -> str:
    """One spelling for one path: posix, no `./`, composed Unicode (macOS writes it decomposed)."""
    text = unicodedata.normalize("NFC", file.strip().replace("\\", "/"))
    return PurePosixPath(text).as_posix()
