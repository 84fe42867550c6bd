"""`LatentIndex`: what every latent responds to, as a folder that can be opened again."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
from PIL import Image
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.files import read_json, sha256_json, write_bytes, write_json
from sparsight.folders import folder_lock, replaced, settled
from sparsight.images import ImageError, ImageInfo, ImageSource, open_images
from sparsight.latents.statistics import Examples
from sparsight.notebooks import html_table, need_pandas
from sparsight.sae import SparseAutoencoder

if TYPE_CHECKING:
    import pandas

FORMAT = "sparsight latent index"
VERSION = 1
MANIFEST, LATENTS, EXAMPLES, IMAGES = (
    "manifest.json",
    "latents.parquet",
    "top_examples.safetensors",
    "images.parquet",
)
FILES = (MANIFEST, LATENTS, EXAMPLES, IMAGES)
_TENSORS = tuple(
    f"{kind}.{part}" for kind in ("top", "samples") for part in ("image", "token", "activation")
)


@dataclass(frozen=True)
class Example:
    """One image on which a latent is active."""

    image: int
    """Place in the source from which the index was built; see `LatentIndex.picture`."""
    token: int
    """Position of the strongest activation at the site, among the tokens that the SAE sees."""
    activation: float
    """The latent's strongest activation in the image."""


