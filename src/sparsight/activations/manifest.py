"""How a store describes itself: which model, which images, which shards."""

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
"""Version 1 lacks the checksums of manifest and journal; it is read and continued."""
MANIFEST = "manifest.json"
IMAGES = "images.parquet"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STATES = ("incomplete", "complete")
CHECKSUM = "checksum"

M = TypeVar("M")

# The same extraction may be continued from another folder, with another batch size; widths and
# counts follow from the rest.
_NO_IDENTITY = {
    "": ("d_in", "n_tokens", "batch_size", "shard_images", "state", "shards", "failed", "files"),
    "model": ("id", "revision"),
    "images": ("spec",),
}


@dataclass(frozen=True)
class Shard:
    """Images `first` to `stop` − 1 of the source, `n_images` of which could be read.

    Attributes:
        first: the first image of the source.
        stop: the image after the last.
        n_images: number of images that were read.
        sha256: checksum of each site's file, in hex.
        n_bytes: size of each site's file.
        journal: SHA-256 of its files in the journal, by ending, until the store is complete.
        unfinished: whether the extraction stopped within the shard; a continued one fills it. The
            names of its files then say how far it reaches.
    """

    first: int
    stop: int
    n_images: int
    sha256: dict[str, str]
    n_bytes: dict[str, int]
    journal: dict[str, str] = field(default_factory=dict)
    unfinished: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return what `manifest.json` says about it."""
        values = dataclasses.asdict(self)
        for name in ("journal", "unfinished"):
            if not values[name]:
                del values[name]
        return values


@dataclass(frozen=True)
class Manifest:
    """Everything that identifies a store, and its shards so far.

    Attributes:
        model: id, revision, family and weight hash.
        preprocessing: the model's description of it.
        images: spec, fingerprint and number of the images.
        sites: canonical names.
        tokens: which positions.
        dtype: dtype of the stored activations.
        d_in: width of each site's vectors.
        n_tokens: number of vectors per image at each site.
        batch_size: number of images per forward pass; the last bits of activations depend on it.
        shard_images: number of images of the source per shard.
        state: "incomplete" until the last shard is written.
        shards: in the order of the images.
        failed: number of images that could not be read.
        files: SHA-256 of the other files, by path, once the store is complete.
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
            # Sites are names of folders: none may lead out of the store.
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
        """The number of images whose activations are stored."""
        return sum(shard.n_images for shard in self.shards)

    @property
    def done(self) -> int:
        """The number of images of the source that the shards cover, including failed ones."""
        return self.shards[-1].stop if self.shards else 0

    @property
    def whole_shards(self) -> tuple[Shard, ...]:
        """The shards without the last one if that is unfinished."""
        return tuple(shard for shard in self.shards if not shard.unfinished)

    def identity(self) -> dict[str, Any]:
        """Return what two stores must share to be parts of one extraction."""
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
            UserError: there is no manifest, it has another format, or it contradicts itself.
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
    """Return the JSON of a manifest; a program wrote it, so if it is unreadable, it is damaged.

    Args:
        path: the manifest, which exists.
        again: what to do if it is damaged, as a sentence.

    Raises:
        SparsightError: it cannot be read.
    """
    try:
        return read_json(path)
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # it may be intact, but not readable by this user
            raise
        raise SparsightError(f"{error} {again}") from error


def checked_manifest(
    kind: type[M],
    path: Path,
    values: dict[str, Any],
    compute: Callable[[dict[str, Any]], str] | None,
    again: str,
) -> M:
    """Build a manifest from its values, after comparing its own checksum.

    Args:
        kind: class of the manifest.
        path: its file.
        values: the values in it.
        compute: computes the checksum of the values; None for formats without one.
        again: what to do if it is damaged, as a sentence.

    Raises:
        UserError: a value is invalid.
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
    """Hash what no other checksum covers; an altered checksum is noticed at its own file."""
    shards = [
        {**shard, **{name: sorted(shard.get(name, ())) for name in ("sha256", "journal")}}
        for shard in values.get("shards", ())
    ]
    rest = {name: value for name, value in values.items() if name not in ("state", CHECKSUM)}
    return checksum_of({**rest, "shards": shards, "files": sorted(values.get("files", ()))})


def describe_model(model: VisionModel) -> dict[str, Any]:
    """Return what distinguishes one model's activations from another's, without preprocessing."""
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
    """Return the path of a site's shard; `until` is the `stop` of an unfinished one."""
    return folder / site / f"shard-{shard_name(number, until)}.safetensors"


def shard_name(number: int, until: int | None = None) -> str:
    """Return the name that a shard's files share; an unfinished shard's says how far it reaches.

    So a shard that grows never replaces the file that the manifest still names.
    """
    return f"{number:05d}" if until is None else f"{number:05d}-until-{until:08d}"


def stats_path(folder: Path, site: str) -> Path:
    """Return the path of a site's statistics."""
    return folder / site / "stats.safetensors"
