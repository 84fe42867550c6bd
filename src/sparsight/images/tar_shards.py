"""WebDataset tar shards on the local disk, scanned once and then read at random."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from glob import glob
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from PIL import Image

from sparsight.errors import UserError
from sparsight.images.decoding import SUFFIXES, ImageError, check_bytes, decode_image
from sparsight.images.sidecars import SIDECARS, read_sidecars, too_large
from sparsight.images.source import ImageInfo, ImageSource
from sparsight.text import path_of, without_surrogates

MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^([0-9]{1,18})\.\.([0-9]{1,18})$")
_BLOCK = 512
_BEHIND = 64 * 1024  # writers usually pad with zeros to 10 KiB


Place = tuple[int, int]
"""Offset and size, in bytes, of a member."""


@dataclass
class _Group:
    """Neighbouring members with the same path up to the first dot of the file name, by ending."""

    key: str
    images: dict[str, Place] = field(default_factory=dict)
    sidecars: dict[str, Place] = field(default_factory=dict)
    damage: str | None = None


@dataclass
class _Sample:
    """An image, and what belongs to it."""

    shard: int
    key: str
    image: Place | None = None
    sidecars: dict[str, Place] = field(default_factory=dict)
    damage: str | None = None
    id: str = ""


@dataclass
class _LeftOut:
    """Counts of what was left out of the shards, or chosen between.

    Attributes:
        without: samples that hold no image.
        beside: endings of images that were left out because another one of their sample was taken.
        split: samples with several images and dots in their names; each counts as its own image.
        links: members that are links to others.
        sparse: members that are stored without their runs of zeros.
        hidden: images whose name begins with a dot.
        unread: shards that cannot be read, and why.
    """

    without: int = 0
    beside: Counter[str] = field(default_factory=Counter)
    split: int = 0
    links: int = 0
    sparse: int = 0
    hidden: int = 0
    unread: list[str] = field(default_factory=list)

    def notes(self) -> tuple[str, ...]:
        """Return one sentence for each of these that is not zero."""
        kinds = ", ".join(f"{ending} ×{n:,}" for ending, n in self.beside.most_common(5))
        counted = {
            f"{self.without:,} samples of the shards hold no image.": self.without,
            f"{self.beside.total():,} images are left out, because their sample holds a plainer "
            f"one ({kinds}).": self.beside.total(),
            f"{self.split:,} samples hold several images with dots in their names; each counts "
            "as an image of its own.": self.split,
            f"{self.links:,} members of the shards are links and left out.": self.links,
            f"{self.sparse:,} members of the shards are sparse files and left out; pack them "
            "without --sparse.": self.sparse,
            f"{self.hidden:,} hidden images (.…) are left out.": self.hidden,
            f"{len(self.unread):,} shards cannot be read; each counts as one failed image "
            f"({'; '.join(self.unread[:3])}).": len(self.unread),
        }
        return tuple(without_surrogates(note) for note, n in counted.items() if n)


class TarShardImages(ImageSource):
    """Samples of uncompressed tar files, in the order of the shards and of their members.

    Neighbouring members with the same path up to the first dot of the file name form one sample:
    an image and its sidecars: `.cls` or `.label` (label), `.txt` or `.caption` (caption), `.json`
    (both). Of `0.jpg` and `0.depth.png`, the image is the one whose entire ending is an image's;
    the other is left out and counted, unless it has sidecars of its own (`0.depth.txt`). If no
    image has such an ending, as with `v1.0.jpg` and `v1.1.jpg`, each is an image of its own, with
    the sidecars of its own name or otherwise those of the sample. The id is `SHARD/KEY`.

    A truncated or damaged shard gives what can be read; the rest counts as one image that fails,
    like any broken image, with the place of the damage as the reason.

    Args:
        pattern: paths with `{000..127}`, `{a,b}` or `*`, or a folder of `.tar` files; several are
            separated by `::`.

    Raises:
        UserError: a shard is missing, or there are no images, e.g. because no shard is a plain tar.
    """

    def __init__(self, pattern: str) -> None:
        self._shards = _find_shards(pattern)
        absolute = (
            part if part.startswith("{/") else str(path_of(part).expanduser().absolute())
            for part in pattern.split("::")
        )
        self.spec = without_surrogates("webdataset:" + "::".join(absolute))
        names = _shard_names(self._shards)
        left_out = _LeftOut()
        samples = [
            sample
            for number, shard in enumerate(self._shards)
            for sample in _samples_of(number, shard, left_out, alone=len(self._shards) == 1)
        ]
        self._samples = [s for s in samples if s.image is not None or s.damage is not None]
        left_out.without = len(samples) - len(self._samples)
        if not any(sample.image for sample in self._samples):
            why = f" {left_out.unread[0]}." if left_out.unread else ""
            raise UserError(
                f"{pattern}: {len(self._shards):,} shards with {left_out.without:,} samples hold "
                f"no images ({' '.join(sorted(SUFFIXES))}).{why}"
            )
        copies: Counter[str] = Counter()
        taken: set[str] = set()
        for sample in self._samples:
            key = sample.id = without_surrogates(f"{names[sample.shard]}/{sample.key}")
            while sample.id in taken:
                copies[key] += 1
                sample.id = f"{key}~{copies[key] + 1}"
            taken.add(sample.id)
        self.notes = left_out.notes()
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
        if sample.damage is not None or sample.image is None:
            raise ImageError(sample.damage or "no image")
        offset, size = sample.image
        check_bytes(size)
        return decode_image(self._read(sample.shard, offset, size), min_side)

    def fingerprint(self) -> str:
        """Hash the shards' names, sizes and modification times."""
        digest = hashlib.sha256()
        for name, shard in zip(_shard_names(self._shards), self._shards, strict=True):
            status = shard.stat()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _annotations(self, sample: _Sample) -> tuple[str | None, tuple[str, ...]]:
        if sample.damage is not None:
            return None, ()
        found = {}
        for ending in SIDECARS:
            if ending in sample.sidecars:
                offset, size = sample.sidecars[ending]
                if not too_large(sample.id, ending, size):
                    found[ending] = self._read(sample.shard, offset, size)
        return read_sidecars(sample.id, found)

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        try:
            if self._open is None or self._open[0] != shard:
                if self._open is not None:
                    self._open[1].close()
                self._open = (shard, self._shards[shard].open("rb"))
            # pread does not move the file position, which forked workers would share.
            return os.pread(self._open[1].fileno(), size, offset)
        except OSError as error:
            raise ImageError(f"its shard cannot be read ({error.strerror or error})") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}