@dataclass(frozen=True, repr=False)
class LatentIndex:
    """Statistics, strongest images and samples of every latent of one SAE.

    Attributes:
        folder: folder of the index.
        manifest: its origin: SAE, model, images, site, tokens, settings.
        table: one row per latent: `latent`, `density`, `mean_activation` and `max_activation` (null
            and 0 if it was never active), `n_active` (vectors), `n_active_images`, `label_entropy`
            (nats; null under 10 labelled images), `top_label`, `top_label_share`, `name`,
            `name_score`, `name_source`.
        images: one row per image that is an example: `image`, `id`, `uri`, `label`, `caption`.
        examples: the strongest examples, `[n_latents, top_n]`, strongest first.
        quantiles: samples, `[n_latents, quantiles, samples]`, the strongest quantile first.
    """

    folder: Path
    manifest: Mapping[str, Any]
    table: pa.Table
    images: pa.Table
    examples: Examples
    quantiles: Examples

    @classmethod
    def open(cls, folder: str | Path, sae: SparseAutoencoder | None = None) -> Self:
        """Open an index, or the `index/` of a run folder; every file's checksum is checked.

        Args:
            folder: the index, or the run that it belongs to.
            sae: the SAE for which it will be used; it must be the one from which it was built.

        Raises:
            UserError: there is no index, its format is newer, or it is of another SAE.
            SparsightError: a file is missing, cut off or altered.
        """
        folder = settled(Path(folder))
        inside = settled(folder / "index")
        if not (folder / MANIFEST).exists() and (inside / MANIFEST).exists():
            folder = inside
        while True:
            manifest = _read_manifest(folder)
            try:
                index = cls._read(folder, manifest)
                break
            except SparsightError:
                # If the index was replaced between two reads, read it again.
                if _read_manifest(folder) == manifest:
                    raise
        if sae is not None:
            index.check_sae(sae)
        return index

    @classmethod
    def _read(cls, folder: Path, manifest: dict[str, Any]) -> Self:
        try:
            tensors = safetensors.torch.load(_read(folder, EXAMPLES, manifest))
            table = pq.read_table(io.BytesIO(_read(folder, LATENTS, manifest)))
            images = pq.read_table(io.BytesIO(_read(folder, IMAGES, manifest)))
            top, samples = (
                [tensors[name] for name in names] for names in (_TENSORS[:3], _TENSORS[3:])
            )
        except (safetensors.SafetensorError, pa.ArrowException, KeyError) as error:
            raise SparsightError(f"{folder}: is damaged ({error}). {_AGAIN}") from error
        return cls(folder, manifest, table, images, Examples(*top), Examples(*samples))

    def save(self) -> None:
        """Write all files atomically: if killed at any point, the old or the new index remains."""
        with replaced(self.folder, FILES) as staged:
            self.write(staged)

    def write(self, folder: Path) -> None:
        """Write all files into a temporary folder."""
        tensors: dict[str, Tensor] = {}
        for kind, found in (("top", self.examples), ("samples", self.quantiles)):
            for part in ("image", "token", "activation"):
                tensors[f"{kind}.{part}"] = getattr(found, part).cpu().contiguous()
        contents = {
            LATENTS: _parquet(self.table),
            EXAMPLES: safetensors.torch.save(tensors),
            IMAGES: _parquet(self.images),
        }
        for name, data in contents.items():
            write_bytes(folder / name, data)
        hashes = {name: [hashlib.sha256(data).hexdigest()] for name, data in contents.items()}
        _write_manifest(folder, {**self.manifest, "files": hashes})

    def with_table(self, table: pa.Table) -> Self:
        """Replace `latents.parquet` by `table`; if killed at any point, the index stays intact.

        Between the two writes the manifest accepts the old table and the new one.

        Raises:
            UserError: another index was written there in the meantime.
        """
        if table.num_rows != self.n_latents:
            raise ValueError(f"{table.num_rows} rows for {self.n_latents} latents")
        data = _parquet(table)
        new = hashlib.sha256(data).hexdigest()
        with folder_lock(self.folder):
            manifest = _read_manifest(self.folder)
            if any(manifest["files"][name] != self._hash(name) for name in (EXAMPLES, IMAGES)):
                raise UserError(
                    f"{self.folder}: another index was written here since this one was opened. "
                    "Open it again."
                )
            old = hashlib.sha256(_read(self.folder, LATENTS, manifest)).hexdigest()
            for step, accepted in enumerate(([old, new], [new])):
                manifest = {**manifest, "files": {**manifest["files"], LATENTS: accepted}}
                if step == 1:
                    write_bytes(self.folder / LATENTS, data)
                _write_manifest(self.folder, manifest)
        return type(self)(self.folder, manifest, table, self.images, self.examples, self.quantiles)

    def __repr__(self) -> str:
        images = self.manifest["images"]["n_images"]
        named = self.table.num_rows - self.table["name"].null_count
        return (
            f"LatentIndex({str(self.folder)!r}, {self.n_latents:,} latents at {self.site}, "
            f"{self.tokens} tokens of {images:,} images, {named:,} named)"
        )

    def _repr_html_(self) -> str:
        about = self.manifest
        named = self.table.num_rows - self.table["name"].null_count
        never = self.table["n_active"].to_pylist().count(0)
        return html_table(
            [
                ("index", str(self.folder)),
                ("latents", f"{self.n_latents:,}, {never:,} never active, {named:,} named"),
                ("site", f"{self.site}, {self.tokens} tokens"),
                ("images", f"{about['images']['n_images']:,} of {about['images']['source']}"),
                ("model", str(about["model"].get("id"))),
            ]
        )

    def to_pandas(self) -> pandas.DataFrame:
        """Return `table` as a pandas data frame: one row per latent, in order.

        Raises:
            MissingExtra: pandas is not installed.
        """
        need_pandas()
        return self.table.to_pandas()

    def _hash(self, name: str) -> Any:
        return self.manifest["files"][name]

    @property
    def n_latents(self) -> int:
        """Number of latents of the SAE."""
        return self.examples.image.shape[0]

    @property
    def site(self) -> str:
        """Where in the model the SAE reads."""
        return str(self.manifest["site"])

    @property
    def tokens(self) -> str:
        """The indexed positions: `cls`, `patches`, `all` or `mean`."""
        return str(self.manifest["tokens"])

    def top(self, latent: int) -> list[Example]:
        """Return the images that activate `latent` most, strongest first; [] if none does."""
        return self._examples(self.examples, self._checked(latent))

    def samples(self, latent: int) -> list[list[Example]]:
        """Return images from each quantile of those that activate `latent`, strongest first."""
        place = self._checked(latent)
        bands = range(self.quantiles.image.shape[1])
        return [self._examples(self.quantiles, (place, band)) for band in bands]

    def row(self, latent: int) -> dict[str, Any]:
        """Return the latent's row of `table`."""
        found: list[dict[str, Any]] = self.table.slice(self._checked(latent), 1).to_pylist()
        return found[0]

    def info(self, image: int) -> ImageInfo:
        """Return id, origin, label and caption of an example's image.

        Raises:
            UserError: the image is not an example of any latent.
        """
        if image not in self._places:
            raise UserError(
                f"{self.folder}: image {image} is not an example of any latent in this index."
            )
        row = self.images.slice(self._places[image], 1).to_pylist()[0]
        return ImageInfo(row["id"], row["uri"], row["label"], row["caption"])

    def source(self) -> ImageSource:
        """Open the images from which the index was built, once.

        Raises:
            UserError: the images no longer exist.
        """
        return self._source

    def picture(self, image: int) -> Image.Image:
        """Load the image of an example, by its id, even if images were added or removed.

        Raises:
            UserError: the source or the image no longer exists.
        """
        wanted = self.info(image)
        source = self.source()
        place = image
        if image >= len(source) or source.known(image).id != wanted.id:
            found = self._source_ids.get(wanted.id)
            if found is None:
                raise UserError(
                    f"{wanted.id}: this image is no longer in {source.spec} (it came from "
                    f"{wanted.uri}). Put it back, or build the index again."
                )
            place = found
        try:
            # The same pixels as the model saw; None unless JPEGs were decoded at a smaller size.
            scaled = (self.manifest["model"].get("preprocessing") or {}).get("jpeg_min_side")
            return source.load(place, min_side=scaled) if scaled else source.load(place)
        except ImageError as error:
            raise UserError(f"{wanted.uri}: can no longer be read ({error.reason}).") from error

    def check_sae(self, sae: SparseAutoencoder) -> None:
        """Raise a `UserError` unless the index was built from exactly these parameters."""
        if sae.fingerprint() != self.manifest["sae"]["hash"]:
            raise UserError(
                f"{self.folder}: was built from another SAE, whose latents mean other things. "
                "Build an index of this SAE with `sparsight index`."
            )

    @cached_property
    def _source(self) -> ImageSource:
        spec = self.manifest["images"]["source"]
        try:
            return open_images(spec)
        except UserError as error:
            raise UserError(
                f"{self.folder}: the images from which it was built cannot be opened: {error} "
                f"Put them back at {spec}, or put a link there."
            ) from error

    @cached_property
    def _source_ids(self) -> dict[str, int]:
        return {self._source.known(i).id: i for i in range(len(self._source))}

    @cached_property
    def _places(self) -> dict[int, int]:
        return {image: row for row, image in enumerate(self.images["image"].to_pylist())}

    def _checked(self, latent: int) -> int:
        if not 0 <= latent < self.n_latents:
            raise UserError(
                f"{self.folder}: no latent {latent}; it has latents 0 to {self.n_latents - 1}."
            )
        return latent

    def _examples(self, found: Examples, place: int | tuple[int, int]) -> list[Example]:
        columns = (found.image[place], found.token[place], found.activation[place])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [Example(*row) for row in rows if row[0] >= 0]


_AGAIN = "Build it again with `sparsight index`."


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder}: holds no latent index (there is no {MANIFEST}). {_AGAIN}")
    try:
        manifest = read_json(path)
    except UserError as error:
        raise SparsightError(f"{error} {_AGAIN}") from error
    if manifest.get("format") == FORMAT and manifest.get("version") != VERSION:
        raise UserError(
            f"{path}: has format version {manifest.get('version')}; this Sparsight reads "
            f"{VERSION}. {_AGAIN}"
        )
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("format") != FORMAT or manifest.get("sha256") != sha256_json(content):
        raise SparsightError(f"{path}: is damaged, or not the manifest of a latent index. {_AGAIN}")
    return manifest


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    write_json(folder / MANIFEST, {**content, "sha256": sha256_json(content)})


def _read(folder: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SparsightError(f"{path}: cannot be read ({error.strerror}). {_AGAIN}") from error
    if hashlib.sha256(data).hexdigest() not in manifest["files"][name]:
        raise SparsightError(
            f"{path}: is cut off or altered (its SHA-256 is not the one in {MANIFEST}). {_AGAIN}"
        )
    return data


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
