"""Pictures with captions: from any source of images, or from a pair file.

A pair file names pictures and their captions: a JSON object `{path: [captions]}` as SPRIGHT's,
JSON lines, or a table parted by comma, tab, semicolon or `|`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image

from sparsight.errors import UserError
from sparsight.images import ImageInfo, ImageSource, decode_image, open_images
from sparsight.images.columns import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    as_captions,
    find_column,
)
from sparsight.images.decoding import read_image_file
from sparsight.images.tables import read_table
from sparsight.text import lines, without_surrogates
from sparsight.vision import VisionModel, resolve_templates

CaptionUse = Literal["both", "captions", "labels"]

PAIR_FILES = (".json", ".jsonl", ".csv", ".tsv", ".txt")
SHOWN = 60
"""Letters of a caption or path that a message quotes."""


@dataclass(frozen=True)
class CaptionedImages:
    """Pictures, each with the captions that a step may choose from.

    Attributes:
        source: where the pictures come from.
        places: of the pictures that have captions, in the source.
        captions: of each of them, groups: a step draws a group, then a caption of it.
        without: pictures left out because nothing is said of them.
    """

    source: ImageSource
    places: tuple[int, ...]
    captions: tuple[tuple[tuple[str, ...], ...], ...]
    without: int = 0

    def __len__(self) -> int:
        return len(self.places)

    def distinct(self) -> list[str]:
        """Every caption once, in the order of the pictures."""
        found = (text for groups in self.captions for group in groups for text in group)
        return list(dict.fromkeys(found))

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over pictures and captions."""
        digest = hashlib.sha256(self.source.fingerprint().encode())
        digest.update(json.dumps([self.places, self.captions]).encode())
        return digest.hexdigest()


class PairFileImages(ImageSource):
    """The pictures that a pair file names, in its order, under the paths that it gives them.

    Args:
        path: the file; see the module.
        folder: to which its paths are relative; default the file's own.
        max_failed: share of the pictures that may be missing; they are left out and noted.

    Raises:
        UserError: the file cannot be read, or too many of its pictures are missing.
    """

    def __init__(self, path: Path, folder: Path | None = None, max_failed: float = 0.01) -> None:
        self.path = path.absolute()
        self.folder = folder.absolute() if folder is not None else self.path.parent
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder of images.")
        self.spec = without_surrogates(str(self.path))
        named = read_pairs(self.path)
        there = {file: texts for file, texts in named.items() if self._is_there(file)}
        missing = [file for file in named if file not in there]
        if len(missing) > max_failed * len(named):
            raise UserError(
                f"{path}: {len(missing):,} of the {len(named):,} pictures that it names are not in "
                f"{self.folder} (the first: {_short(missing[0])!r}); more than max_failed "
                f"({max_failed:.1%}) allows. Name the folder that its paths are relative to."
            )
        self._files = list(there)
        self._captions = there
        if missing:
            self.notes = (
                f"{path.name}: {len(missing):,} of {len(named):,} pictures are missing and left "
                f"out (the first: {_short(missing[0])!r}).",
            )

    def _is_there(self, file: str) -> bool:
        return os.path.isfile(self.folder / file)  # noqa: PTH113 - False for a name too long

    def __len__(self) -> int:
        return len(self._files)

    def info(self, index: int) -> ImageInfo:
        """See `ImageSource.info`."""
        file = self._files[self._check_index(index)]
        return ImageInfo(id=file, uri=str(self.folder / file), captions=self._captions[file])

    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        """See `ImageSource.load`."""
        file = self._files[self._check_index(index)]
        return decode_image(read_image_file(self.folder / file), min_side)

    def fingerprint(self) -> str:
        """Over paths, captions, sizes and modification times; no picture is opened."""
        digest = hashlib.sha256()
        for file in self._files:
            status = (self.folder / file).stat()
            line = [file, status.st_size, status.st_mtime_ns, self._captions[file]]
            digest.update(json.dumps(line).encode())
        return digest.hexdigest()


def open_pairs(
    spec: str | Path | ImageSource, folder: Path | None = None, max_failed: float = 0.01
) -> ImageSource:
    """Open pictures with captions: a pair file, or whatever `open_images` takes.

    Args:
        spec: of the pictures.
        folder: of a pair file's pictures; default where the file lies.
        max_failed: share of a pair file's pictures that may be missing.

    Raises:
        UserError: there is nothing of that kind there, or a pair file is wrong.
    """
    if not isinstance(spec, ImageSource):
        path = Path(spec).expanduser()
        if path.suffix.lower() in PAIR_FILES and "?table=" not in str(spec):
            return PairFileImages(path, folder, max_failed)
    if folder is not None:
        raise UserError(f"A folder of pictures goes with a pair file ({', '.join(PAIR_FILES)}).")
    return open_images(spec)


