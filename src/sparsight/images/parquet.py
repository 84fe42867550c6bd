"""Images in Parquet files, as the Hugging Face Hub writes them or as plain bytes."""

from __future__ import annotations

import hashlib
import json
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sparsight.errors import UserError
from sparsight.images.columns import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    as_captions,
    as_label,
    find_column,
    left_out,
)
from sparsight.images.decoding import ImageError, decode_image
from sparsight.images.source import ImageInfo, ImageSource
from sparsight.images.tables import cells_of, decoded_cell, for_arrow
from sparsight.text import without_surrogates

PART_BYTES = 32 * 2**20
"""Images of a row group are read in parts of about this many bytes."""

CACHED_PARTS = 2
CACHED_TEXT_GROUPS = 16

# By default Arrow reads the whole column of a row group before it returns the first row.
_STREAMED = {"pre_buffer": False, "buffer_size": 2**20}


@dataclass(frozen=True)
class _Part:
    """Consecutive images of a row group, from row `start` of the group on."""

    group: int
    start: int
    cells: pa.Array

    def __contains__(self, place: tuple[int, int]) -> bool:
        group, row = place
        return group == self.group and 0 <= row - self.start < len(self.cells)


class ParquetImages(ImageSource):
    """One Parquet file, or all Parquet files below a folder in the order of their paths.

    The images are in a column named as in `columns.IMAGE_COLUMNS`, as bytes or as a struct with a
    field `bytes`. Numbers in the label column become names if the file's schema has them
    (`ClassLabel`). The id is `FILE/ROW`. Images are read in parts of 32 MB or one row group,
    whichever is less, and the last two parts are kept, so reading in order costs one pass over the
    file. Out of order, an image may cost reading its row group up to its place. Memory depends on
    the parts and of the file's pages, not of its row groups.

    Several files are one data set if they have the same columns, in any order, of compatible types
    (a column that is empty in a file is compatible with any). An unreadable file among several
    counts as one failed image; hidden files are left out.

    Raises:
        UserError: the file does not exist, or there are no Parquet files in the folder, no rows, no
            column of images, or files with incompatible columns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.spec = without_surrogates(f"parquet:{self.path}")
        hidden = 0
        if self.path.is_dir():
            self._root, found = self.path, sorted(self.path.rglob("*.parquet"))
            self._files = [file for file in found if not _is_hidden(file, self.path)]
            hidden = len(found) - len(self._files)
        else:
            self._root, self._files = self.path.parent, [self.path]
        if not self._files:
            raise UserError(f"{path}: holds no .parquet files.")
        self._group_file: list[int] = []
        self._group_number: list[int] = []
        self._group_row: list[int] = []  # of the group's first row, within its file
        self._unread: dict[int, str] = {}  # why a group that stands for a whole file cannot be read
        self._class_names: dict[int, list[str] | None] = {}
        sizes: list[int] = []
        schemas: dict[int, pa.Schema] = {}
        for number, file in enumerate(self._files):
            try:
                metadata, schemas[number] = _metadata(file)
            except UserError as error:
                if len(self._files) == 1:
                    raise
                self._unread[len(sizes)] = str(error)
                self._add_group(number, 0, 0)
                sizes.append(1)
                continue
            row = 0
            for group in range(metadata.num_row_groups):
                self._add_group(number, group, row)
                sizes.append(metadata.row_group(group).num_rows)
                row += sizes[-1]
        self._starts = list(accumulate(sizes, initial=0))
        if not schemas:
            raise UserError(f"{path}: none of its files can be read. {self._unread[0]}")
        if len(self) == len(self._unread):
            raise UserError(f"{path}: holds no rows.")
        columns = _common_columns({self._files[number]: each for number, each in schemas.items()})
        self._image_column = _image_column(self._files[0], columns)
        rest = [name for name in columns if name != self._image_column]
        self._label_column = find_column(rest, LABEL_COLUMNS)
        self._caption_column = find_column(rest, CAPTION_COLUMNS)
        for number, schema in schemas.items():
            for name in (self._image_column, self._label_column, self._caption_column):
                if schema.names.count(name) > 1:
                    raise UserError(
                        f"{self._files[number]}: has several columns named {name!r}. Rename all "
                        "but one."
                    )
            self._class_names[number] = _class_names(schema, self._label_column)
        self.notes = self._notes(columns, hidden)
        self._warned = False
        self._open: dict[int, pq.ParquetFile] = {}
        self._parts: list[_Part] = []
        self._ahead: tuple[int, int, Iterator[pa.RecordBatch]] | None = None
        self._lost: dict[int, tuple[int, str]] = {}  # first row that cannot be read, and why
        self._texts: OrderedDict[int, pa.Table] = OrderedDict()

    def _add_group(self, file: int, number: int, row: int) -> None:
        self._group_file.append(file)
        self._group_number.append(number)
        self._group_row.append(row)

    def _notes(self, columns: Mapping[str, pa.DataType], hidden: int) -> tuple[str, ...]:
        notes = left_out(
            (name for name in columns if name != self._image_column),
            (self._label_column, LABEL_COLUMNS),
            (self._caption_column, CAPTION_COLUMNS),
        )
        if hidden:
            notes.append(f"{hidden:,} hidden .parquet files are left out.")
        if self._unread:
            notes.append(
                f"{len(self._unread):,} of {len(self._files):,} files cannot be read; each counts "
                f"as one failed image ({next(iter(self._unread.values()))})"
            )
        if self._label_column and _kind(columns[self._label_column]) in ("list", "struct"):
            notes.append(f"The column {self._label_column!r} holds lists; no labels are read.")
        if len(set(map(str, self._class_names.values()))) > 1:
            notes.append("The files name their classes differently; each file uses its own names.")
        return tuple(map(without_surrogates, notes))

    def __len__(self) -> int:
        return self._starts[-1]

    def info(self, index: int) -> ImageInfo:
        """See `ImageSource.info`."""
        group, row = self._locate(index)
        file = self._files[self._group_file[group]]
        columns = [name for name in (self._label_column, self._caption_column) if name]
        cells: dict[str, Any] = {}
        if columns and group not in self._unread:
            table = self._text(group, columns)
            cells = {name: self._cell(group, table.column(name), row) for name in columns}
        row_in_file = self._group_row[group] + row
        return ImageInfo(
            id=f"{file.relative_to(self._root).as_posix()}/{row_in_file:06d}",
            uri=f"{file}#{row_in_file}",
            label=as_label(cells.get(self._label_column or ""), self._names_of(group)),
            captions=as_captions(cells.get(self._caption_column or "")),
        )

    def _names_of(self, group: int) -> list[str] | None:
        return self._class_names.get(self._group_file[group])

    def _cell(self, group: int, column: pa.ChunkedArray, row: int) -> Any:
        cell = column[row]
        try:
            return cell.as_py()
        except UnicodeDecodeError:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self._files[self._group_file[group]]}: holds text that is not UTF-8; its "
                    "invalid bytes are written as \\xNN",
                    stacklevel=3,
                )
            return decoded_cell(cell)

    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        """See `ImageSource.load`."""
        group, row = self._locate(index)
        part = self._part(group, row)
        return decode_image(image_bytes(part.cells[row - part.start].as_py()), min_side)

    def fingerprint(self) -> str:
        """Hash the files' names, sizes and modification times."""
        digest = hashlib.sha256()
        for file in self._files:
            name = without_surrogates(file.relative_to(self._root).as_posix())
            try:
                status = file.stat()
            except OSError:  # a broken link, which counts as a failed image
                digest.update(f"{name}\0missing\n".encode())
                continue
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def labels(self) -> list[str]:
        """See `ImageSource.labels`; reads only the label column.

        Raises:
            ImageError: the column is damaged.
        """
        if self._label_column is None:
            return []
        found: set[str | None] = set()
        for group in range(len(self._group_number)):
            if group in self._unread:
                continue
            column = self._read(group, [self._label_column]).column(0)
            nested = _kind(column.type) in ("list", "struct")
            cells = [] if nested else cells_of(column.unique())
            found |= {as_label(value, self._names_of(group)) for value in cells}
        return sorted(label for label in found if label is not None)

    def _locate(self, index: int) -> tuple[int, int]:
        group = bisect_right(self._starts, self._check_index(index)) - 1
        return group, index - self._starts[group]

    def _check_read(self, group: int) -> None:
        if group in self._unread:
            raise ImageError(self._unread[group])

    def _text(self, group: int, columns: list[str]) -> pa.Table:
        self._check_read(group)
        if group not in self._texts:
            table = self._read(group, columns)
            while len(self._texts) >= CACHED_TEXT_GROUPS:
                self._texts.popitem(last=False)
            self._texts[group] = table
        self._texts.move_to_end(group)
        return self._texts[group]

    def _read(self, group: int, columns: list[str]) -> pa.Table:
        try:
            return self._file(self._group_file[group]).read_row_group(
                self._group_number[group], columns=columns, use_threads=False
            )
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(group, error) from error

    def _part(self, group: int, row: int) -> _Part:
        """Return the part that holds a row of a group; read on from the last one if possible."""
        self._check_read(group)
        for part in self._parts:
            if (group, row) in part:
                return part
        if group in self._lost and row >= self._lost[group][0]:
            raise self._damaged(group, self._lost[group][1])
        if self._ahead is None or self._ahead[0] != group or self._ahead[1] > row:
            self._ahead = (group, 0, self._batches(group))
        _, start, batches = self._ahead
        self._ahead = None
        why: object = "it holds fewer rows than it says"
        try:
            for batch in batches:
                part = _Part(group, start, batch.column(0))
                start += len(part.cells)
                if row < start:
                    self._ahead = (group, start, batches)
                    self._parts = [*self._parts[1 - CACHED_PARTS :], part]
                    return part
        except (OSError, pa.ArrowException) as error:
            why = error
        self._lost[group] = (start, str(why))  # or every later image would be looked for again
        raise self._damaged(group, why)

    def _batches(self, group: int) -> Iterator[pa.RecordBatch]:
        file, number = self._file(self._group_file[group]), self._group_number[group]
        metadata, root = file.metadata.row_group(number), self._image_column
        columns = [metadata.column(i) for i in range(metadata.num_columns)]
        n_bytes = sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema == root or column.path_in_schema.startswith(f"{root}.")
        )
        rows = max(1, metadata.num_rows * PART_BYTES // max(n_bytes, PART_BYTES))
        yield from file.iter_batches(rows, [number], columns=[root], use_threads=False)

    def _damaged(self, group: int, why: object) -> ImageError:
        file = self._files[self._group_file[group]].name
        return ImageError(f"{file}: row group {self._group_number[group]} is damaged ({why})")

    def _file(self, number: int) -> pq.ParquetFile:
        if number not in self._open:
            self._open.clear()  # reading goes file by file: one handle is enough
            self._open[number] = pq.ParquetFile(for_arrow(self._files[number]), **_STREAMED)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_open": {},
            "_parts": [],
            "_ahead": None,
            "_lost": {},
            "_texts": OrderedDict(),
        }


