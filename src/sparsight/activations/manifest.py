"""What a store says of itself: whose activations, of which images, in which shards."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsight.config import from_dict, to_dict
from sparsight.errors import UserError
from sparsight.files import read_json, write_json
from sparsight.vision import VisionModel

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
IMAGES = "images.parquet"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STATES = ("incomplete", "complete")

# The same extraction may be continued from another folder, in other batches; widths and counts
# follow from the rest.
_NO_IDENTITY = {
    "": ("d_in", "n_tokens", "batch_size", "shard_images", "state", "shards", "failed", "files"),
    "model": ("id", "revision"),
    "images": ("spec",),
}


@dataclass(frozen=True)
class Shard:
    """Images `first` to `stop` (without) of the source; `n_images` of them were read."""

    first: int
    stop: int
    n_images: int
    sha256: dict[str, str]
    n_bytes: dict[str, int]


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
        values["shards"] = [dataclasses.asdict(shard) for shard in self.shards]
        write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, **values})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check `manifest.json`.

        Raises:
            UserError: there is none, or it is of another format, or contradicts itself.
        """
        path = folder / MANIFEST
        if not path.exists():
            raise UserError(f"{folder}: is no activation store (it has no {MANIFEST}).")
        values = read_json(path)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version is {version!r}; this Sparsight reads {FORMAT_VERSION}."
            )
        return from_dict(cls, values, str(path))


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


def shard_path(folder: Path, site: str, number: int) -> Path:
    """Where a shard of a site lies."""
    return folder / site / f"shard-{number:05d}.safetensors"


def stats_path(folder: Path, site: str) -> Path:
    """Where the statistics of a site lie."""
    return folder / site / "stats.safetensors"
