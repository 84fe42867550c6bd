"""Labels and captions of a folder's images, from a CSV, text, JSON-lines or Parquet table."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

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
    left_out,
)
from sparsight.text import decoded, lines, without_surrogates

FOUND_BY_NAME = tuple(
    f"{stem}{suffix}"
    for stem in ("metadata", "labels", "captions")
    for suffix in (".csv", ".tsv", ".txt", ".jsonl", ".parquet")
    if (stem, suffix) != ("labels", ".txt")  # by convention a bare list of class names
)
"""Names of tables that are read if they lie in the folder of the images, or below it."""


@dataclass
class Annotation:
    """What a table says about one image, in one row or several."""

    label: str | None = None
    captions: list[str] = field(default_factory=list)


@dataclass
class AnnotationTable:
    """Annotations by file name; several rows for one file give several captions."""

    path: Path
    has_labels: bool
    by_file: dict[str, Annotation]
    notes: tuple[str, ...] = ()

    def match(self, ids: Iterable[str]) -> tuple[dict[str, Annotation], tuple[str, ...]]:
        """Return annotations by image id, and notes about what did not fit.

        A row names an image by its path relative to the folder or, if that fits no image, by its
        bare file name, provided that only one image has it.

        Raises:
            UserError: no row names an image.
        """
        places = _Places(ids)
        matched: dict[str, Annotation] = {}
        unmatched: list[str] = []
        for file, annotation in self.by_file.items():
            found = places.find(file)
            if found is None:
                unmatched.append(file)
            elif found in matched:  # two spellings of one path
                first = matched[found]
                captions = first.captions + annotation.captions
                matched[found] = Annotation(first.label or annotation.label, captions)
            else:
                matched[found] = annotation
        if not matched and places.ids:
            first_row = next(iter(self.by_file), None)
            says = f"its first row names {first_row!r}" if first_row else "it has no rows"
            raise UserError(
                f"{self.path}: names no image of the folder ({says}, the folder holds "
                f"{next(iter(places.ids))!r}). File names must be relative to the folder of the "
                "images."
            )
        notes = list(self.notes)
        if unmatched:
            notes.append(
                f"{self.path.name}: {len(unmatched):,} of {len(self.by_file):,} files named there "
                f"are not in the folder ({unmatched[0]!r}, …)."
            )
        if len(matched) < len(places.ids):
            notes.append(
                f"{self.path.name}: says nothing about {len(places.ids) - len(matched):,} images."
            )
        return matched, tuple(notes)


class _Places:
    """Looks up image ids as tables spell them: exactly; in another Unicode form, with backslashes
    or surrounding blanks; or by the bare file name. What fits several images fits none."""

    def __init__(self, ids: Iterable[str]) -> None:
        self.ids = dict.fromkeys(ids)
        self._normal: dict[str, str | None] = {}
        self._names: dict[str, str | None] = {}
        for id_ in self.ids:
            path = _normal(id_)
            for found, key in ((self._normal, path), (self._names, PurePosixPath(path).name)):
                found[key] = None if key in found else id_

    def find(self, file: str) -> str | None:
        """Return the id of the image that a table calls `file`."""
        if file in self.ids:
            return file
        path = _normal(file)
        return self._normal.get(path) or self._names.get(PurePosixPath(path).name)


def read_table(path: Path) -> AnnotationTable:
    """Read a table of labels and captions.

    The file names are in a column named as in `FILE_COLUMNS`, the rest in columns named as in
    `LABEL_COLUMNS` and `CAPTION_COLUMNS`. Text files may be separated by comma, tab, semicolon or
    `|`.

    Raises:
        UserError: the file is missing, cannot be read, or lacks the columns; or a row does not have
            as many cells as the header.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such table.")
    try:
        names, rows = _rows(path)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
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
    for column in (file_column, label_column, caption_column):
        if column is not None and names.count(column) > 1:
            raise UserError(f"{path}: has several columns named {column!r}. Rename all but one.")
    by_file: dict[str, Annotation] = {}
    no_label: list[str] = []
    different: list[str] = []
    for row in rows:
        file = row.get(file_column)
        if not isinstance(file, str):
            raise UserError(f"{path}: column {file_column!r} holds {file!r}, not a text.")
        annotation = by_file.setdefault(file, Annotation())
        if label_column is not None:
            value = row.get(label_column)
            label = as_label(value)
            if label is None and value not in (None, ""):
                no_label.append(str(value))
            if None not in (label, annotation.label) and label != annotation.label:
                different.append(file)
            annotation.label = annotation.label or label
        if caption_column is not None:
            annotation.captions += as_captions(row.get(caption_column))
    read = ((label_column, LABEL_COLUMNS), (caption_column, CAPTION_COLUMNS))
    notes = [
        f"{path.name}: {note}" for note in left_out((n for n in names if n != file_column), *read)
    ]
    if no_label:
        notes.append(
            f"{path.name}: {len(no_label):,} labels such as {no_label[0]!r} are read as no label."
        )
    if different:
        notes.append(
            f"{path.name}: {len(different):,} rows give another label than an earlier row for the "
            f"same file ({different[0]!r}, …); the first label is taken."
        )
    return AnnotationTable(path, label_column is not None, by_file, tuple(notes))


