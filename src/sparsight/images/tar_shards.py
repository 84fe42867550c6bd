"""WebDataset tar shards on the local disk, scanned once and then read at random."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from glob import glob
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from PIL import Image

from sparsight.errors import UserError
from sparsight.images.columns import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    as_captions,
    as_label,
    find_column,
)
from sparsight.images.decoding import SUFFIXES, ImageError, check_bytes, decode_image
from sparsight.images.source import ImageInfo, ImageSource

MAX_SHARDS = 100_000
SIDECARS = ("cls", "label", "txt", "caption", "json")
MAX_SIDECAR_BYTES = 2**20
"""From a larger one nothing is taken, with a warning."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
_BLOCK = 512
_BEHIND = 64 * 1024  # writers pad with zeros to 10 KiB, as a rule


@dataclass
class _Sample:
    """The members of one basename: (offset, size) of the picture and of what goes with it."""

    shard: int
    key: str
    picture: tuple[int, int] | None = None
    sidecars: dict[str, tuple[int, int]] = field(default_factory=dict)
    damage: str | None = None
    id: str = ""


class TarShardImages(ImageSource):
    """Samples of uncompressed tar files, in the order of the shards and of their members.

    Neighbouring members with the same path up to the first dot of the file name are one sample:
    a picture (the first, if several), and sidecars: `.cls` or `.label` (label), `.txt` or
    `.caption` (caption), `.json` (both). The id is `SHARD/KEY`. A shard that is cut off or
    damaged gives what can be read; what cannot is an image that fails with the place of the damage
    as its reason, so it is counted like any broken picture.

    Args:
        pattern: paths with `{000..127}` and `{a,b}`, `*`, or a folder of `.tar` files; several are
            parted by `::`.

    Raises:
        UserError: a shard is missing, compressed, or no tar file; or there are no pictures.
    """

    def __init__(self, pattern: str) -> None:
        self._shards = _find_shards(pattern)
        absolute = (
            part if part.startswith("{/") else str(Path(part).expanduser().absolute())
            for part in pattern.split("::")
        )
        self.spec = "webdataset:" + "::".join(absolute)
        names = _shard_names(self._shards)
        samples = list(chain.from_iterable(map(_scan, range(len(self._shards)), self._shards)))
        self._samples = [s for s in samples if s.picture is not None or s.damage is not None]
        if not any(sample.picture for sample in self._samples):
            raise UserError(
                f"{pattern}: {len(self._shards):,} shards with {len(samples):,} samples hold no "
                f"images ({' '.join(sorted(SUFFIXES))})."
            )
        copies: Counter[str] = Counter()
        taken: set[str] = set()
        for sample in self._samples:
            key = sample.id = f"{names[sample.shard]}/{sample.key}"
            while sample.id in taken:
                copies[key] += 1
                sample.id = f"{key}~{copies[key] + 1}"
            taken.add(sample.id)
        without = len(samples) - len(self._samples)
        self.notes = (f"{without:,} samples of the shards hold no image.",) if without else ()
        self._open: tuple[int, BinaryIO] | None = None

    def __len__(self) -> int:
        return len(self._samples)

    def info(self, index: int) -> ImageInfo:
        """See `ImageSource.info`."""
        sample = self._samples[self._check_index(index)]
        label, captions = self._annotations(sample)
        uri = f"{self._shards[sample.shard]}#{sample.key}"
        return ImageInfo(id=sample.id, uri=uri, label=label, captions=captions)

    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        """See `ImageSource.load`."""
        sample = self._samples[self._check_index(index)]
        if sample.damage is not None or sample.picture is None:
            raise ImageError(sample.damage or "no picture")
        offset, size = sample.picture
        check_bytes(size)
        return decode_image(self._read(sample.shard, offset, size), min_side)

    def fingerprint(self) -> str:
        """Over the shards' names, sizes and modification times."""
        digest = hashlib.sha256()
        for name, shard in zip(_shard_names(self._shards), self._shards, strict=True):
            status = shard.stat()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _annotations(self, sample: _Sample) -> tuple[str | None, tuple[str, ...]]:
        if sample.damage is not None:
            return None, ()
        texts = {}
        for ending in SIDECARS:
            offset, size = sample.sidecars.get(ending, (0, 0))
            if size > MAX_SIDECAR_BYTES:
                warnings.warn(
                    f"{sample.id}: its .{ending} of {size:,} bytes is over the limit of "
                    f"{MAX_SIDECAR_BYTES:,}; nothing is taken from it",
                    stacklevel=3,
                )
            elif ending in sample.sidecars:
                texts[ending] = self._read(sample.shard, offset, size).decode("utf-8", "replace")
        described = _json_object(sample.id, texts.get("json"))
        label_key = find_column(described, LABEL_COLUMNS)
        caption_key = find_column(described, CAPTION_COLUMNS)
        label = as_label(texts.get("cls", texts.get("label")))
        captions = as_captions(texts.get("txt", texts.get("caption")))
        return (
            label or as_label(described.get(label_key or "")),
            captions or as_captions(described.get(caption_key or "")),
        )

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        try:
            if self._open is None or self._open[0] != shard:
                if self._open is not None:
                    self._open[1].close()
                self._open = (shard, self._shards[shard].open("rb"))
            # pread moves no file position, which forked workers would share.
            return os.pread(self._open[1].fileno(), size, offset)
        except OSError as error:
            raise ImageError(f"its shard cannot be read ({error.strerror or error})") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}