def image_bytes(cell: Any) -> bytes:
    """Return the encoded image in a cell: bytes, or a struct with `bytes`.

    Raises:
        ImageError: the cell is empty, or has only a path.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data is None:
        path = cell.get("path") if isinstance(cell, dict) else None
        raise ImageError(f"the table holds only the path {path!r}" if path else "the cell is empty")
    return bytes(data)


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _metadata(file: Path) -> tuple[pq.FileMetaData, pa.Schema]:
    if file.exists() and not file.is_file():  # opening a named pipe would wait forever
        raise UserError(f"{file}: is not a regular file.")
    try:
        with pq.ParquetFile(for_arrow(file)) as opened:
            return opened.metadata, opened.schema_arrow
    except FileNotFoundError:
        raise UserError(f"{file}: no such Parquet file.") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({error}).") from error


def _common_columns(schemas: Mapping[Path, pa.Schema]) -> dict[str, pa.DataType]:
    """Return the columns that all files share, each with a type that it has in one of them.

    Raises:
        UserError: a file has other columns than the first, or incompatible types.
    """
    (first, expected), *others = schemas.items()
    columns: dict[str, pa.DataType] = {field.name: field.type for field in expected}
    for file, schema in others:
        if set(schema.names) != set(columns):
            raise UserError(
                f"{file}: has the columns {', '.join(schema.names)}, unlike {first.name} "
                f"({', '.join(columns)}). Open such files one by one."
            )
        for field in schema:
            kind, own = _kind(columns[field.name]), _kind(field.type)
            if kind == "null":
                columns[field.name] = field.type
            elif own not in ("null", kind):
                raise UserError(
                    f"{file}: the column {field.name!r} holds {field.type}, in the files before it "
                    f"{columns[field.name]}. Open such files one by one."
                )
    return columns


def _kind(kind: pa.DataType) -> str:
    """Return how values of a type are read; types of the same kind are compatible."""
    types = pa.types
    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    kinds = {
        "null": types.is_null(kind),
        "number": types.is_integer(kind) or types.is_floating(kind),
        "text": types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind),
        "bytes": types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind),
        "list": types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind),
        "struct": types.is_struct(kind),
    }
    return next((name for name, fits in kinds.items() if fits), str(kind))


def _image_column(file: Path, columns: Mapping[str, pa.DataType]) -> str:
    by_type = [
        name
        for name, kind in columns.items()
        if _kind(kind) == "bytes"
        or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)
    ]
    column = find_column(by_type, IMAGE_COLUMNS) or (by_type[0] if len(by_type) == 1 else None)
    if column is None:
        found = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
        raise UserError(
            f"{file}: no column of images. Expected one of bytes, or struct with bytes, named "
            f"{IMAGE_COLUMNS[0]!r}; found {found}."
        )
    return column


def _class_names(schema: pa.Schema, label_column: str | None) -> list[str] | None:
    """Return the names of a `ClassLabel`, which `datasets` keeps in the schema's metadata."""
    described = (schema.metadata or {}).get(b"huggingface")
    if described is None or label_column is None:
        return None
    try:
        names = json.loads(described)["info"]["features"][label_column]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None
