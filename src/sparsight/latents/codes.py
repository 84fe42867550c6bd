"""`CodeStore`: the sparse codes of all images on disk, read through memory maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from sparsight.activations.manifest import CHECKSUM, IMAGES, checked_manifest, read_manifest
from sparsight.activations.shards import (
    check_size,
    check_sum,
    check_sums,
    map_tensors,
    write_tensors,
)
from sparsight.config import check_positive, to_dict
from sparsight.errors import SparsightError, UserError
from sparsight.files import checksum_of, write_json
from sparsight.images import ImageSource, reopen_images
from sparsight.notebooks import html_table
from sparsight.sae import SparseAutoencoder, SparseCode

FORMAT = "sparsight codes"
VERSION = 2
"""Version 1 has no checksum of the manifest; it is read and continued."""
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
STATES = ("incomplete", "complete")
AGAIN = "Remove the codes and encode again."
SMALLEST_FLOAT16 = 2.0**-24

_NOT_IDENTITY = ("batch_images", "shard_bytes", "state", "shards", "files")
_UINT16_LATENTS = 1 << 16


@dataclass(frozen=True)
class CodeBatch:
    """Codes of some images, in order.

    Attributes:
        image_indices: places of the images in their source.
        code: `len(image_indices) × n_tokens` rows, an image's tokens together; float32.
        n_tokens: rows of an image.
    """

    image_indices: Int[Tensor, " batch"]
    code: SparseCode
    n_tokens: int

    @classmethod
    def joined(cls, batches: Sequence[CodeBatch]) -> CodeBatch:
        """Batches that follow each other as one."""
        codes = [batch.code for batch in batches]
        l0 = torch.cat([code.l0 for code in codes])
        code = SparseCode(
            torch.cat([code.indices for code in codes]),
            torch.cat([code.values for code in codes]),
            torch.cat([l0.new_zeros(1), l0.cumsum(0)]),
            codes[0].n_latents,
        )
        images = torch.cat([batch.image_indices for batch in batches])
        return cls(images, code, batches[0].n_tokens)


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


def _checksum(values: dict[str, Any]) -> str:
    """Covers what no other checksum does; an altered checksum is noticed at its own file."""
    shards = [{**shard, "sha256": None} for shard in values.get("shards", ())]
    rest = {name: value for name, value in values.items() if name not in ("state", CHECKSUM)}
    return checksum_of({**rest, "shards": shards})


def shard_path(folder: Path, number: int, shard: CodeShard | None = None) -> Path:
    """Where a shard lies; the name of an unfinished one tells how far it reaches.

    A shard that grows thereby never takes the place of the file that the manifest still names.
    """
    until = f"-until-{shard.last_image:08d}" if shard is not None and shard.unfinished else ""
    return folder / f"shard-{number:05d}{until}.safetensors"


class ShardBuffer:
    """Batches of codes that become the next shard, in the types of the file.

    Args:
        manifest: of the codes.

    Attributes:
        n_bytes: that they will take on disk, roughly.
        n_images: whose codes are in.
    """

    def __init__(self, manifest: CodeManifest) -> None:
        self.n_bytes = 0
        self.n_images = 0
        self._dtypes = {"values": DTYPES[manifest.dtype], "indices": manifest.index_dtype}
        self._n_latents = manifest.n_latents
        self._parts: list[dict[str, Tensor]] = []  # whole batches, wherever a stop comes

    def add(self, batch: CodeBatch) -> None:
        """Put a batch behind the ones that are in.

        Raises:
            SparsightError: an activation is beyond the range of the values on disk.
        """
        code = batch.code
        indices, values = code.indices.cpu(), code.values.cpu().to(self._dtypes["values"])
        if values.dtype == torch.float16:
            if not bool(values.isfinite().all()):
                images = batch.image_indices
                strongest = float(code.values[code.values.abs().argmax()])
                raise SparsightError(
                    f"Activations up to {strongest:.3g} do not fit float16, which ends at ±65504 "
                    f"(images {int(images[0])} to {int(images[-1])}). Encode with dtype float32."
                )
            # What is active stays active, with its sign.
            least = torch.full_like(values, SMALLEST_FLOAT16).copysign(values)
            values = torch.where(values == 0, least, values)
        new = {
            "image_indices": batch.image_indices.cpu().long(),
            "l0": code.l0.cpu(),
            "values": values,
            "indices": indices.to(self._dtypes["indices"]),
        }
        self._append(new)

    def restore(self, folder: Path, manifest: CodeManifest) -> None:
        """Put back what a stopped encoding left of the last shard.

        Raises:
            SparsightError: it is damaged.
        """
        number, shard = len(manifest.whole_shards), manifest.shards[-1]
        path = shard_path(folder, number, shard)
        stored = map_tensors(path, manifest.layout(shard), shard.n_bytes, AGAIN)
        check_sum(path, shard.sha256, AGAIN)
        part = {name: stored[name].clone() for name in ("image_indices", "values", "indices")}
        self._append({**part, "l0": stored["offsets"].diff()})

    def write(
        self, folder: Path, manifest: CodeManifest, *, unfinished: bool = False
    ) -> CodeManifest:
        """Write the next shard, then the manifest that names it.

        Args:
            folder: of the codes.
            manifest: of what is there.
            unfinished: the shard is not full: more will be put in, by this encoding or the next.

        Returns:
            The manifest with the shard in it.

        Raises:
            SparsightError: the disk is full.
        """
        tensors = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        tensors["n_active"] = torch.zeros(self._n_latents, dtype=torch.int64)
        for part in self._parts:
            found = torch.bincount(part["indices"].long(), minlength=self._n_latents)
            tensors["n_active"] += found
        counts = tensors.pop("l0").long()
        tensors["offsets"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        images = tensors["image_indices"]
        n_active = len(tensors["values"])
        shard = CodeShard(len(images), int(images[-1]), n_active, "", 0, unfinished)
        path = shard_path(folder, len(manifest.whole_shards), shard)
        sha256 = write_tensors(path, {name: tensors[name] for name in manifest.layout(shard)})
        shard = dataclasses.replace(shard, sha256=sha256, n_bytes=path.stat().st_size)
        grown = dataclasses.replace(manifest, shards=(*manifest.whole_shards, shard))
        grown.write(folder)
        if manifest.shards and manifest.shards[-1].unfinished:
            old = shard_path(folder, len(manifest.whole_shards), manifest.shards[-1])
            if old != path:
                old.unlink(missing_ok=True)
        return grown

    def _append(self, new: dict[str, Tensor]) -> None:
        self._parts.append(new)
        self.n_bytes += sum(part.numel() * part.element_size() for part in new.values())
        self.n_images += len(new["image_indices"])


class CodeStore:
    """What `encode` left in a folder.

    Lengths are compared at once; a shard's checksum when it is first read, once per process.

    Args:
        path: the folder.
        verify: read every file and compare its checksum now.

    Attributes:
        path: the folder.
        manifest: what the codes say of themselves.
        site: where in the model the SAE reads.
        tokens: "all", "patches", "cls" or "mean".
        n_tokens: vectors of an image.
        n_latents: number of latents of the SAE.
        model_info: as in `ActivationStore`.

    Raises:
        UserError: the folder holds no codes, or unfinished ones.
        SparsightError: a file is missing, cut off or altered.
    """

    def __init__(self, path: str | Path, *, verify: bool = False) -> None:
        self.path = Path(path)
        self.manifest = CodeManifest.read(self.path)
        if self.manifest.state != "complete":
            raise UserError(
                f"{self.path}: the codes are unfinished ({self.manifest.n_images:,} of "
                f"{self.manifest.images['n_images']:,} images). Encode the same again; it "
                "continues."
            )
        self.site = self.manifest.site
        self.tokens = self.manifest.tokens
        self.n_tokens = self.manifest.n_tokens
        self.n_latents = self.manifest.n_latents
        self.model_info: Mapping[str, Any] = {
            **self.manifest.model,
            "images": self.manifest.images["spec"],
        }
        counts = [0, *(shard.n_images for shard in self.manifest.shards)]
        self._starts: npt.NDArray[np.int64] = np.cumsum(counts)
        self._checked: set[int] = set()
        for number, shard in enumerate(self.manifest.shards):
            check_size(shard_path(self.path, number), shard.n_bytes, AGAIN)
        if verify:
            self.verify()

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Self:
        """The same as `CodeStore(path)`."""
        return cls(path, verify=verify)

    @property
    def n_images(self) -> int:
        """Images whose codes are here."""
        return int(self._starts[-1])

    @property
    def n_vectors(self) -> int:
        """Vectors whose codes are here."""
        return self.n_images * self.n_tokens

    @property
    def n_active(self) -> int:
        """Active latents of all vectors together."""
        return sum(shard.n_active for shard in self.manifest.shards)

    @cached_property
    def image_indices(self) -> Int64[np.ndarray, " images"]:
        """The place in the source of each image here, in order."""
        shards = range(len(self.manifest.shards))
        found = [self._map(number)["image_indices"].numpy().copy() for number in shards]
        places: npt.NDArray[np.int64] = np.concatenate(found)
        return places

    def density(self) -> Float[Tensor, " n_latents"]:
        """Share of the vectors on which each latent is active, float64; reads no code."""
        total = torch.zeros(self.n_latents, dtype=torch.int64)
        for number in range(len(self.manifest.shards)):
            total += self._map(number)["n_active"]
        return total.double() / self.n_vectors

    def ordered(self, batch_images: int = 64) -> Iterator[CodeBatch]:
        """All images once, in order, so many at a time."""
        check_positive(batch_images=batch_images)
        return (
            self._read(first, min(first + batch_images, self.n_images))
            for first in range(0, self.n_images, batch_images)
        )

    def image(self, image: int) -> SparseCode:
        """The code of one image, `n_tokens` rows.

        Args:
            image: its place in the source.

        Raises:
            UserError: there is no code of it here.
        """
        place = int(np.searchsorted(self.image_indices, image))
        if place == self.n_images or self.image_indices[place] != image:
            raise UserError(f"{self.path}: holds no code of image {image}.")
        return self._read(place, place + 1).code

    @cached_property
    def images(self) -> pa.Table | None:
        """A row per image of the source, as in `ActivationStore.images`; None where the codes are
        not of a store, or were made by an earlier version.

        Raises:
            SparsightError: the file is damaged.
        """
        path = self.path / IMAGES
        if not path.exists():
            return None
        sha256 = self.manifest.files.get(IMAGES)
        if sha256 is not None:
            check_sums([(path, sha256)], AGAIN)
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise SparsightError(f"{path}: is damaged ({error}). {AGAIN}") from error
        if table.num_rows != self.manifest.images["n_images"]:
            raise SparsightError(
                f"{path}: lists {table.num_rows:,} images, the codes are of "
                f"{self.manifest.images['n_images']:,}. {AGAIN}"
            )
        return table

    def source(self) -> ImageSource:
        """The images, opened again; `image_indices` are places in it.

        Raises:
            UserError: they are not there any more, or have changed.
        """
        about = self.manifest.images
        return reopen_images(about["spec"], about["fingerprint"], str(self.path), about["n_images"])

    def check_sae(self, sae: SparseAutoencoder) -> None:
        """Raise a `UserError` unless the codes were made with these very parameters."""
        if sae.fingerprint() != self.manifest.sae["hash"]:
            raise UserError(
                f"{self.path}: the codes are of another SAE. Encode with this one into another "
                "folder."
            )

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            SparsightError: one differs; its name is given.
        """
        for number, shard in enumerate(self.manifest.shards):
            check_sum(shard_path(self.path, number), shard.sha256, AGAIN)
        for name, sha256 in self.manifest.files.items():
            check_sum(self.path / name, sha256, AGAIN)

    def __repr__(self) -> str:
        return (
            f"CodeStore({str(self.path)!r}, {self.n_images:,} images, {self.tokens} tokens at "
            f"{self.site}, {self.n_active / max(self.n_vectors, 1):.1f} of {self.n_latents:,} "
            "latents active)"
        )

    def _repr_html_(self) -> str:
        about = self.manifest
        return html_table(
            [
                ("codes", str(self.path)),
                ("images", f"{self.n_images:,} of {about.images['spec']}"),
                ("site", f"{self.site}, {self.tokens} tokens, {self.n_tokens} vectors per image"),
                ("latents", f"{self.n_latents:,}"),
                ("active per vector", f"{self.n_active / max(self.n_vectors, 1):.1f}"),
                ("model", str(about.model.get("id"))),
            ]
        )

    def _map(self, number: int) -> dict[str, Tensor]:
        shard = self.manifest.shards[number]
        path = shard_path(self.path, number)
        mapped = map_tensors(path, self.manifest.layout(shard), shard.n_bytes, AGAIN)
        if number not in self._checked:
            check_sums([(path, shard.sha256)], AGAIN)
            self._checked.add(number)
        return mapped

    def _read(self, first: int, stop: int) -> CodeBatch:
        """The codes of some images that follow each other, by their places here."""
        shards = np.searchsorted(self._starts, [first, stop - 1], side="right") - 1
        parts = []
        for number in range(int(shards[0]), int(shards[1]) + 1):
            start, end = int(self._starts[number]), int(self._starts[number + 1])
            own = slice(max(first - start, 0), min(stop, end) - start)
            mapped = self._map(number)
            offsets = mapped["offsets"][own.start * self.n_tokens : own.stop * self.n_tokens + 1]
            entries = slice(int(offsets[0]), int(offsets[-1]))
            code = SparseCode(
                mapped["indices"][entries].to(torch.int64),
                mapped["values"][entries].to(torch.float32, copy=True),
                offsets - offsets[0],
                self.n_latents,
            )
            parts.append(CodeBatch(mapped["image_indices"][own].clone(), code, self.n_tokens))
        return parts[0] if len(parts) == 1 else CodeBatch.joined(parts)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0