def expand_braces(pattern: str) -> list[str]:
    """Expand `"a-{00..02}.{x,y}"` to the six names; ranges are padded as written."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    bounds = _RANGE.match(match[1])
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        if last < first or last - first >= MAX_SHARDS:
            raise UserError(
                f"{pattern}: {{{match[1]}}} is not an ascending range of at most 100,000 numbers."
            )
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
        name = str(path_of(name).expanduser())
        if Path(name).is_dir():
            found = sorted(path for path in Path(name).glob("*.tar") if path.name[0] != ".")
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
    return [without_surrogates(shard.relative_to(root).as_posix()) for shard in shards]


def _samples_of(number: int, shard: Path, left_out: _LeftOut, alone: bool) -> list[_Sample]:
    """List a shard's samples; one unreadable shard among several becomes a sample that fails."""
    try:
        groups = _scan(shard, left_out)
    except UserError as error:
        if alone:
            raise
        left_out.unread.append(str(error).removesuffix("."))
        return [_Sample(number, "(damaged)", damage=str(error))]
    return [sample for group in groups for sample in _split(number, group, left_out)]


def _scan(shard: Path, left_out: _LeftOut) -> list[_Group]:
    """List a shard's members from their headers alone; damage becomes a group that fails."""
    size = shard.stat().st_size
    groups: list[_Group] = []
    try:
        with tarfile.open(shard, mode="r:") as archive:
            damage = None
            try:
                for member in archive:
                    _add(groups, member, size, left_out)
            except (tarfile.TarError, EOFError, ValueError) as error:
                damage = f"the shard is damaged at byte {min(archive.offset, size):,} ({error})"
            damage = damage or _bad_end(shard, archive.offset, size)
    except (tarfile.TarError, EOFError) as error:
        hint = "It is compressed: unpack it." if _starts_gzip(shard) else "Expected a plain tar."
        raise UserError(f"{shard}: cannot be read as a tar file ({error}). {hint}") from error
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror or error}).") from error
    if damage is not None and not any(group.damage for group in groups):
        groups.append(_Group("(damaged)", damage=f"{damage}; what came after it is lost"))
    return groups


