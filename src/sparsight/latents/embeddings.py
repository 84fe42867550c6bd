"""One vector per image of an index, to find images that are alike: `ImageEmbeddings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int64
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from sparsight.activations.shards import map_tensors
from sparsight.config import check_positive
from sparsight.errors import UserError
from sparsight.vision import VisionModel
from sparsight.vision.queries import check_query, read_query

EMBEDDING = "embedding"
"""The site of the joint embedding of images and texts."""
ROWS_AT_ONCE = 16_384
ROUNDING = 0.01
"""Twice the largest error of a cosine in float16, with a margin; measured: below 0.001."""

Kind = Literal["joint", "pooled", "codes"]
"""What the vectors are:

- `joint`: the model's embedding of the image, in the space that it shares with texts;
- `pooled`: the mean of the activations that the SAE reads, minus the mean of all images;
- `codes`: the strongest activation of every latent, projected at random to 512 dimensions.
"""


@dataclass(frozen=True)
class SimilarImage:
    """An image that is close to a query.

    Attributes:
        image: its place in the source.
        cosine: cosine of the embeddings.
    """

    image: int
    cosine: float


@dataclass(frozen=True, repr=False)
class ImageEmbeddings:
    """Embeddings of all images that an index has read, in a memory map.

    Attributes:
        kind: see `Kind`.
        matrix: one row of length 1 per image; a row of zeros if the embedding has no direction.
        places: place of each row's image in the source, rising.
        mean: what was subtracted before a row was scaled to length 1; None if nothing.
        about: the index's manifest: model, site and tokens.
    """

    kind: Kind
    matrix: Float16[Tensor, "images d"]
    places: Int64[np.ndarray, " images"]
    mean: Float32[Tensor, " d"] | None
    about: Mapping[str, Any]

    @classmethod
    def open(
        cls, path: Path, about: Mapping[str, Any], places: Int64[np.ndarray, " images"], again: str
    ) -> ImageEmbeddings:
        """Memory-map the embeddings of an index.

        Args:
            path: the file.
            about: the index's manifest.
            places: places of the images that the index has read.
            again: what to do if the file is damaged, as a sentence.

        Raises:
            SparsightError: the file is missing, cut off, or has another layout.
        """
        kind, width = about["embeddings"]["kind"], about["embeddings"]["width"]
        layout = {
            "mean": ((width,), torch.float32),
            "matrix": ((len(places), width), torch.float16),
        }
        tensors = map_tensors(path, layout, path.stat().st_size, again)
        mean = tensors["mean"] if kind == "pooled" else None
        return cls(kind, tensors["matrix"], places, mean, about)

    def __len__(self) -> int:
        return len(self.places)

    def __repr__(self) -> str:
        return f"ImageEmbeddings({self.kind}, {len(self):,} images, {self.matrix.shape[1]} wide)"

    def row_of(self, image: int) -> int:
        """Return the row of an image, by its place in the source.

        Raises:
            UserError: the index has not read the image.
        """
        row = int(np.searchsorted(self.places, image))
        if row == len(self.places) or self.places[row] != image:
            raise UserError(f"There is no image {image} among the {len(self):,} that are embedded.")
        return row

    def nearest(self, query: Float[Tensor, " d"], n: int = 16) -> list[SimilarImage]:
        """Return the images with the largest cosines to a vector, exactly.

        Args:
            query: a vector of any length, in the space of the matrix.
            n: number of images.
        """
        check_positive(n=n)
        unit = normalize(query.float(), dim=0)
        rough = self.matrix @ unit.half()  # in float16: many times faster than a copy in float32
        least = rough.topk(min(n, len(self))).values[-1:].float() - ROUNDING
        close = (rough.float() >= least).nonzero()[:, 0]
        cosines = torch.cat(
            [self.matrix[some].float() @ unit for some in close.split(ROWS_AT_ONCE)]
        )
        best = cosines.argsort(descending=True, stable=True)[:n].tolist()
        return [SimilarImage(int(self.places[close[row]]), float(cosines[row])) for row in best]

    def nearest_to(self, image: int, n: int = 16) -> list[SimilarImage]:
        """Return the images that are most like one of the index, without that one.

        Raises:
            UserError: the index has not read the image.
        """
        query = self.matrix[self.row_of(image)].float()
        return [found for found in self.nearest(query, n + 1) if found.image != image][:n]

    def nearest_to_photo(
        self, photo: str | Path | Image.Image, model: VisionModel, n: int = 16
    ) -> list[SimilarImage]:
        """Return the images of the index that are most like a photo.

        Args:
            photo: an image, or its file.
            model: the model of the index.
            n: number of images.

        Raises:
            UserError: the photo cannot be read, the model is another one, or the embeddings are of
                codes, which need the SAE.
        """
        return self.nearest(self.embed_photo(photo, model), n)

    def nearest_to_text(self, text: str, model: VisionModel, n: int = 16) -> list[SimilarImage]:
        """Return the images of the index whose joint embeddings are closest to that of a text.

        Raises:
            UserError: the embeddings are not joint, the model is another one or has no text tower,
                or the text is empty or too long.
        """
        if self.kind != "joint":
            raise UserError(
                f"The embeddings of this index are {self.kind}, so texts cannot be compared with "
                "them. Build the index with --embeddings joint and a model that has texts."
            )
        self._check_model(model)
        check_query(model, text)
        with torch.no_grad():
            return self.nearest(model.embed_texts([text])[0].cpu(), n)

    @torch.no_grad()
    def embed_photo(
        self, photo: str | Path | Image.Image, model: VisionModel
    ) -> Float[Tensor, " d"]:
        """Embed a photo as the images of the index were embedded.

        Raises:
            UserError: see `nearest_to_photo`.
        """
        if self.kind == "codes":
            raise UserError(
                "The embeddings of this index are of codes, with which a photo cannot be compared. "
                "Build the index from activations or images."
            )
        self._check_model(model)
        image = photo if isinstance(photo, Image.Image) else read_query(Path(photo), model.min_side)
        pixels = model.transform(image.convert("RGB"))[None]
        if self.kind == "joint":
            return model.embed_images(pixels)[0].cpu()
        site, tokens = self.about["site"], self.about["tokens"]
        pooled = model.read(pixels, [site], tokens)[site].float().mean(dim=1)[0].cpu()
        assert self.mean is not None
        return pooled - self.mean

    def _check_model(self, model: VisionModel) -> None:
        about = self.about["model"]
        if model.weights_hash != about.get("weights_hash"):
            raise UserError(
                f"The images of this index were embedded by {about.get('id')}, but {model.id} has "
                "other weights. Use the model of the index."
            )