def read_pairs(path: Path) -> dict[str, tuple[str, ...]]:
    """Paths of pictures and their captions, as a pair file gives them.

    Raises:
        UserError: the file is missing, is not what its name says, or an entry is no picture with
            captions; the message names line or entry, and field.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such pair file.")
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl"):
        read = _json_entries if suffix == ".json" else _json_lines
        try:
            found = _collect(read(path, path.read_bytes().decode("utf-8-sig")))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}).") from error
    else:
        table = read_table(path)
        found = _collect(
            (
                f"{path}: {file!r}",
                PurePosixPath(file.replace("\\", "/")).as_posix(),
                annotation.captions,
            )
            for file, annotation in table.by_file.items()
        )
    if not found:
        raise UserError(f"{path}: names no picture.")
    return found


def captioned(
    source: ImageSource,
    use: CaptionUse = "both",
    templates: str | Sequence[str] = "simple",
    names: Mapping[str, str] | None = None,
) -> CaptionedImages:
    """The pictures of a source that have captions, with all of these.

    Args:
        source: the pictures.
        use: `captions`: the source's own; `labels`: the label written into each template; `both`:
            a step draws which of the two, where a picture has both.
        templates: sentences for labels; see `classifier_weights`.
        names: what stands for a label; by default its own text with spaces for underscores.

    Raises:
        UserError: not one picture has a caption of that kind.
    """
    infos = [source.known(i) for i in range(len(source))]
    sentences = resolve_templates(templates)
    places: list[int] = []
    captions: list[tuple[tuple[str, ...], ...]] = []
    for place, info in enumerate(infos):
        groups = []
        if use != "labels" and info.captions:
            groups.append(info.captions)
        if use != "captions" and info.label is not None:
            name = (names or {}).get(info.label, info.label.replace("_", " "))
            groups.append(tuple(sentence.replace("{}", name) for sentence in sentences))
        if groups:
            places.append(place)
            captions.append(tuple(groups))
    if not places:
        what = {"captions": "caption", "labels": "label", "both": "caption or label"}[use]
        raise UserError(
            f"{source.spec}: none of its {len(infos):,} pictures has a {what}. Give a pair file, "
            "or a table of captions beside the pictures (captions.csv), or sub-folders as labels."
        )
    return CaptionedImages(source, tuple(places), tuple(captions), len(infos) - len(places))


def check_lengths(model: VisionModel, captions: Sequence[str], truncate: bool = False) -> int:
    """Make sure that captions fit the model's context; how many will be cut.

    Args:
        model: whose tokenizer counts.
        captions: each distinct one.
        truncate: cut what is too long rather than refuse it.

    Raises:
        UserError: captions are too long and `truncate` is off; the message has their count and
            the first.
    """
    lengths = model.count_tokens(captions)
    long = [i for i, length in enumerate(lengths) if length > model.context_length]
    if long and not truncate:
        first = long[0]
        raise UserError(
            f"{len(long):,} of {len(captions):,} captions are longer than the "
            f"{model.context_length} tokens that {model.id} reads (the first has {lengths[first]}: "
            f"{_short(captions[first])!r}). Shorten them, cut them with --truncate-captions, or "
            "take a model with a longer context (Long-CLIP)."
        )
    return len(long)


def _collect(entries: Iterable[tuple[str, Any, Any]]) -> dict[str, tuple[str, ...]]:
    """Check entries (where, file, captions); those of one file are put together."""
    found: dict[str, tuple[str, ...]] = {}
    for where, file, value in entries:
        if not isinstance(file, str) or not file.strip():
            raise UserError(f"{where}: the file is {_shown(file)}; expected the path of a picture.")
        texts = value if isinstance(value, list) else [value]
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise UserError(f"{where}: caption {number} is {_shown(text)}; expected text.")
        captions = as_captions(value)
        if not captions:
            raise UserError(f"{where}: has no caption.")
        found[file] = (*found.get(file, ()), *captions)
    return found


def _json_entries(path: Path, text: str) -> Iterator[tuple[str, Any, Any]]:
    try:
        # Keys that stand twice would silently lose the first one's captions.
        entries = json.loads(text, object_pairs_hook=list)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}).") from error
    if not isinstance(entries, list) or not text.lstrip().startswith("{"):
        raise UserError(
            f"{path}: expected one JSON object {{path: [captions]}}, found a "
            f"{'list' if isinstance(entries, list) else type(entries).__name__}. Records a line "
            "belong into a .jsonl file."
        )
    for file, captions in entries:
        yield f"{path}: {_short(file)!r}", file, captions


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any, Any]]:
    for number, line in enumerate(lines(text), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: is not JSON ({error}).") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: is a {type(record).__name__}; expected an object.")
        file, caption = (
            find_column(record, columns) for columns in (FILE_COLUMNS, CAPTION_COLUMNS)
        )
        if file is None or caption is None:
            lacking = "file" if file is None else "caption"
            choices = FILE_COLUMNS if file is None else CAPTION_COLUMNS
            raise UserError(
                f"{where}: has no {lacking} field (found {', '.join(map(str, record)) or 'none'}; "
                f"expected one of {', '.join(choices)})."
            )
        yield where, record[file], record[caption]


def _shown(value: Any) -> str:
    return repr(_short(value)) if isinstance(value, str) else _short(json.dumps(value))


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