def _add(groups: list[_Group], member: tarfile.TarInfo, size: int, left_out: _LeftOut) -> None:
    if not member.isreg() or member.issparse():
        left_out.links += member.islnk() or member.issym()
        left_out.sparse += member.issparse()
        return
    path = PurePosixPath(member.name)
    stem, _, ending = path.name.partition(".")
    ending = ending.lower()
    is_image = f".{ending.rpartition('.')[2]}" in SUFFIXES
    if not stem:  # hidden files, and the ._ twins that macOS adds
        left_out.hidden += is_image
        return
    key = (path.parent / stem).as_posix()
    if not groups or groups[-1].key != key:
        groups.append(_Group(key))
    group = groups[-1]
    place = (member.offset_data, member.size)
    if is_image and ending not in group.images:
        group.images[ending] = place
    elif is_image:
        left_out.beside[ending] += 1
    else:
        group.sidecars.setdefault(ending, place)
    if member.offset_data + member.size > size:
        group.damage = f"the shard is cut off at byte {size:,}, inside {member.name}"


def _split(number: int, group: _Group, left_out: _LeftOut) -> list[_Sample]:
    """Return the samples of a group: one, unless the dots belong to file names."""
    plain = [ending for ending in group.images if "." not in ending]
    dotted = {ending: ending.rpartition(".")[0] for ending in group.images if "." in ending}
    own = {name: _own_sidecars(group, name) for name in dotted.values()}
    if plain:  # a depth map has no caption of its own; an image with a dotted name has
        left_out.beside.update(plain[1:])
        left_out.beside.update(ending for ending, name in dotted.items() if not own[name])
        dotted = {ending: name for ending, name in dotted.items() if own[name]}
    samples: dict[str, _Sample] = {}
    if plain or not group.images:
        image = group.images[plain[0]] if plain else None
        samples[""] = _Sample(number, group.key, image, group.sidecars)
    several = len(dotted) + bool(plain) > 1
    left_out.split += several
    for ending, name in dotted.items():
        if name in samples:
            left_out.beside[ending] += 1
            continue
        key = f"{group.key}.{name}" if several else group.key
        sidecars = own[name] if plain else group.sidecars | own[name]
        samples[name] = _Sample(number, key, group.images[ending], sidecars)
    found = list(samples.values())
    found[-1].damage = group.damage
    return found


def _own_sidecars(group: _Group, name: str) -> dict[str, Place]:
    """Return `1.txt` and other sidecars of the image `1.jpg` in a group."""
    return {
        rest.removeprefix(f"{name}."): place
        for rest, place in group.sidecars.items()
        if rest.removeprefix(f"{name}.") in SIDECARS and rest.startswith(f"{name}.")
    }


def _bad_end(shard: Path, offset: int, size: int) -> str | None:
    """Check the end mark: tarfile takes a damaged header for the end, which is a block of zeros."""
    with shard.open("rb") as file:
        file.seek(offset)
        block = file.read(_BLOCK)
        behind = file.read(_BEHIND)
    if len(block) < _BLOCK:
        return f"the shard is cut off at byte {size:,} (it has no end mark)"
    if any(block):
        return f"the shard is damaged at byte {offset:,} (no header there)"
    if any(behind):
        return f"the shard has more after its end mark at byte {offset:,} (joined tar files?)"
    return None


def _starts_gzip(shard: Path) -> bool:
    with shard.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"
