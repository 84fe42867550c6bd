"""Near misses: images most like those in which a latent fires, in which it does not fire."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor
from torch.nn.functional import normalize

from sparsight.images import sample_places
from sparsight.latents.embeddings import ImageEmbeddings
from sparsight.latents.examples import Examples
from sparsight.latents.nearest import NOBODY
from sparsight.latents.postings import Postings
from sparsight.progress import progress

KEPT = 8
"""Near misses per latent."""
MOST_CANDIDATES = 50_000
"""With more images than this, near misses come from a random sample of them."""
LATENTS_AT_ONCE = 512


@dataclass(frozen=True)
class NearMisses:
    """Near misses of all latents, the closest first; −1 and 0 in empty places.

    Attributes:
        image: places of the images, `[latents, n]`.
        cosine: cosine with the centre of the images that activate the latent most.
    """

    image: Int64[Tensor, "latents n"]
    cosine: Float32[Tensor, "latents n"]


def candidate_rows(
    n_images: int, once: Bool[np.ndarray, " images"] | None, seed: int
) -> Int64[Tensor, " candidates"]:
    """Return the rows of embeddings among which near misses are sought.

    Args:
        n_images: number of embedded images.
        once: which images count; near-duplicates of others do not. Default: all.
        seed: seed of the sample, if there are more than `MOST_CANDIDATES`.
    """
    rows = np.arange(n_images) if once is None else np.flatnonzero(once)
    if len(rows) > MOST_CANDIDATES:
        rows = rows[sample_places(len(rows), MOST_CANDIDATES, seed)]
    return torch.from_numpy(rows.astype(np.int64))


@torch.no_grad()
def find_near_misses(
    embeddings: ImageEmbeddings,
    top: Examples,
    by_latent: Postings,
    candidates: Int64[Tensor, " candidates"],
    n: int = KEPT,
    *,
    quiet: bool = True,
) -> NearMisses:
    """Find near misses of every latent.

    A latent's images have the centre c = Σ a e / |Σ a e| over its top-activating images, with
    activation a and embedding e. Its near misses are the candidates in which it does not fire with
    the largest cosine to c. Memory holds the candidates and `LATENTS_AT_ONCE` latents' cosines.

    Args:
        embeddings: embeddings of the images.
        top: top-activating images of every latent.
        by_latent: all images in which each latent fires.
        candidates: rows of `embeddings`.
        n: near misses per latent.
        quiet: show no progress line.
    """
    n_latents = by_latent.n_rows
    matrix = embeddings.matrix[candidates].float()
    places = torch.from_numpy(embeddings.places.copy())
    row_of = torch.full((by_latent.n_columns,), NOBODY)
    row_of[places] = torch.arange(len(places))
    candidate_of = torch.full((by_latent.n_columns,), NOBODY)
    candidate_of[places[candidates]] = torch.arange(len(candidates))
    image = torch.full((n_latents, n), NOBODY)
    cosine = torch.zeros(n_latents, n)
    with progress("near misses", n_latents, "latents", quiet=quiet) as line:
        for start in range(0, n_latents, LATENTS_AT_ONCE):
            stop = min(start + LATENTS_AT_ONCE, n_latents)
            images, weights = top.image[start:stop], top.activation[start:stop].clamp(min=0)
            rows = row_of[images.clamp(min=0)].clamp(min=0)
            weights = weights * (images >= 0)
            centre = (embeddings.matrix[rows].float() * weights[:, :, None]).sum(1)
            cosines = normalize(centre, dim=1) @ matrix.T
            cosines[(weights.sum(1) == 0)] = -torch.inf
            _leave_out_firing(cosines, by_latent, start, stop, candidate_of)
            best, place = cosines.topk(min(n, len(candidates)), dim=1)
            there = best > -torch.inf
            here = (slice(start, stop), slice(0, best.shape[1]))
            image[here] = torch.where(there, places[candidates[place]], NOBODY)
            cosine[here] = torch.where(there, best, 0.0)
            line.advance(stop - start)
    return NearMisses(image, cosine)


def _leave_out_firing(
    cosines: Tensor, by_latent: Postings, start: int, stop: int, candidate_of: Tensor
) -> None:
    """Set the cosines of images in which a latent fires to −∞."""
    for latent in range(start, stop):
        images = torch.from_numpy(by_latent.row(latent)[0].astype(np.int64))
        fires = candidate_of[images]
        cosines[latent - start, fires[fires != NOBODY]] = -torch.inf
