"""Images with captions, from any source of images or from a pair file.

A pair file lists images and their captions: a JSON object `{path: [captions]}` like SPRIGHT's, JSON
lines, or a table separated by comma, tab, semicolon or `|`.
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
"""Characters of a caption or path that a message quotes."""


@dataclass(frozen=True)
class CaptionedImages:
    """Images, each with the captions that a step may choose from.

    Attributes:
        source: the source of the images.
        places: places in the source of the images with captions.
        captions: groups of captions per image: a step draws a group, then a caption of it.
        without: number of images left out because they have no text.
    """

    source: ImageSource
    places: tuple[int, ...]
    captions: tuple[tuple[tuple[str, ...], ...], ...]
    without: int = 0

    def __len__(self) -> int:
        return len(self.places)

    def distinct(self) -> list[str]:
        """Return every caption once, in the order of the images."""
        found = (text for groups in self.captions for group in groups for text in group)
        return list(dict.fromkeys(found))

    @cached_property
    def fingerprint(self) -> str:
        """Return the hex SHA-256 over images and captions."""
        digest = hashlib.sha256(self.source.fingerprint().encode())
        digest.update(json.dumps([self.places, self.captions]).encode())
        return digest.hexdigest()


class PairFileImages(ImageSource):
    """The images of a pair file, in its order, under their paths in the file.

    Args:
        path: the file; see the module's docstring.
        folder: the folder to which its paths are relative; default: that of the file.
        max_failed: share of the images that may be missing; they are left out and noted.

    Raises:
        UserError: the file cannot be read, or too many of its images are missing.
    """

    def __init__(self, path: Path, folder: Path | None = None, max_failed: float = 0.01) -> None:
        self.path = path.absolute()
        self.folder = folder.absolute() if folder is not None else self.path.parent
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: the folder of images does not exist.")
        self.spec = without_surrogates(str(self.path))
        named = read_pairs(self.path)
        there = {file: texts for file, texts in named.items() if self._is_there(file)}
        missing = [file for file in named if file not in there]
        if len(missing) > max_failed * len(named):
            raise UserError(
                f"{path}: {len(missing):,} of its {len(named):,} images are not in "
                f"{self.folder} (the first: {_short(missing[0])!r}); more than max_failed "
                f"({max_failed:.1%}) allows. Give the folder to which its paths are relative."
            )
        self._files = list(there)
        self._captions = there
        if missing:
            self.notes = (
                f"{path.name}: {len(missing):,} of {len(named):,} images are missing and left "
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
        """Return a fingerprint over paths, captions, sizes and modification times; no image is
        opened.
        """
        digest = hashlib.sha256()
        for file in self._files:
            status = (self.folder / file).stat()
            line = [file, status.st_size, status.st_mtime_ns, self._captions[file]]
            digest.update(json.dumps(line).encode())
        return digest.hexdigest()


def open_pairs(
    spec: str | Path | ImageSource, folder: Path | None = None, max_failed: float = 0.01
) -> ImageSource:
    """Open images with captions: a pair file, or anything that `open_images` takes.

    Args:
        spec: the source of the images.
        folder: folder of a pair file's images; default: that of the file.
        max_failed: share of a pair file's images that may be missing.

    Raises:
        UserError: the source does not exist, or a pair file is wrong.
    """
    if not isinstance(spec, ImageSource):
        path = Path(spec).expanduser()
        if path.suffix.lower() in PAIR_FILES and "?table=" not in str(spec):
            return PairFileImages(path, folder, max_failed)
    if folder is not None:
        raise UserError(f"A folder of images needs a pair file ({', '.join(PAIR_FILES)}).")
    return open_images(spec)


def read_pairs(path: Path) -> dict[str, tuple[str, ...]]:
    """Read the paths of images and their captions from a pair file.

    Raises:
        UserError: the file is missing, its contents do not match its name, or an entry is not an
            image with captions; the message names line or entry, and field.
    """
    if not path.is_file():
        raise UserError(f"{path}: the pair file does not exist.")
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
        raise UserError(f"{path}: lists no images.")
    return found


def captioned(
    source: ImageSource,
    use: CaptionUse = "both",
    templates: str | Sequence[str] = "simple",
    names: Mapping[str, str] | None = None,
) -> CaptionedImages:
    """Return the images of a source that have captions, with all their captions.

    Args:
        source: the source of the images.
        use: `captions`: the source's own; `labels`: the label written into each template; `both`:
            a step draws one of the two if an image has both.
        templates: sentences for labels; see `classifier_weights`.
        names: the name for each label; by default its own text with spaces for underscores.

    Raises:
        UserError: no images have a caption of that kind.
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
            f"{source.spec}: none of its {len(infos):,} images has a {what}. Give a pair file, "
            "a table of captions next to the images (captions.csv), or sub-folders as labels."
        )
    return CaptionedImages(source, tuple(places), tuple(captions), len(infos) - len(places))


def check_lengths(model: VisionModel, captions: Sequence[str], truncate: bool = False) -> int:
    """Check that captions fit the model's context; return how many will be cut.

    Args:
        model: the model whose tokenizer counts.
        captions: the distinct captions.
        truncate: cut captions that are too long, rather than refuse them.

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
            "use a model with a longer context (Long-CLIP)."
        )
    return len(long)


def _collect(entries: Iterable[tuple[str, Any, Any]]) -> dict[str, tuple[str, ...]]:
    """Check entries (where, file, captions), and join those of the same file."""
    found: dict[str, tuple[str, ...]] = {}
    for where, file, value in entries:
        if not isinstance(file, str) or not file.strip():
            raise UserError(f"{where}: the file is {_shown(file)}; expected the path of an image.")
        texts = value if isinstance(value, list) else [value]
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise UserError(f"{where}: caption {number} is {_shown(text)}; expected text.")
        captions = as_captions(value)
        if not captions:
            raise UserError(f"{where}: has no captions.")
        found[file] = (*found.get(file, ()), *captions)
    return found


def _json_entries(path: Path, text: str) -> Iterator[tuple[str, Any, Any]]:
    try:
        # A repeated key would silently lose the captions of the first.
        entries = json.loads(text, object_pairs_hook=list)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}).") from error
    if not isinstance(entries, list) or not text.lstrip().startswith("{"):
        raise UserError(
            f"{path}: expected one JSON object {{path: [captions]}}, found a "
            f"{'list' if isinstance(entries, list) else type(entries).__name__}. One record per "
            f"line "
            "belongs in a .jsonl file."
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
