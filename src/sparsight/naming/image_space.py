"""The collection in a space that images share with texts: `ImageSpace`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from sparsight.errors import UserError
from sparsight.evaluation.baselines import Moments
from sparsight.images import ImageSource
from sparsight.naming.scores import LatentActivations
from sparsight.vision import VisionModel
from sparsight.vision.passes import ImagePass, PassSettings
from sparsight.vision.queries import check_texts

IMAGES_AT_ONCE = 1 << 15
"""Images whose embeddings are in memory in float32 at any moment."""


@dataclass(frozen=True, repr=False)
class ImageSpace:
    """Embeddings of images, one row of length 1 each, and where each image is in the source.

    Attributes:
        matrix: the embeddings, usually float16 in a memory map.
        places: place of each row's image in the source, rising.
        n_places: number of images in the source.
    """

    matrix: Float[Tensor, "images d"]
    places: Int64[np.ndarray, " images"]
    n_places: int

    def __len__(self) -> int:
        return len(self.places)

    def parts(self) -> Iterator[tuple[int, Float[Tensor, "some d"]]]:
        """Yield ranges of rows in float32: the first row's number, and the rows."""
        for first in range(0, len(self), IMAGES_AT_ONCE):
            yield first, self.matrix[first : first + IMAGES_AT_ONCE].float()

    @cached_property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean of all rows."""
        return self._moments.mean.float()

    @cached_property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Covariance of all rows, float64."""
        return self._moments.covariance

    @cached_property
    def _moments(self) -> Moments:
        moments = Moments(self.matrix.shape[1])
        for _, rows in self.parts():
            moments.add(rows)
        return moments

    @cached_property
    def _rows(self) -> Int64[np.ndarray, " n_places"]:
        rows = np.full(self.n_places, -1, dtype=np.int64)
        rows[self.places] = np.arange(len(self))
        return rows

    def entries(
        self, activations: LatentActivations, block: range
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Return the entries of a block of latents as arrays: latent (counted from the block's
        first), row here, activation. Images without an embedding are left out.
        """
        bounds = activations.rows.offsets[block.start : block.stop + 1]
        here = slice(int(bounds[0]), int(bounds[-1]))
        latent = np.repeat(np.arange(len(block)), np.diff(bounds))
        row = self._rows[activations.rows.columns[here].astype(np.int64)]
        value = np.asarray(activations.rows.values[here], dtype=np.float32)
        known = row >= 0
        if known.all():
            return latent, row, value
        return latent[known], row[known], value[known]

    def weighted_sums(
        self,
        latent: Int64[np.ndarray, " n"],
        row: Int64[np.ndarray, " n"],
        weight: Float[np.ndarray, " n"],
        n_latents: int,
    ) -> Float[Tensor, "n_latents d"]:
        """Return, for each latent, the sum of weight × (embedding − mean) over its entries.

        Args:
            latent: latent of each entry, not falling; rows rise within a latent.
            row: its row here.
            weight: its weight.
            n_latents: number of latents.
        """
        sums = torch.zeros(n_latents, self.matrix.shape[1])
        part_of = row // IMAGES_AT_ONCE
        for first, rows in self.parts():
            own = part_of == first // IMAGES_AT_ONCE
            if not own.any():
                continue
            counts = np.bincount(latent[own], minlength=n_latents)
            starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
            sums += embedding_bag(
                torch.from_numpy(row[own] - first),
                rows - self.mean,
                torch.from_numpy(starts),
                mode="sum",
                per_sample_weights=torch.from_numpy(weight[own].astype(np.float32)),
            )
        return sums


@contextmanager
@torch.no_grad()
def embedded(
    model: VisionModel,
    source: ImageSource,
    places: Int64[np.ndarray, " images"],
    settings: PassSettings,
) -> Iterator[ImageSpace]:
    """Embed images of a collection once; the embeddings are in a temporary file until the block
    ends.

    Args:
        model: a model with a text tower.
        source: the collection.
        places: the images to embed, rising.
        settings: batch size, workers and quiet.

    Raises:
        UserError: the model has no text tower, or its images and texts share no space.
    """
    check_words(model)
    with tempfile.TemporaryDirectory(prefix="sparsight-names-") as folder:
        path = Path(folder) / "embeddings.raw"
        read: list[int] = []
        seen = ImagePass(model, source, "embed", settings, indices=places.tolist())
        width = 0
        with path.open("wb") as file, seen:
            for batch in seen:
                rows = normalize(model.embed_images(batch.pixels), dim=-1).half().cpu()
                width = rows.shape[1]
                rows.contiguous().numpy().tofile(file)
                read += list(map(int, batch.indices))
        if not read:
            raise UserError(f"{source.spec}: none of the images could be embedded.")
        matrix = torch.from_file(
            str(path), shared=False, size=len(read) * width, dtype=torch.float16
        )
        yield ImageSpace(matrix.view(len(read), width), np.array(read, np.int64), len(source))


def check_words(model: VisionModel) -> None:
    """Raise a `UserError` unless words can be compared with images in a model."""
    check_texts(model, "Give a second model that has one with --text-model.")
