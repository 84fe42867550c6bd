"""`LatentIndex`: what every latent responds to, as a folder that can be opened again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import safetensors.torch
from PIL import Image

from sparsight.errors import SparsightError, UserError
from sparsight.folders import settled
from sparsight.images import ImageError, ImageInfo, ImageSource, open_images
from sparsight.latents.examples import Examples
from sparsight.latents.filters import filtered
from sparsight.latents.index_files import (
    AGAIN,
    EXAMPLES,
    IMAGES,
    LATENTS,
    MANIFEST,
    check_same_build,
    parquet,
    read_file,
    read_manifest,
    replace_files,
    table_of,
)
from sparsight.latents.index_lists import IndexLists
from sparsight.notebooks import html_table, need_pandas
from sparsight.sae import SparseAutoencoder, SparseCode

if TYPE_CHECKING:
    import pandas

    from sparsight.latents.query import PatchResult, QueryResult

_PARTS = ("image", "token", "activation")


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
class LatentIndex(IndexLists):
    """What every latent of one SAE responds to in a collection of images.

    An image is named by its place in the source. A latent fires in an image if it is active on at
    least one of its vectors; its image maximum is its strongest activation there.

    Attributes:
        folder: folder of the index.
        manifest: its origin: SAE, model, images, site, tokens, settings.
        table: one row per latent:
            `latent`;
            `density`: share of the vectors on which it is active;
            `mean_activation` (null if it was never active), `max_activation` (0 if never);
            `n_near_duplicates`: images in which it fires that nearly repeat another of them, so
            that no example shows them;
            `n_active`, `n_active_images`: number of vectors, and of images in which it fires;
            `cls_share`: share of these vectors at CLS or another prefix position (null if the SAE
            does not read both prefix and patches);
            `moran`, `moran_null`: spatial autocorrelation over the patches, see
            `SpatialStatistics`, and its mean for random positions (null without patches);
            `q10`, `q50`, `q90`, `q99`: quantiles of its image maxima;
            `histogram`: images in 20 equal bins from `histogram_low` to `histogram_high`;
            `label_entropy` (nats; null under 10 labelled images), `top_label`, `top_label_share`:
            labels of its top-activating images;
            `map_x`, `map_y`: its place on the map (null until there is one);
            `name`, `name_score`, `name_threshold`, `name_source` (null without a name).
            An index of version 1 lacks `cls_share`, `moran`, quantiles, histogram, map and
            `name_threshold`.
        images: one row per image that was read: `image`, `id`, `uri`, `label`, `caption` (version
            1: only images that are examples).
        examples: the strongest examples, `[n_latents, top_n]`, strongest first.
        quantiles: samples, `[n_latents, quantiles, samples]`, the strongest quantile first.
        uniform_examples: a sample of all images in which a latent fires, `[n_latents, samples]`,
            strongest first; None in version 1.
    """

    folder: Path
    manifest: Mapping[str, Any]
    table: pa.Table
    images: pa.Table
    examples: Examples
    quantiles: Examples
    uniform_examples: Examples | None = None

    @classmethod
    def open(cls, folder: str | Path, sae: SparseAutoencoder | None = None) -> Self:
        """Open an index, or the `index/` of a run folder.

        The checksums of small files are checked now, those of memory-mapped files when they are
        first used, once per process.

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
            manifest = read_manifest(folder)
            try:
                index = cls._read(folder, manifest)
                break
            except SparsightError:
                # If the index was replaced between two reads, read it again.
                if read_manifest(folder) == manifest:
                    raise
        if sae is not None:
            index.check_sae(sae)
        return index

    @classmethod
    def _read(cls, folder: Path, manifest: dict[str, Any]) -> Self:
        kinds = ("top", "samples") if manifest["version"] == 1 else ("top", "samples", "uniform")
        try:
            tensors = safetensors.torch.load(read_file(folder, EXAMPLES, manifest))
            table, images = (
                table_of(read_file(folder, name, manifest)) for name in (LATENTS, IMAGES)
            )
            examples = [Examples(*(tensors[f"{kind}.{part}"] for part in _PARTS)) for kind in kinds]
        except (safetensors.SafetensorError, pa.ArrowException, KeyError) as error:
            raise SparsightError(f"{folder}: is damaged ({error}). {AGAIN}") from error
        return cls(folder, manifest, table, images, *examples)

    def with_table(self, table: pa.Table) -> Self:
        """Replace `latents.parquet` by `table`; if killed at any point, the index stays intact.

        Raises:
            UserError: another index was written there in the meantime.
        """
        if table.num_rows != self.n_latents:
            raise ValueError(f"{table.num_rows} rows for {self.n_latents} latents")
        return self.with_files({LATENTS: parquet(table)})

    def with_files(self, contents: Mapping[str, bytes | Path]) -> Self:
        """Replace or add files of the index, all together, and return the index with them.

        If the process is killed at any point, the index has all old or all new files.

        Args:
            contents: new contents by the file's name; a file given as a path is moved.

        Raises:
            UserError: another index was written there in the meantime.
            SparsightError: the disk is full or the folder cannot be written.
        """
        replace_files(self.folder, self.manifest, contents)
        return type(self).open(self.folder)

    def latest(self) -> Self:
        """Return the index as it is on disk now, with what others have added in the meantime.

        Raises:
            UserError: another index was written there.
        """
        index = type(self).open(self.folder)
        check_same_build(self.folder, self.manifest, index.manifest)
        return index

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
        return self._examples(self.examples, self.checked(latent))

    def samples(self, latent: int) -> list[list[Example]]:
        """Return images from each quantile of those that activate `latent`, strongest first."""
        place = self.checked(latent)
        bands = range(self.quantiles.image.shape[1])
        return [self._examples(self.quantiles, (place, band)) for band in bands]

    def uniform(self, latent: int) -> list[Example]:
        """Return a seeded random sample of the images in which `latent` fires, strongest first.

        Raises:
            UserError: the index has format version 1.
        """
        place = self.checked(latent)
        self._need_version_2("samples of all images")
        assert self.uniform_examples is not None
        return self._examples(self.uniform_examples, place)

    def query(self, text: str) -> QueryResult:
        """Find the images for which a query holds, such as `12 > .5 and 977 > .2 and not 4`.

        The number of a latent alone holds where the latent fires. `>`, `>=`, `<`, `<=`, `==` and
        `!=` compare its strongest activation in the image, which is 0 where it does not fire. A
        name in quotes stands for the latent that has it. `label == "star"`, `label != "star"` and
        `label in ("star", "anchor")` ask about labels. `not` binds more tightly than `and`, and
        `and` more tightly than `or`; keywords may be in capitals.

        Raises:
            UserError: a typo, or a latent, name or label that does not exist (the message has its
                place); or the index has format version 1.
        """
        from sparsight.latents.query import query

        return query(self, text)

    def query_patches(self, text: str, code: SparseCode) -> PatchResult:
        """Find the positions of one image at which a query holds.

        Args:
            text: as for `query`, without labels; activations are those at each position.
            code: the code of the image, one row per position that the SAE reads, such as
                `CodeStore.image(place)` or `image_latents(…).code`.

        Raises:
            UserError: as in `query`; or the code is of another SAE.
        """
        from sparsight.latents.query import query_patches

        return query_patches(self, text, code)

    def where(self, condition: str) -> pa.Table:
        """Return the rows of `table` for which a condition holds, such as `density < .01 and moran
        > .3`; see `filtered`.

        Raises:
            UserError: a typo, or an unknown column; the message has its place.
        """
        return filtered(self.table, condition)

    def row(self, latent: int) -> dict[str, Any]:
        """Return the latent's row of `table`."""
        found: list[dict[str, Any]] = self.table.slice(self.checked(latent), 1).to_pylist()
        return found[0]

    def info(self, image: int) -> ImageInfo:
        """Return id, origin, label and caption of an image.

        Raises:
            UserError: the image was not read (in version 1: is not an example of any latent).
        """
        row_number = int(np.searchsorted(self.image_places, image))
        if row_number == len(self.image_places) or self.image_places[row_number] != image:
            raise UserError(
                f"{self.folder}: there is no image {image} in this index, whose images have places "
                f"from 0 to {self.n_places - 1}; or it could not be read."
            )
        row = self.images.slice(row_number, 1).to_pylist()[0]
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

    def _examples(self, found: Examples, place: int | tuple[int, int]) -> list[Example]:
        columns = (found.image[place], found.token[place], found.activation[place])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [Example(*row) for row in rows if row[0] >= 0]