def _rows(path: Path) -> tuple[list[str], Iterable[dict[str, Any]]]:
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path)
    data = path.read_bytes().decode("utf-8-sig")
    if path.suffix.lower() == ".jsonl":
        rows = [_record(number, line) for number, line in enumerate(_json_lines(data), start=1)]
        records = [row for row in rows if row is not None]
        return list(dict.fromkeys(name for row in records for name in row)), records
    return _delimited(data)


def _json_lines(text: str) -> list[str]:
    """Split at LF, CR LF or CR: JSON allows none of them inside a value."""
    return lines(text.replace("\r\n", "\n").replace("\r", "\n"))


def _parquet_rows(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    names = pq.read_schema(for_arrow(path)).names
    known = {*FILE_COLUMNS, *LABEL_COLUMNS, *CAPTION_COLUMNS}
    wanted = [name for name in names if name.strip().lower() in known]
    if len(set(wanted)) < len(wanted):  # the caller reports it; Arrow reads no such column
        return names, []
    table = pq.read_table(for_arrow(path), columns=wanted)
    columns = {name: cells_of(table.column(name)) for name in wanted}
    return names, [
        dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)
    ]


def for_arrow(path: Path) -> Path | BinaryIO:
    """Return what Arrow can read the file from: it accepts only names that are UTF-8."""
    return path if str(path) == without_surrogates(str(path)) else path.open("rb")


def cells_of(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    r"""Return the cells of an Arrow column; bytes that are not UTF-8 are written as `\xNN`."""
    try:
        cells: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        cells = [decoded_cell(cell) for cell in column]
    return cells


def decoded_cell(cell: pa.Scalar) -> Any:
    r"""Return a cell of an Arrow column; bytes that are not UTF-8 are written as `\xNN`."""
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        if pa.types.is_list(cell.type) or pa.types.is_large_list(cell.type):
            return cells_of(cell.values)
        if pa.types.is_struct(cell.type):
            return {name: decoded_cell(cell[name]) for name in cell}
        return decoded(cell.as_buffer().to_pybytes())


def _record(number: int, line: str) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is a JSON {type(row).__name__}, not an object")
    return row


def _delimited(text: str) -> tuple[list[str], Iterable[dict[str, Any]]]:
    # newline="", as Python's csv expects: a record ends at LF, CR LF or CR, outside quotes.
    file = io.StringIO(text, newline="")
    header = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max("\t,|;", key=header.count)
    reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
    names = [name.strip() for name in next(filter(None, reader), [])]
    return names, _records(names, delimiter, reader)


def _records(names: list[str], delimiter: str, reader: Iterator[list[str]]) -> list[dict[str, Any]]:
    records = []
    for number, cells in enumerate(reader, start=2):
        if not cells:
            continue
        if len(cells) < len(names):
            raise ValueError(
                f"row {number} has {len(cells)} cells, but the header has {len(names)}"
            )
        if any(cells[len(names) :]):
            raise ValueError(
                f"row {number} has {len(cells)} cells, the header {len(names)}: text that holds "
                f"{delimiter!r} must stand in double quotes"
            )
        records.append(dict(zip(names, cells, strict=False)))
    return records


def _normal(file: str) -> str:
    """Return one spelling per path: POSIX, no `./`, composed Unicode (macOS decomposes it)."""
    text = unicodedata.normalize("NFC", file.strip().replace("\\", "/"))
    return PurePosixPath(text).as_posix()
