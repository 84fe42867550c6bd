"""A folder tree of pictures: the sub-folder is the label, tables bring labels and captions."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path, PurePosixPath

from PIL import Image

from sparsight.errors import UserError
from sparsight.images.decoding import SUFFIXES, decode_image, read_picture
from sparsight.images.source import ImageInfo, ImageSource
from sparsight.images.tables import FOUND_BY_NAME, Annotation, AnnotationTable, read_table


class FolderImages(ImageSource):
    """All pictures below a folder, sorted by their relative path, which is their id.

    The label is the name of the first sub-folder below the deepest folder that holds them all, so
    `photos/cat/1.jpg` beside `photos/dog/2.jpg` is a `cat`, and `photos/images/1.jpg` alone has
    no label. A table (`metadata.csv`, `captions.txt`, … in the folder, or `table`) brings captions
    and, where it has a label column, the labels. Hidden files and folders are left out; symbolic
    links are followed. Pictures are known by the ending of their name (`decoding.SUFFIXES`).

    Args:
        folder: the root.
        table: a table of labels and captions that takes the place of those found by name.

    Raises:
        UserError: no such folder, no pictures below it, or a table that does not fit.
    """

    def __init__(self, folder: Path, table: Path | None = None) -> None:
        self.folder = folder.absolute()
        self.table = table.absolute() if table is not None else None
        self.spec = str(self.folder) + (f"?table={self.table}" if self.table else "")
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder of images.")
        self._paths, others = _list_pictures(self.folder)
        if not self._paths:
            raise UserError(f"{folder}: holds no images. {_hint(self.folder, others)}")
        self._ids = [_as_id(path) for path in self._paths]
        notes = []
        if others:
            kinds = ", ".join(
                f"{ending or 'no ending'} ×{n:,}" for ending, n in others.most_common(5)
            )
            notes.append(f"{others.total():,} files are not images by their name ({kinds}).")
        self._labels = _folder_labels(self._ids)
        self._annotations: dict[str, Annotation] = {}
        tables = [self.table] if self.table else _tables_in(self.folder)
        self._has_table = bool(tables)
        for path in tables:
            notes += self._annotate(read_table(path))
        self.notes = tuple(notes)

    def _annotate(self, table: AnnotationTable) -> tuple[str, ...]:
        matched, notes = table.match(self._ids)
        if table.has_labels:
            self._labels = [matched[id_].label if id_ in matched else None for id_ in self._ids]
        for id_, annotation in matched.items():
            self._annotations.setdefault(id_, Annotation()).captions += annotation.captions
        return notes

    def __len__(self) -> int:
        return len(self._paths)

    def info(self, index: int) -> ImageInfo:
        """See `ImageSource.info`."""
        id_ = self._ids[self._check_index(index)]
        annotation = self._annotations.get(id_)
        return ImageInfo(
            id=id_,
            uri=_as_id(str(self.folder / self._paths[index])),
            label=self._labels[index],
            captions=tuple(annotation.captions) if annotation else (),
        )

    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        """See `ImageSource.load`."""
        return decode_image(
            read_picture(self.folder / self._paths[self._check_index(index)]), min_side
        )

    def fingerprint(self) -> str:
        """Over ids, sizes, modification times, and what tables say; no picture is opened."""
        digest = hashlib.sha256()
        for id_, path in zip(self._ids, self._paths, strict=True):
            try:
                status = os.stat(f"{self.folder}/{path}")  # noqa: PTH116 - a million times
                digest.update(f"{id_}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
            except OSError:
                digest.update(f"{id_}\0missing\n".encode())
        if self._has_table:
            for id_, label in zip(self._ids, self._labels, strict=True):
                annotation = self._annotations.get(id_)
                captions = annotation.captions if annotation else []
                digest.update(f"{label!r}\0{captions!r}\n".encode())
        return digest.hexdigest()

    def labels(self) -> list[str]:
        """See `ImageSource.labels`."""
        return sorted({label for label in self._labels if label is not None})


def _list_pictures(folder: Path) -> tuple[list[str], Counter[str]]:
    """Sorted relative posix paths of the pictures, and the endings of all other files."""
    pictures: list[str] = []
    others: Counter[str] = Counter()
    tables = set(map(str, _tables_in(folder)))
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        prefix, ancestors = pending.pop()
        here = os.path.join(folder, prefix)  # noqa: PTH118 - keeps names that are not UTF-8
        status = os.stat(here)  # noqa: PTH116
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:  # a link to a folder above: going on would never end
            continue
        try:
            entries = list(os.scandir(here))
        except OSError as error:
            raise UserError(f"{here}: cannot be listed ({error.strerror}).") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            relative = f"{prefix}{entry.name}"
            if entry.is_dir():
                pending.append((f"{relative}/", (*ancestors, identity)))
                continue
            ending = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
            if ending in SUFFIXES:
                pictures.append(relative)
            elif entry.path not in tables:
                others[ending] += 1
    return sorted(pictures), others


def _tables_in(folder: Path) -> list[Path]:
    return [folder / name for name in FOUND_BY_NAME if (folder / name).is_file()]


def _as_id(path: str) -> str:
    """The path as valid text: bytes that are not UTF-8 are written as `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _folder_labels(ids: list[str]) -> list[str | None]:
    parents = [PurePosixPath(id_).parts[:-1] for id_ in ids]
    first, last = min(parents), max(parents)  # the common prefix of all is that of these two
    depth = 0
    while depth < min(len(first), len(last)) and first[depth] == last[depth]:
        depth += 1
    return [parts[depth] if len(parts) > depth else None for parts in parents]


def _hint(folder: Path, others: Counter[str]) -> str:
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        return f"It looks like a saved data set: open it as 'hf:{folder}'."
    if others[".parquet"]:
        return f"It holds Parquet files: open it as 'parquet:{folder}'."
    if others[".tar"]:
        return f"It holds tar files: open it as 'webdataset:{folder}'."
    found = ", ".join(f"{ending or 'no ending'} ×{n:,}" for ending, n in others.most_common(3))
    return f"Expected {' '.join(sorted(SUFFIXES))}; found {found or 'no files'}."
