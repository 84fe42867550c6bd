"""What a store says of itself: whose activations, of which images, in which shards."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from sparsight.activations.shards import AGAIN
from sparsight.config import from_dict, to_dict
from sparsight.errors import SparsightError, UserError
from sparsight.files import checksum_of, read_json, write_json
from sparsight.vision import VisionModel

FORMAT_VERSION = 2
"""Version 1 has no checksums of the manifest and of the journal; it is read and continued."""
MANIFEST = "manifest.json"
IMAGES = "images.parquet"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STATES = ("incomplete", "complete")
CHECKSUM = "checksum"

M = TypeVar("M")

# The same extraction may be continued from another folder, in other batches; widths and counts
# follow from the rest.
_NO_IDENTITY = {
    "": ("d_in", "n_tokens", "batch_size", "shard_images", "state", "shards", "failed", "files"),
    "model": ("id", "revision"),
    "images": ("spec",),
}


@dataclass(frozen=True)
class Shard:
    """Images `first` to `stop` (without) of the source; `n_images` of them were read.

    Attributes:
        first: first image of the source.
        stop: the image after the last.
        n_images: how many were read.
        sha256: of each site's file, in hex.
        n_bytes: of each site's file.
        journal: SHA-256 of its files in the journal, by their ending, until the store is complete.
        unfinished: the extraction stopped within the shard; a continued one fills it up. The names
            of its files tell how far it reaches.
    """

    first: int
    stop: int
    n_images: int
    sha256: dict[str, str]
    n_bytes: dict[str, int]
    journal: dict[str, str] = field(default_factory=dict)
    unfinished: bool = False

    def as_dict(self) -> dict[str, Any]:
        """What `manifest.json` says of it."""
        values = dataclasses.asdict(self)
        for name in ("journal", "unfinished"):
            if not values[name]:
                del values[name]
        return values


@dataclass(frozen=True)
class Manifest:
    """Everything that identifies a store, and its shards so far.

    Attributes:
        model: id, revision, family, hash of the weights.
        preprocessing: as the model describes it.
        images: spec, fingerprint and number of the images.
        sites: canonical names.
        tokens: which positions.
        dtype: of the stored activations.
        d_in: width of each site's vectors.
        n_tokens: vectors an image gives at each site.
        batch_size: images in a forward pass; the last bits of activations depend on it.
        shard_images: images of the source that a shard covers.
        state: "incomplete" until the last shard is written.
        shards: in the order of the images.
        failed: images that could not be read.
        files: SHA-256 of the other files, by path; there once the store is complete.
    """

    model: dict[str, Any]
    preprocessing: dict[str, Any]
    images: dict[str, Any]
    sites: tuple[str, ...]
    tokens: str
    dtype: str
    d_in: dict[str, int]
    n_tokens: dict[str, int]
    batch_size: int
    shard_images: int
    state: str = "incomplete"
    shards: tuple[Shard, ...] = ()
    failed: int = 0
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype is {self.dtype!r}; known: {', '.join(DTYPES)}.")
        if self.state not in STATES:
            raise UserError(f"state is {self.state!r}; known: {', '.join(STATES)}.")
        if not self.sites:
            raise UserError("sites is empty.")
        for site in self.sites:
            # Sites name folders: nothing may lead out of the store.
            if not re.fullmatch(r"\w[\w.]*", site):
                raise UserError(f"sites: {site!r} is not the name of a site.")
            for name in ("d_in", "n_tokens"):
                if getattr(self, name).get(site, 0) < 1:
                    raise UserError(f"{name} gives no positive number for {site}.")
        if {"spec", "fingerprint", "n_images"} - set(self.images):
            raise UserError("images must give spec, fingerprint and n_images.")
        self._check_shards()

    def _check_shards(self) -> None:
        reached = 0
        for number, shard in enumerate(self.shards):
            if shard.first != reached or not 0 <= shard.n_images <= shard.stop - shard.first:
                raise UserError(f"shards[{number}] does not follow the one before it.")
            if {*shard.sha256} != {*self.sites} or {*shard.n_bytes} != {*self.sites}:
                raise UserError(f"shards[{number}] must give sha256 and n_bytes of each site.")
            last = number + 1 == len(self.shards)
            if shard.unfinished and (not last or self.state == "complete"):
                raise UserError(f"shards[{number}] is unfinished, and not the last of a store.")
            reached = shard.stop
        total = self.images["n_images"]
        if reached > total or (self.state == "complete" and reached != total):
            raise UserError(f"shards cover {reached:,} images of {total:,}.")

    @property
    def n_images(self) -> int:
        """Images whose activations are stored."""
        return sum(shard.n_images for shard in self.shards)

    @property
    def done(self) -> int:
        """Images of the source that shards cover, failed ones included."""
        return self.shards[-1].stop if self.shards else 0

    @property
    def whole_shards(self) -> tuple[Shard, ...]:
        """The shards without the last, if that is unfinished."""
        return tuple(shard for shard in self.shards if not shard.unfinished)

    def identity(self) -> dict[str, Any]:
        """What two stores must share to be parts of one extraction."""
        values = dataclasses.asdict(self)
        for part, names in _NO_IDENTITY.items():
            inside = values[part] if part else values
            for name in names:
                inside.pop(name, None)
        values["sites"] = list(self.sites)
        return values

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, whole or not at all."""
        values = to_dict(self)
        values["shards"] = [shard.as_dict() for shard in self.shards]
        values = {"format_version": FORMAT_VERSION, **values, CHECKSUM: _checksum(values)}
        write_json(folder / MANIFEST, values)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check `manifest.json`.

        Raises:
            UserError: there is none, or it is of another format, or contradicts itself.
            SparsightError: it has been altered since it was written.
        """
        path = folder / MANIFEST
        if not path.exists():
            raise UserError(f"{folder}: is no activation store (it has no {MANIFEST}).")
        values = read_manifest(path, AGAIN)
        version = values.pop("format_version", None)
        if version not in range(1, FORMAT_VERSION + 1):
            raise UserError(
                f"{path}: format_version is {version!r}; this Sparsight reads 1 to "
                f"{FORMAT_VERSION}. Read it with the Sparsight that wrote it. If it was damaged: "
                f"{AGAIN[0].lower()}{AGAIN[1:]}"
            )
        return checked_manifest(cls, path, values, _checksum if version > 1 else None, AGAIN)


def read_manifest(path: Path, again: str) -> dict[str, Any]:
    """The JSON of a manifest that a program wrote: unreadable, it was damaged.

    Args:
        path: of the manifest, which is there.
        again: what to do where it is damaged, as a sentence.

    Raises:
        SparsightError: it cannot be read.
    """
    try:
        return read_json(path)
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # it may be whole, and only not be ours to read
            raise
        raise SparsightError(f"{error} {again}") from error


def checked_manifest(
    kind: type[M],
    path: Path,
    values: dict[str, Any],
    compute: Callable[[dict[str, Any]], str] | None,
    again: str,
) -> M:
    """What the values of a manifest make, its own checksum compared.

    Args:
        kind: of the manifest.
        path: of its file.
        values: in it.
        compute: the checksum of the values; None for formats without one.
        again: what to do where it is damaged, as a sentence.

    Raises:
        UserError: a value makes no sense.
        SparsightError: the checksum differs.
    """
    checksum = values.pop(CHECKSUM, None)
    try:
        manifest = from_dict(kind, values, str(path))
    except UserError as error:
        raise UserError(f"{error} {again}") from error
    if compute is not None and checksum != compute(values):
        raise SparsightError(f"{path}: has been altered (its checksum differs). {again}")
    return manifest


def _checksum(values: dict[str, Any]) -> str:
    """Covers what no other checksum does; an altered checksum is noticed at its own file."""
    shards = [
        {**shard, **{name: sorted(shard.get(name, ())) for name in ("sha256", "journal")}}
        for shard in values.get("shards", ())
    ]
    rest = {name: value for name, value in values.items() if name not in ("state", CHECKSUM)}
    return checksum_of({**rest, "shards": shards, "files": sorted(values.get("files", ()))})


def describe_model(model: VisionModel) -> dict[str, Any]:
    """What tells one model's activations from another's, preprocessing apart."""
    return {
        "id": model.id,
        "revision": model.revision,
        "family": model.family,
        "weights_hash": model.weights_hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "patch_grid": list(model.patch_grid),
        "n_prefix": model.n_prefix,
        "n_blocks": model.n_blocks,
    }


def shard_path(folder: Path, site: str, number: int, until: int | None = None) -> Path:
    """Where a shard of a site lies; `until` is the `stop` of an unfinished one."""
    return folder / site / f"shard-{shard_name(number, until)}.safetensors"


def shard_name(number: int, until: int | None = None) -> str:
    """What the files of a shard are named after: an unfinished one also after how far it reaches.

    A shard that grows thereby never takes the place of the file that the manifest still names.
    """
    return f"{number:05d}" if until is None else f"{number:05d}-until-{until:08d}"


def stats_path(folder: Path, site: str) -> Path:
    """Where the statistics of a site lie."""
    return folder / site / "stats.safetensors"