def expand_braces(pattern: str) -> list[str]:
    """`"a-{00..02}.{x,y}"` → the six names, the ranges padded as written."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    bounds = _RANGE.match(match[1])
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        if last < first or last - first >= MAX_SHARDS:
            raise UserError(f"{pattern}: {{{match[1]}}} is not a rising range of at most 100,000.")
        choices = [f"{n:0{len(bounds[1])}d}" for n in range(first, last + 1)]
    else:
        choices = match[1].split(",")
    rests = expand_braces(pattern[match.end() :])
    if len(choices) * len(rests) > MAX_SHARDS:
        raise UserError(f"{pattern}: stands for more than {MAX_SHARDS:,} shards.")
    return [f"{pattern[: match.start()]}{choice}{rest}" for choice in choices for rest in rests]


def _find_shards(pattern: str) -> list[Path]:
    if re.search(r"(^|::)(\w{2,}://|pipe:)", pattern):
        raise UserError(f"{pattern}: shards must be local files; download them first.")
    shards: list[Path] = []
    for name in chain.from_iterable(expand_braces(part) for part in pattern.split("::")):
        name = str(Path(name).expanduser())
        if Path(name).is_dir():
            found = sorted(Path(name).glob("*.tar"))
        elif any(sign in name for sign in "*?") and not Path(name).exists():
            found = sorted(map(Path, glob(name.replace("[", "[[]"))))  # noqa: PTH207 - the pattern may be absolute
        else:
            found = [Path(name)]
        if not found:
            raise UserError(f"{name}: no tar shards found there.")
        shards += found
    shards = [shard.absolute() for shard in shards]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]}: no such shard ({len(missing):,} of {len(shards):,} are missing)."
        )
    return shards


def _shard_names(shards: list[Path]) -> list[str]:
    root = os.path.commonpath([shard.parent for shard in shards])
    return [shard.relative_to(root).as_posix() for shard in shards]


def _scan(number: int, shard: Path) -> list[_Sample]:
    """List a shard's samples by its headers alone; damage becomes samples that fail."""
    size = shard.stat().st_size
    samples: list[_Sample] = []
    try:
        with tarfile.open(shard, mode="r:") as archive:
            damage = None
            try:
                for member in archive:
                    _add(samples, number, member, size)
            except (tarfile.TarError, EOFError, ValueError) as error:
                damage = f"the shard is damaged at byte {min(archive.offset, size):,} ({error})"
            damage = damage or _bad_end(shard, archive.offset, size)
    except (tarfile.TarError, EOFError) as error:
        hint = "It is compressed: unpack it." if _starts_gzip(shard) else "Expected a plain tar."
        raise UserError(f"{shard}: cannot be read as a tar file ({error}). {hint}") from error
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror or error}).") from error
    if damage is not None and not any(sample.damage for sample in samples):
        lost = f"{damage}; what came behind it is lost"
        samples.append(_Sample(number, "(damaged)", damage=lost))
    return samples


def _add(samples: list[_Sample], number: int, member: tarfile.TarInfo, size: int) -> None:
    if not member.isreg() or member.issparse():
        return
    path = PurePosixPath(member.name)
    stem, _, ending = path.name.partition(".")
    if not stem:  # hidden files, and the ._ twins that macOS adds
        return
    key = (path.parent / stem).as_posix()
    if not samples or samples[-1].key != key:
        samples.append(_Sample(number, key))
    sample = samples[-1]
    place = (member.offset_data, member.size)
    ending = ending.lower()
    if f".{ending.rpartition('.')[2]}" in SUFFIXES:
        sample.picture = sample.picture or place
    else:
        sample.sidecars.setdefault(ending, place)
    if member.offset_data + member.size > size:
        sample.damage = f"the shard is cut off at byte {size:,}, inside {member.name}"


def _bad_end(shard: Path, offset: int, size: int) -> str | None:
    """tarfile takes a spoilt header for the end; only a block of zeros truly is one."""
    with shard.open("rb") as file:
        file.seek(offset)
        block = file.read(_BLOCK)
        behind = file.read(_BEHIND)
    if len(block) < _BLOCK:
        return f"the shard is cut off at byte {size:,} (it has no end mark)"
    if any(block):
        return f"the shard is damaged at byte {offset:,} (no header there)"
    if any(behind):
        return f"the shard has more behind its end mark at byte {offset:,} (joined tar files?)"
    return None


def _starts_gzip(shard: Path) -> bool:
    with shard.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _json_object(id_: str, text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text) if text is not None else {}
    except ValueError as error:
        value = error
    if not isinstance(value, dict):
        warnings.warn(f"{id_}: its .json is no JSON object; nothing is taken from it", stacklevel=4)
        return {}
    return value
