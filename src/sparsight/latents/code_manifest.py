"""`CodeManifest`: what codes on disk record about themselves, and where their shards are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsight.activations.manifest import CHECKSUM, checked_manifest, read_manifest
from sparsight.config import check_positive, to_dict
from sparsight.errors import UserError
from sparsight.files import checksum_of, write_json

FORMAT = "sparsight codes"
VERSION = 2
"""Version 1 has no checksum of the manifest; it can be read and continued."""
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
STATES = ("incomplete", "complete")
AGAIN = "Remove the codes and encode again."
_NOT_IDENTITY = ("batch_images", "shard_bytes", "state", "shards", "files")
_UINT16_LATENTS = 1 << 16


@dataclass(frozen=True)
class CodeShard:
    """One file of codes.

    Attributes:
        n_images: number of images in it.
        last_image: place of the last of them in the source.
        n_active: number of active latents, summed over its vectors.
        sha256: SHA-256 of the file, in hex.
        n_bytes: size of the file.
        unfinished: whether the encoding stopped within the shard; the next call fills it. Its file
            name says how far it reaches.
    """

    n_images: int
    last_image: int
    n_active: int
    sha256: str
    n_bytes: int
    unfinished: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return its entry in `manifest.json`."""
        values = dataclasses.asdict(self)
        if not self.unfinished:
            del values["unfinished"]
        return values


@dataclass(frozen=True)
class CodeManifest:
    """Everything that identifies codes on disk, and their shards so far.

    Attributes:
        sae: `hash` of its parameters, `n_latents`, `d_in`.
        activations: fingerprint of the encoded activations.
        model: id, revision, hash of the weights, preprocessing, …, as recorded with the
            activations.
        images: spec, fingerprint and number of the images, failed ones included.
        site: site in the model.
        tokens: the positions read.
        n_tokens: vectors per image.
        dtype: type of the values on disk, "float32" or "float16".
        batch_images: images per encoded batch; the last bits of values depend on it.
        shard_bytes: a shard ends with the batch that brings it to this size.
        state: "incomplete" until the last shard is written.
        shards: the shards, in the order of the images.
        files: SHA-256 of the other files, by name; empty in codes from earlier versions.
    """

    sae: dict[str, Any]
    activations: str
    model: dict[str, Any]
    images: dict[str, Any]
    site: str
    tokens: str
    n_tokens: int
    dtype: str
    batch_images: int
    shard_bytes: int
    state: str = "incomplete"
    shards: tuple[CodeShard, ...] = ()
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in {"dtype": DTYPES, "state": STATES}.items():
            if getattr(self, name) not in choices:
                known = ", ".join(choices)
                raise UserError(f"{name} is {getattr(self, name)!r}; known: {known}.")
        check_positive(
            n_tokens=self.n_tokens, batch_images=self.batch_images, shard_bytes=self.shard_bytes
        )
        if {"hash", "n_latents", "d_in"} - set(self.sae) or not _positive(self.sae["n_latents"]):
            raise UserError("sae must have hash, n_latents and d_in.")
        if {"spec", "fingerprint", "n_images"} - set(self.images):
            raise UserError("images must have spec, fingerprint and n_images.")
        last = -1
        for number, shard in enumerate(self.shards):
            if shard.n_images < 1 or shard.last_image < last + shard.n_images or shard.n_active < 0:
                raise UserError(f"shards[{number}] does not follow the one before it.")
            is_last = number + 1 == len(self.shards)
            if shard.unfinished and (not is_last or self.state == "complete"):
                raise UserError(f"shards[{number}] is unfinished, but not the last.")
            last = shard.last_image
        if last >= self.images["n_images"]:
            raise UserError(
                f"shards go up to image {last}, but there are only {self.images['n_images']:,}."
            )

    @property
    def n_latents(self) -> int:
        """Number of latents of the SAE."""
        return int(self.sae["n_latents"])

    @property
    def n_images(self) -> int:
        """Number of images whose codes are written."""
        return sum(shard.n_images for shard in self.shards)

    @property
    def whole_shards(self) -> tuple[CodeShard, ...]:
        """The shards without the last one if that is unfinished."""
        return tuple(shard for shard in self.shards if not shard.unfinished)

    @property
    def index_dtype(self) -> torch.dtype:
        """The type of the latents' numbers on disk: uint16 if all fit, else int32."""
        return torch.uint16 if self.n_latents <= _UINT16_LATENTS else torch.int32

    def identity(self) -> dict[str, Any]:
        """Return what two encodings must share to be parts of one."""
        values = dataclasses.asdict(self)
        for name in _NOT_IDENTITY:
            del values[name]
        # Folders may have been moved, and a model may go by another name.
        values["model"] = {
            key: value for key, value in self.model.items() if key not in ("id", "revision")
        }
        values["images"] = {k: v for k, v in self.images.items() if k != "spec"}
        return values

    def layout(self, shard: CodeShard) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and type of each tensor of a shard, in the order of the file."""
        entries = {
            "values": ((shard.n_active,), DTYPES[self.dtype]),
            "indices": ((shard.n_active,), self.index_dtype),
        }
        return {
            "offsets": ((shard.n_images * self.n_tokens + 1,), torch.int64),
            "image_indices": ((shard.n_images,), torch.int64),
            "n_active": ((self.n_latents,), torch.int64),
            # Wider types come first, so that each tensor begins at a multiple of its width.
            **dict(sorted(entries.items(), key=lambda entry: -entry[1][1].itemsize)),
        }

    def write(self, folder: Path) -> None:
        """Write `manifest.json` atomically."""
        values = to_dict(self)
        values["shards"] = [shard.as_dict() for shard in self.shards]
        head = {"format": FORMAT, "format_version": VERSION}
        write_json(folder / MANIFEST, {**head, **values, CHECKSUM: _checksum(values)})

    @classmethod
    def read(cls, folder: Path) -> CodeManifest:
        """Read and check `manifest.json`.

        Raises:
            UserError: there is no manifest, or it has another format or contradicts itself.
            SparsightError: it has been altered since it was written.
        """
        path = folder / MANIFEST
        if not path.exists():
            raise UserError(f"{folder}: holds no codes (there is no {MANIFEST}).")
        values = read_manifest(path, AGAIN)
        if values.pop("format", None) != FORMAT:
            raise UserError(
                f"{path}: is not a manifest of codes. Make codes with `sparsight encode`."
            )
        version = values.pop("format_version", None)
        if version not in range(1, VERSION + 1):
            raise UserError(
                f"{path}: format_version is {version!r}; this Sparsight reads 1 to {VERSION}. "
                "Read it with the Sparsight that wrote it. If it was damaged: "
                f"{AGAIN[0].lower()}{AGAIN[1:]}"
            )
        return checked_manifest(cls, path, values, _checksum if version > 1 else None, AGAIN)


def shard_path(folder: Path, number: int, shard: CodeShard | None = None) -> Path:
    """Return the path of a shard; the name of an unfinished one says how far it reaches.

    Thus a growing shard never replaces the file that the manifest still names.
    """
    until = f"-until-{shard.last_image:08d}" if shard is not None and shard.unfinished else ""
    return folder / f"shard-{number:05d}{until}.safetensors"


def _checksum(values: dict[str, Any]) -> str:
    """Return a checksum of what no other covers; altered checksums show at their own files."""
    shards = [{**shard, "sha256": None} for shard in values.get("shards", ())]
    rest = {name: value for name, value in values.items() if name not in ("state", CHECKSUM)}
    return checksum_of({**rest, "shards": shards})


def _positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0
