"""What an index of format 2 knows over all images: lists, counts, neighbours, embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from sparsight.activations.shards import map_tensors
from sparsight.errors import SparsightError, UserError
from sparsight.latents.embeddings import ImageEmbeddings, SimilarImage
from sparsight.latents.image_sets import Collection
from sparsight.latents.index_files import (
    AGAIN,
    BY_IMAGE,
    BY_LATENT,
    EMBEDDINGS,
    LABEL_COUNTS,
    LABELS,
    NEAR_MISSES,
    NEIGHBOURS,
    checked_file,
    read_file,
    table_of,
)
from sparsight.latents.label_counts import LabelCounts
from sparsight.latents.neighbour_tables import By, Neighbour, NeighbourTable, map_neighbours
from sparsight.latents.postings import Postings


class IndexLists:
    """The files of an index that are mapped into memory when they are first asked for."""

    folder: Path
    manifest: Mapping[str, Any]
    images: pa.Table

    @property
    def version(self) -> int:
        """Version of the format, 1 or 2."""
        return int(self.manifest["version"])

    @property
    def n_latents(self) -> int:
        """Number of latents of the SAE."""
        return int(self.manifest["sae"]["n_latents"])

    @property
    def n_places(self) -> int:
        """Number of images in the source, those that could not be read included."""
        about = self.manifest["images"]
        return int(about["n_images"] + about["n_unread"])

    @cached_property
    def image_places(self) -> Int64[np.ndarray, " images"]:
        """The places in the source of the rows of `images`, rising."""
        places: Int64[np.ndarray, " images"] = self.images["image"].to_numpy()
        return places

    def file(self, name: str) -> Path | None:
        """Return the path of one of the index's files, checked; None if there is none.

        Raises:
            SparsightError: the file is missing, cut off or altered.
        """
        return checked_file(self.folder, name, self.manifest)

    def checked(self, latent: int) -> int:
        """Return the number of a latent.

        Raises:
            UserError: the latent does not exist.
        """
        if not 0 <= latent < self.n_latents:
            raise UserError(
                f"{self.folder}: no latent {latent}; it has latents 0 to {self.n_latents - 1}."
            )
        return latent

    def firing(
        self, latent: int
    ) -> tuple[Int32[np.ndarray, " images"], Float32[np.ndarray, " images"]]:
        """Return all images in which `latent` fires (places, rising) and its image maxima.

        Raises:
            UserError: the index has format version 1, or the latent does not exist.
        """
        return self.by_latent.row(self.checked(latent))

    def neighbours(self, latent: int, by: By = "decoder", n: int = 16) -> list[Neighbour]:
        """Return the closest latents of `latent` in the same SAE, the closest first.

        Args:
            latent: the latent.
            by: `decoder`: cosine of the decoder rows; `coactivation`: correlation of the
                activations over the images, positive ones only.
            n: number of neighbours; the index keeps 16.

        Raises:
            UserError: the index has format version 1 or was built without neighbours, or the
                latent or the kind of neighbours does not exist.
        """
        if by not in self._neighbours:
            raise UserError(f"Neighbours by {by!r}: choose {' or '.join(self._neighbours)}.")
        return self._neighbours[by].row(self.checked(latent), n)

    def near_misses(self, latent: int) -> list[SimilarImage]:
        """Return the images most like those that activate `latent` most, in which it does not fire.

        Raises:
            UserError: the index has format version 1 or was built without embeddings, or the
                latent does not exist.
        """
        image, cosine = self._near_misses
        row = self.checked(latent)
        pairs = zip(image[row].tolist(), cosine[row].tolist(), strict=True)
        return [SimilarImage(*pair) for pair in pairs if pair[0] >= 0]

    @cached_property
    def embeddings(self) -> ImageEmbeddings:
        """One vector per image, to find images that are alike.

        Raises:
            UserError: the index has format version 1 or was built without embeddings.
        """
        path = self._near_file(EMBEDDINGS, "embeddings", "--embeddings none")
        return ImageEmbeddings.open(path, self.manifest, self.image_places, AGAIN)

    @cached_property
    def _neighbours(self) -> dict[By, NeighbourTable]:
        path = self._near_file(NEIGHBOURS, "neighbours", "--no-neighbours")
        n = self.manifest["neighbours"]["n"]
        return map_neighbours(path, self.n_latents, n, AGAIN)

    @cached_property
    def _near_misses(self) -> tuple[Tensor, Tensor]:
        path = self._near_file(NEAR_MISSES, "near misses", "--embeddings none")
        shape = (self.n_latents, self.manifest["near_misses"]["n"])
        layout = {"image": (shape, torch.int64), "cosine": (shape, torch.float32)}
        tensors = map_tensors(path, layout, path.stat().st_size, AGAIN)
        return tensors["image"], tensors["cosine"]

    def _near_file(self, name: str, what: str, option: str) -> Path:
        self._need_version_2(what)
        path = self.file(name)
        if path is None:
            raise UserError(
                f"{self.folder}: has no {what}. Build it again with `sparsight index`, without "
                f"{option}."
            )
        return path

    def label_counts(self, latent: int) -> dict[str, int]:
        """Return in how many images of each label `latent` fires, the largest number first.

        Raises:
            UserError: the index has format version 1, or the latent does not exist.
        """
        return self._label_counts.of(self.checked(latent))

    @cached_property
    def label_totals(self) -> dict[str, int]:
        """Number of images of each label, those in which nothing fires included.

        Raises:
            UserError: the index has format version 1.
        """
        counts = self._label_counts
        return dict(zip(counts.names, counts.totals.tolist(), strict=True))

    @cached_property
    def by_latent(self) -> Postings:
        """The images in which each latent fires: latents × places in the source.

        Raises:
            UserError: the index has format version 1.
        """
        return self._postings(BY_LATENT)

    @cached_property
    def by_image(self) -> Postings:
        """The latents that fire in each image: places in the source × latents.

        Raises:
            UserError: the index has format version 1.
        """
        return self._postings(BY_IMAGE)

    def _postings(self, name: str) -> Postings:
        self._need_version_2("posting lists")
        path = self.file(name)
        if path is None:
            raise SparsightError(f"{self.folder}: has no {name}. {AGAIN}")
        by_latent = name == BY_LATENT
        n_rows, n_columns = self.n_latents, self.n_places
        if not by_latent:
            n_rows, n_columns = n_columns, n_rows
        n_entries = self.manifest["n_entries"]
        return Postings.open(path, n_rows, n_columns, n_entries, tokens=by_latent, again=AGAIN)

    @cached_property
    def _label_counts(self) -> LabelCounts:
        self._need_version_2("counts of labels")
        path = self.file(LABEL_COUNTS)
        if path is None:
            raise SparsightError(f"{self.folder}: has no {LABEL_COUNTS}. {AGAIN}")
        labels = table_of(read_file(self.folder, LABELS, self.manifest))
        n_entries = self.manifest["n_label_counts"]
        return LabelCounts.open(path, labels, self.n_latents, n_entries, AGAIN)

    def _need_version_2(self, what: str) -> None:
        if self.version < 2:
            raise UserError(
                f"{self.folder}: has format version 1, without {what}. Upgrade it with "
                "`sparsight index RUN --upgrade`."
            )

    @cached_property
    def collection(self) -> Collection:
        """The images as queries see them: posting lists, places and labels.

        Raises:
            UserError: the index has format version 1.
        """
        return Collection(self.by_latent, self.image_places, self.images["label"])
