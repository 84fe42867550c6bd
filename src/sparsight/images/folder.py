"""A folder tree of images: sub-folders are labels, tables and text files add captions."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image

from sparsight.errors import UserError
from sparsight.images.decoding import SUFFIXES, ImageError, decode_image, read_image_file
from sparsight.images.sidecars import is_caption, read_sidecars, too_large
from sparsight.images.source import ImageInfo, ImageSource
from sparsight.images.tables import FOUND_BY_NAME, Annotation, AnnotationTable, read_table
from sparsight.text import without_surrogates

_SPLITS = frozenset(
    {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "holdout"}
    | {"trainset", "testset", "train_set", "test_set", "unlabeled", "unlabelled"}
)
_SHARD_NUMBER = re.compile(r"\d{5,}")
_BESIDE = (".txt", ".json")


class FolderImages(ImageSource):
    """All images below a folder, sorted by their relative path, which is their id.

    The label is the name of the first sub-folder below the deepest folder that holds all images:
    with `photos/cat/1.jpg` and `photos/dog/2.jpg` the labels are `cat` and `dog`, and
    `photos/images/1.jpg` alone has no label. Tables (`metadata.csv`, `captions.txt`, …) in the
    folder or below it, whose paths are relative to where they lie, or the one given as `table`, add
    captions and, if they have a label column, replace the labels; if there are several, the nearest
    to the image counts. Images that no table mentions take captions from a `.txt` or `.json` file
    of their own name. Hidden files and folders are left out; symbolic links are followed. Images
    are recognised by their file name endings (`decoding.SUFFIXES`).

    Args:
        folder: the root.
        table: a table of labels and captions, used instead of those found by name.

    Raises:
        UserError: the folder does not exist, has no images below it, or a table does not fit.
    """

    def __init__(self, folder: Path, table: Path | None = None) -> None:
        self.folder = folder.absolute()
        self.table = table.absolute() if table is not None else None
        of_table = f"?table={self.table}" if self.table else ""
        self.spec = without_surrogates(f"{self.folder}{of_table}")
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder of images.")
        listing = _list_images(self.folder)
        self._paths = listing.images
        if not self._paths:
            raise UserError(f"{folder}: holds no images. {_hint(self.folder, listing.unused())}")
        self._ids = [_as_id(path) for path in self._paths]
        notes = listing.notes()
        self._labels = _folder_labels(self._ids)
        self._annotations: dict[str, Annotation] = {}
        if self.table is not None:
            notes += self._annotate("", [read_table(self.table)])
            if listing.tables:
                notes.append(f"{_few(listing.tables)}: not read, because another table was named.")
        else:
            notes += self._annotate_from(listing.tables)
        if named := _no_classes(self._labels):
            notes.append(f"The labels look like {named}, not like classes: sub-folders name them.")
        self._has_table = bool(self._annotations) or self.table is not None or bool(listing.tables)
        self._beside = self._find_beside(listing.beside)
        if self._beside:
            notes.append(
                f"{len(self._beside):,} images have a .txt or .json of their own name beside them; "
                "their captions are read from it."
            )
        self.notes = tuple(map(without_surrogates, notes))

    def _annotate_from(self, tables: Sequence[str]) -> list[str]:
        """Read the tables in the folder and below it, those higher up first."""
        notes: list[str] = []
        by_folder: dict[str, list[AnnotationTable]] = {}
        for relative in tables:
            prefix = relative[: relative.rfind("/") + 1]
            try:
                by_folder.setdefault(prefix, []).append(read_table(self.folder / relative))
            except UserError as error:
                if not prefix:
                    raise
                notes.append(f"{relative}: not read ({error})")
        for prefix, read in by_folder.items():
            notes += self._annotate(prefix, read)
        return notes

    def _annotate(self, prefix: str, tables: Sequence[AnnotationTable]) -> list[str]:
        """Apply the tables of one folder, which add up and replace those higher up."""
        start = _as_id(prefix)
        first, stop = (bisect_left(self._paths, end) for end in (prefix, f"{prefix}\U0010ffff"))
        places = {self._ids[place]: place for place in range(first, stop)}
        notes: list[str] = []
        added: dict[str, Annotation] = {}
        for table in tables:
            try:
                matched, table_notes = table.match(id_.removeprefix(start) for id_ in places)
            except UserError as error:
                if not prefix:
                    raise
                notes.append(f"{prefix}{table.path.name}: not read ({error})")
                continue
            notes += (f"{prefix}{note}" for note in table_notes)
            if table.has_labels:
                for id_, place in places.items():
                    annotation = matched.get(id_.removeprefix(start))
                    if annotation is not None or not prefix:
                        self._labels[place] = annotation.label if annotation else None
            for name, annotation in matched.items():
                added.setdefault(start + name, Annotation()).captions += annotation.captions
        self._annotations |= {
            id_: annotation
            for id_, annotation in added.items()
            if annotation.captions or id_ not in self._annotations
        }
        return notes

    def _find_beside(self, beside: dict[str, list[str]]) -> dict[str, list[str]]:
        """Return the endings of the text files that share an image's name, by the image's id."""
        captioned = {id_ for id_, annotation in self._annotations.items() if annotation.captions}
        found = ((id_, beside.get(os.path.splitext(path)[0])) for id_, path in self._named())  # noqa: PTH122
        return {id_: endings for id_, endings in found if endings and id_ not in captioned}

    def _named(self) -> zip[tuple[str, str]]:
        return zip(self._ids, self._paths, strict=True)

    def __len__(self) -> int:
        return len(self._paths)

    def info(self, index: int) -> ImageInfo:
        """See `ImageSource.info`."""
        id_ = self._ids[self._check_index(index)]
        annotation = self._annotations.get(id_)
        captions = tuple(annotation.captions) if annotation else ()
        if id_ in self._beside:
            captions = self._captions_beside(id_, self._paths[index])
        return ImageInfo(
            id=id_,
            uri=_as_id(f"{self.folder}/{self._paths[index]}"),
            label=self._labels[index],
            captions=captions,
        )

    def _captions_beside(self, id_: str, path: str) -> tuple[str, ...]:
        found: dict[str, bytes] = {}
        for ending in self._beside[id_]:
            file = self.folder / (os.path.splitext(path)[0] + ending)  # noqa: PTH122
            try:
                status = file.stat()
                if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait forever
                    raise ImageError(f"its {ending} is not a regular file")
                if not too_large(id_, ending[1:], status.st_size):
                    found[ending[1:].lower()] = file.read_bytes()
            except OSError as error:
                raise ImageError(f"its {ending} cannot be read ({error.strerror})") from error
        captions = read_sidecars(id_, found)[1]
        return tuple(caption for caption in captions if is_caption(caption))

    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        """See `ImageSource.load`."""
        return decode_image(
            read_image_file(self.folder / self._paths[self._check_index(index)]), min_side
        )

    def fingerprint(self) -> str:
        """Hash ids, sizes, modification times and what tables say; no image is opened."""
        digest = hashlib.sha256()
        for id_, path in self._named():
            digest.update(_state(id_, f"{self.folder}/{path}"))
            for ending in self._beside.get(id_, ()):
                file = f"{self.folder}/{os.path.splitext(path)[0]}{ending}"  # noqa: PTH122
                digest.update(_state(ending, file))
        if self._has_table:
            for id_, label in zip(self._ids, self._labels, strict=True):
                annotation = self._annotations.get(id_)
                captions = annotation.captions if annotation else []
                digest.update(f"{label!r}\0{captions!r}\n".encode())
        return digest.hexdigest()

    def labels(self) -> list[str]:
        """See `ImageSource.labels`."""
        return sorted({label for label in self._labels if label is not None})


@dataclass
class _Listing:
    """What lies below a folder, as relative POSIX paths.

    Attributes:
        images: sorted.
        tables: files named as in `FOUND_BY_NAME`, those higher up first.
        beside: endings of text files, by their path without the ending.
        others: how many other files have each ending.
        hidden: files and folders whose names begin with a dot.
    """

    images: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    beside: dict[str, list[str]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    hidden: list[str] = field(default_factory=list)

    def unused(self) -> Counter[str]:
        """Count, by ending, the files that neither are images nor describe one."""
        others = self.others.copy()
        with_text = {os.path.splitext(path)[0] for path in self.images}  # noqa: PTH122
        for stem, endings in self.beside.items():
            if stem not in with_text:
                others.update(ending.lower() for ending in endings)
        return others

    def notes(self) -> list[str]:
        """Return sentences about what is left out."""
        notes, others = [], self.unused()
        if others:
            kinds = ", ".join(
                f"{ending or 'no ending'} ×{n:,}" for ending, n in others.most_common(5)
            )
            notes.append(f"{others.total():,} files are not images by their names ({kinds}).")
        if self.hidden:
            notes.append(
                f"{len(self.hidden):,} hidden files or folders are left out ({_few(self.hidden)})."
            )
        return notes


def _list_images(folder: Path) -> _Listing:
    listing = _Listing()
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        prefix, ancestors = pending.pop()
        here = os.path.join(folder, prefix)  # noqa: PTH118 - keeps names that are not UTF-8
        status = os.stat(here)  # noqa: PTH116
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:  # a link to a folder above: following it would never end
            continue
        try:
            entries = list(os.scandir(here))
        except OSError as error:
            raise UserError(f"{here}: cannot be listed ({error.strerror}).") from error
        for entry in entries:
            relative = f"{prefix}{entry.name}"
            stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122
            ending = suffix.lower()
            if entry.name.startswith("."):
                if ending in SUFFIXES or _is_folder(entry):
                    listing.hidden.append(relative)
            elif _is_folder(entry):
                pending.append((f"{relative}/", (*ancestors, identity)))
            elif ending in SUFFIXES:
                listing.images.append(relative)
            elif entry.name in FOUND_BY_NAME:
                listing.tables.append(relative)
            elif ending in _BESIDE:
                listing.beside.setdefault(f"{prefix}{stem}", []).append(suffix)
            else:
                listing.others[ending] += 1
    listing.images.sort()
    listing.tables.sort(key=_table_order)
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether the entry is a folder; a link that leads back to itself is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _table_order(relative: str) -> tuple[int, str, int]:
    folder, _, name = relative.rpartition("/")
    return relative.count("/"), folder, FOUND_BY_NAME.index(name)


def _state(name: str, file: str) -> bytes:
    """Return what a fingerprint takes from a file."""
    try:
        status = os.stat(file)  # noqa: PTH116 - a million times
    except OSError:
        return f"{name}\0missing\n".encode()
    return f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode()


def _no_classes(labels: Sequence[str | None]) -> str | None:
    """Say what the labels are if they name no classes: splits of a data set, or its shards."""
    names = {label for label in labels if label is not None}
    if names and all(label.lower() in _SPLITS for label in names):
        return f"splits of a data set ({_few(sorted(names))})"
    if names and all(map(_SHARD_NUMBER.fullmatch, names)):
        return f"numbers of shards ({_few(sorted(names))})"
    return None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _as_id(path: str) -> str:
    """Return the path as valid text: bytes that are not UTF-8 are written as `\\xNN`."""
    return without_surrogates(path)


def _folder_labels(ids: list[str]) -> list[str | None]:
    parents = [PurePosixPath(id_).parts[:-1] for id_ in ids]
    first, last = min(parents), max(parents)  # these two share the common prefix of all
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
