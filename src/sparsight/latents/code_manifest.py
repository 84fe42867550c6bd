"""`CodeManifest`: what codes on disk say of themselves, and where their shards lie."""

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
"""Version 1 has no checksum of the manifest; it is read and continued."""
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
        n_images: images in it.
        last_image: place in the source of the last of them.
        n_active: active latents of all its vectors together.
        sha256: of the file, in hex.
        n_bytes: of the file.
        unfinished: the encoding stopped within the shard; a continued one fills it up. The name of
            its file tells how far it reaches.
    """

    n_images: int
    last_image: int
    n_active: int
    sha256: str
    n_bytes: int
    unfinished: bool = False

    def as_dict(self) -> dict[str, Any]:
        """What `manifest.json` says of it."""
        values = dataclasses.asdict(self)
        if not self.unfinished:
            del values["unfinished"]
        return values


@dataclass(frozen=True)
class CodeManifest:
    """Everything that identifies codes on disk, and their shards so far.

    Attributes:
        sae: `hash` of its parameters, `n_latents`, `d_in`.
        activations: fingerprint of the activations that were encoded.
        model: id, revision, hash of the weights, preprocessing, …, as the activations tell.
        images: spec, fingerprint and number of the images, failed ones included.
        site: where in the model.
        tokens: which positions.
        n_tokens: vectors of an image.
        dtype: of the values on disk, "float32" or "float16".
        batch_images: images that were encoded together; the last bits of values depend on it.
        shard_bytes: a shard ends with the batch that brings it to this size.
        state: "incomplete" until the last shard is written.
        shards: in the order of the images.
        files: SHA-256 of the other files, by name; empty in codes of earlier versions.
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
            raise UserError("sae must give hash, n_latents and d_in.")
        if {"spec", "fingerprint", "n_images"} - set(self.images):
            raise UserError("images must give spec, fingerprint and n_images.")
        last = -1
        for number, shard in enumerate(self.shards):
            if shard.n_images < 1 or shard.last_image < last + shard.n_images or shard.n_active < 0:
                raise UserError(f"shards[{number}] does not follow the one before it.")
            is_last = number + 1 == len(self.shards)
            if shard.unfinished and (not is_last or self.state == "complete"):
                raise UserError(f"shards[{number}] is unfinished, and not the last of its codes.")
            last = shard.last_image
        if last >= self.images["n_images"]:
            raise UserError(f"shards reach image {last} of {self.images['n_images']:,}.")

    @property
    def n_latents(self) -> int:
        """Number of latents of the SAE."""
        return int(self.sae["n_latents"])

    @property
    def n_images(self) -> int:
        """Images whose codes are written."""
        return sum(shard.n_images for shard in self.shards)

    @property
    def whole_shards(self) -> tuple[CodeShard, ...]:
        """The shards without the last, if that is unfinished."""
        return tuple(shard for shard in self.shards if not shard.unfinished)

    @property
    def index_dtype(self) -> torch.dtype:
        """In which the active latents are written: uint16 where it holds them all, else int32."""
        return torch.uint16 if self.n_latents <= _UINT16_LATENTS else torch.int32

    def identity(self) -> dict[str, Any]:
        """What two encodings must share to be parts of one."""
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
        """Shape and type of each tensor of a shard, in the order of the file."""
        entries = {
            "values": ((shard.n_active,), DTYPES[self.dtype]),
            "indices": ((shard.n_active,), self.index_dtype),
        }
        return {
            "offsets": ((shard.n_images * self.n_tokens + 1,), torch.int64),
            "image_indices": ((shard.n_images,), torch.int64),
            "n_active": ((self.n_latents,), torch.int64),
            # Wider types first, so that each tensor begins at a multiple of its width.
            **dict(sorted(entries.items(), key=lambda entry: -entry[1][1].itemsize)),
        }

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, whole or not at all."""
        values = to_dict(self)
        values["shards"] = [shard.as_dict() for shard in self.shards]
        head = {"format": FORMAT, "format_version": VERSION}
        write_json(folder / MANIFEST, {**head, **values, CHECKSUM: _checksum(values)})

    @classmethod
    def read(cls, folder: Path) -> CodeManifest:
        """Read and check `manifest.json`.

        Raises:
            UserError: there is none, or it is of another format, or contradicts itself.
            SparsightError: it has been altered since it was written.
        """
        path = folder / MANIFEST
        if not path.exists():
            raise UserError(f"{folder}: holds no codes (it has no {MANIFEST}).")
        values = read_manifest(path, AGAIN)
        if values.pop("format", None) != FORMAT:
            raise UserError(f"{path}: is no manifest of codes. Make some with `sparsight encode`.")
        version = values.pop("format_version", None)
        if version not in range(1, VERSION + 1):
            raise UserError(
                f"{path}: format_version is {version!r}; this Sparsight reads 1 to {VERSION}. "
                "Read it with the Sparsight that wrote it. If it was damaged: "
                f"{AGAIN[0].lower()}{AGAIN[1:]}"
            )
        return checked_manifest(cls, path, values, _checksum if version > 1 else None, AGAIN)


def shard_path(folder: Path, number: int, shard: CodeShard | None = None) -> Path:
    """Where a shard lies; the name of an unfinished one tells how far it reaches.

    A shard that grows thereby never takes the place of the file that the manifest still names.
    """
    until = f"-until-{shard.last_image:08d}" if shard is not None and shard.unfinished else ""
    return folder / f"shard-{number:05d}{until}.safetensors"


def _checksum(values: dict[str, Any]) -> str:
    """Covers what no other checksum does; an altered checksum is noticed at its own file."""
    shards = [{**shard, "sha256": None} for shard in values.get("shards", ())]
    rest = {name: value for name, value in values.items() if name not in ("state", CHECKSUM)}
    return checksum_of({**rest, "shards": shards})


def _positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0
