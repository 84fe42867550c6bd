"""Latents followed from layer to layer, by edges between those active on the same images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.config import check_positive
from sparsight.errors import UserError
from sparsight.taxonomy.classifying import LayerKinds

COLUMNS_AT_A_TIME = 512
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
        least: least correlation of an edge.

    Raises:
        UserError: layers were classified on different numbers of images, or a number is wrong.
    """
    check_positive(n=n)
    if not -1 <= least <= 1:
        raise UserError(f"least is {least}; a correlation lies between -1 and 1.")
    edges = []
    for place, (one, other) in enumerate(itertools.pairwise(layers)):
        if one.n_images != other.n_images:
            raise UserError(
                f"{one.name} was classified on {one.n_images:,} images and {other.name} on "
                f"{other.n_images:,}: latents can be followed only over the same images."
            )
        values, latents = strongest_partners(one.activity, other.activity, n)
        for latent, (row, partners) in enumerate(zip(values, latents, strict=True)):
            edges += [
                Edge(place, latent, int(partner), float(value))
                for value, partner in zip(row, partners, strict=True)
                if float(value) >= least
            ]
    return edges


def strongest_partners(
    one: Float[Tensor, "images n"], other: Float[Tensor, "images m"], k: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Return the k highest correlations of each column of `one`, and the columns of `other`.

    Args:
        one: sparse matrix.
        other: sparse matrix with as many rows; blocks of its columns are made dense.
        k: number of partners; all columns of `other` if it has fewer.
    """
    n_images, k = one.shape[0], min(k, other.shape[1])
    mean, deviation = _moments(one)
    other_mean, other_deviation = _moments(other)
    transposed = one.t().coalesce()
    best = torch.full((one.shape[1], k), -torch.inf)
    which = torch.zeros(one.shape[1], k, dtype=torch.int64)
    for first in range(0, other.shape[1], COLUMNS_AT_A_TIME):
        stop = min(first + COLUMNS_AT_A_TIME, other.shape[1])
        block = _dense_columns(other, first, stop)
        products = torch.sparse.mm(transposed, block).double() / n_images
        covariance = products - mean[:, None] * other_mean[None, first:stop]
        scale = deviation[:, None] * other_deviation[None, first:stop]
        defined = scale > 0
        correlation = torch.where(defined, covariance / scale.clamp(min=1e-300), -torch.inf)
        places = torch.arange(first, stop).expand(len(best), -1)
        joined = torch.cat([best, correlation.float()], dim=1)
        best, order = joined.topk(k, dim=1)
        which = torch.cat([which, places], dim=1).gather(1, order)
    return best, which


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column of a sparse matrix, zeros included."""
    x = x.coalesce()
    column, values = x.indices()[1], x.values().double()
    n = x.shape[0]
    mean = torch.zeros(x.shape[1]).double().index_add_(0, column, values) / n
    square = torch.zeros(x.shape[1]).double().index_add_(0, column, values**2) / n
    variance = square - mean**2
    variance[variance <= 1e-12 * square] = 0
    return mean, variance.sqrt()


def _dense_columns(x: Tensor, first: int, stop: int) -> Float[Tensor, "images columns"]:
    x = x.coalesce()
    row, column = x.indices()
    inside = (column >= first) & (column < stop)
    dense = torch.zeros(x.shape[0], stop - first)
    dense[row[inside], column[inside] - first] = x.values()[inside]
    return dense
