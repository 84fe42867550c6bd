"""`CodeStore`: the sparse codes of all images on disk, read through memory maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sparsight.activations.manifest import IMAGES
from sparsight.activations.shards import (
    check_size,
    check_sum,
    check_sums,
    map_tensors,
)
from sparsight.config import check_positive
from sparsight.errors import SparsightError, UserError
from sparsight.images import ImageSource, reopen_images
from sparsight.latents.code_manifest import AGAIN, CodeManifest, shard_path
from sparsight.latents.code_shards import CodeBatch
from sparsight.notebooks import data_frame, html_table, need_pandas
from sparsight.sae import SparseAutoencoder, SparseCode

if TYPE_CHECKING:
    import pandas


class CodeStore:
    """The codes that `encode` wrote to a folder.

    Opening checks file sizes; a shard's checksum is checked when it is first read, once per
    process.

    Args:
        path: the folder.
        verify: read every file now and check its checksum.

    Attributes:
        path: the folder.
        manifest: what the codes record about themselves.
        site: where in the model the SAE reads.
        tokens: "all", "patches", "cls" or "mean".
        n_tokens: vectors per image.
        n_latents: number of latents of the SAE.
        model_info: as in `ActivationStore`.

    Raises:
        UserError: the folder holds no codes, or only unfinished ones.
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
        """Number of images with codes."""
        return int(self._starts[-1])

    @property
    def n_vectors(self) -> int:
        """Number of vectors with codes."""
        return self.n_images * self.n_tokens

    @property
    def n_active(self) -> int:
        """Number of active latents, summed over all vectors."""
        return sum(shard.n_active for shard in self.manifest.shards)

    @cached_property
    def image_indices(self) -> Int64[np.ndarray, " images"]:
        """The place of each image in the source, in order."""
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
        """Yield all images once, in order, in batches."""
        check_positive(batch_images=batch_images)
        return (
            self._read(first, min(first + batch_images, self.n_images))
            for first in range(0, self.n_images, batch_images)
        )

    def image(self, image: int) -> SparseCode:
        """Return the code of one image, `n_tokens` rows.

        Args:
            image: its place in the source.

        Raises:
            UserError: it has no code here.
        """
        place = int(np.searchsorted(self.image_indices, image))
        if place == self.n_images or self.image_indices[place] != image:
            raise UserError(f"{self.path}: holds no code of image {image}.")
        return self._read(place, place + 1).code

    @cached_property
    def images(self) -> pa.Table | None:
        """The images of the source, one row each, as in `ActivationStore.images`; None if the codes
        were not made from a store, or by an earlier version.

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
                f"{path}: lists {table.num_rows:,} images, but the codes cover "
                f"{self.manifest.images['n_images']:,}. {AGAIN}"
            )
        return table

    def source(self) -> ImageSource:
        """Open the images again; `image_indices` are places in the result.

        Raises:
            UserError: the images no longer exist, or have changed.
        """
        about = self.manifest.images
        return reopen_images(about["spec"], about["fingerprint"], str(self.path), about["n_images"])

    def check_sae(self, sae: SparseAutoencoder) -> None:
        """Raise a `UserError` unless the codes were made with exactly these parameters."""
        if sae.fingerprint() != self.manifest.sae["hash"]:
            raise UserError(
                f"{self.path}: the codes are of another SAE. Encode with this one into another "
                "folder."
            )

    def verify(self) -> None:
        """Check the checksum of every file.

        Raises:
            SparsightError: a checksum differs; the message names the file.
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

    def to_pandas(self, images: Sequence[int] | None = None) -> pandas.DataFrame:
        """Return the codes as a pandas data frame: one row per active latent of a vector.

        Its columns are `image` (place in the source), `token` (position in the image), `latent`
        and `activation`.

        Args:
            images: places in the source; default: all images, at 28 bytes per active latent.

        Raises:
            MissingExtra: pandas is not installed.
            UserError: an image has no code here.
        """
        need_pandas()
        if images is None:
            batches: Iterable[tuple[npt.NDArray[np.int64], SparseCode]] = (
                (batch.image_indices.numpy(), batch.code) for batch in self.ordered()
            )
        else:
            batches = ((np.array([image]), self.image(image)) for image in images)
        parts = []
        for places, code in batches:
            rows = code.rows.numpy()
            parts.append(
                (places[rows // self.n_tokens], rows % self.n_tokens,
                 code.indices.numpy(), code.values.numpy())
            )  # fmt: skip
        columns = zip(*parts, strict=True) if parts else ((), (), (), ())
        names = ("image", "token", "latent", "activation")
        types = (np.int64, np.int64, np.int64, np.float32)
        return data_frame(
            {
                name: np.concatenate([np.empty(0, kind), *column])
                for name, kind, column in zip(names, types, columns, strict=True)
            }
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
        """Read the codes of consecutive images, by their places here."""
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
