"""What a store says of itself: whose activations, of which images, in which shards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsight.config import from_dict, to_dict
from sparsight.errors import UserError
from sparsight.files import read_json, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


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
        shard_images: images of the source a shard covers.
        state: "incomplete" until the last shard is written.
        shards: in the order of the images.
        failed: images that could not be read.
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

    @property
    def n_images(self) -> int:
        """Images whose activations are stored."""
        return sum(shard.n_images for shard in self.shards)

    def identity(self) -> dict[str, Any]:
        """What two stores must share to be parts of one extraction."""
        values = dataclasses.asdict(self)
        for name in ("state", "shards", "failed"):
            del values[name]
        # The same images may be reached by another path.
        values["images"] = {k: v for k, v in self.images.items() if k != "spec"}
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
            UserError: there is none, or it is of another format.
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
        manifest = from_dict(cls, values, str(path))
        if manifest.dtype not in DTYPES:
            raise UserError(f"{path}: dtype is {manifest.dtype!r}; known: {', '.join(DTYPES)}.")
        return manifest


def shard_path(folder: Path, site: str, number: int) -> Path:
    """Where a shard of a site lies."""
    return folder / site / f"shard-{number:05d}.safetensors"
