"""Latents followed from layer to layer, by edges between those active on the same images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sparsight.config import check_positive
from sparsight.errors import UserError
from sparsight.latents.coactivation import Coactivation
from sparsight.latents.postings import Postings
from sparsight.taxonomy.classifying import LayerKinds

LEAST_CORRELATION = 0.3


@dataclass(frozen=True)
class Edge:
    """Two latents of consecutive layers whose strongest activations go along over images.

    Attributes:
        layer: place of the earlier layer in the list; the other one follows it.
        latent: latent of the earlier layer.
        next_latent: latent of the later layer.
        correlation: Pearson's correlation of the strongest activations in each image.
    """

    layer: int
    latent: int
    next_latent: int
    correlation: float


def follow(
    layers: Sequence[LayerKinds], *, n: int = 1, least: float = LEAST_CORRELATION
) -> list[Edge]:
    """Link each latent with those of the next layer with which it correlates most over images.

    Args:
        layers: results of `classify`, in the order of the layers.
        n: number of latents of the next layer per latent.
        least: least correlation of an edge, from 0; negative ones make no edge.

    Raises:
        UserError: layers were classified on different numbers of images, or a number is wrong.
    """
    check_positive(n=n)
    if not 0 <= least <= 1:
        raise UserError(f"least is {least}; links need a correlation between 0 and 1.")
    edges = []
    for place, (one, other) in enumerate(itertools.pairwise(layers)):
        if one.n_images != other.n_images:
            raise UserError(
                f"{one.name} was classified on {one.n_images:,} images and {other.name} on "
                f"{other.n_images:,}: latents can be followed only over the same images."
            )
        pair = Coactivation(ActivityLists.of(one.activity), ActivityLists.of(other.activity))
        table = pair.table(n=n)
        edges += [
            Edge(place, latent, neighbour.latent, neighbour.score)
            for latent in range(one.n_latents)
            for neighbour in table.row(latent)
            if neighbour.score >= least
        ]
    return edges


@dataclass(frozen=True)
class ActivityLists:
    """Activations over a sample of images as posting lists, such as an index has.

    Attributes:
        by_latent: rows are latents.
        by_image: rows are images of the sample.
    """

    by_latent: Postings
    by_image: Postings

    @property
    def image_places(self) -> Int64[np.ndarray, " images"]:
        """Places of the images: all rows of `by_image`."""
        return np.arange(self.by_image.n_rows)

    @classmethod
    def of(cls, activity: Float[Tensor, "images n_latents"]) -> ActivityLists:
        """Turn a sparse matrix into lists."""
        return cls(_postings(activity.t()), _postings(activity))


def _postings(matrix: Float[Tensor, "rows columns"]) -> Postings:
    matrix = matrix.coalesce()
    row, column = matrix.indices()
    counts = row.bincount(minlength=matrix.shape[0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return Postings(
        offsets.numpy(), column.int().numpy(), matrix.values().float().numpy(), None,
        matrix.shape[1],
    )  # fmt: skip
