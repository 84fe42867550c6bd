"""Tables of the closest latents of each latent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor

from sparsight.activations.shards import map_tensors, write_tensors
from sparsight.latents.nearest import NOBODY, Nearest, nearest_others, nearest_rows

By = Literal["decoder", "coactivation"]
"""What makes latents close: the cosine of their decoder rows, or the correlation of their
activations over the images (see `Coactivation`)."""
KEPT = 16
"""Neighbours per latent that an index keeps."""


@dataclass(frozen=True)
class Neighbour:
    """A latent that is close to another one.

    Attributes:
        latent: its number.
        score: cosine of the decoder rows, or correlation of the activations.
        images: number of images in which both fire; None if images do not matter.
    """

    latent: int
    score: float
    images: int | None = None


@dataclass(frozen=True)
class NeighbourTable:
    """The closest latents of many latents, the closest first; −1 and 0 in empty places.

    Attributes:
        latent: numbers of the neighbours, `[latents, n]`.
        score: see `Neighbour`.
        images: see `Neighbour`.
    """

    latent: Int32[np.ndarray, "latents n"]
    score: Float32[np.ndarray, "latents n"]
    images: Int32[np.ndarray, "latents n"] | None = None

    def row(self, row: int, n: int | None = None) -> list[Neighbour]:
        """Return the neighbours of one row of the table, at most `n`."""
        images = [None] * self.latent.shape[1] if self.images is None else self.images[row].tolist()
        columns = (self.latent[row].tolist(), self.score[row].tolist(), images)
        found = [Neighbour(*each) for each in zip(*columns, strict=True) if each[0] != NOBODY]
        return found[:n]


def decoder_neighbours(
    rows: Float[Tensor, "latents d"],
    live: Bool[np.ndarray, " latents"],
    n: int = KEPT,
    *,
    quiet: bool = True,
) -> tuple[NeighbourTable, Nearest]:
    """Find the closest latents by decoder row, exactly; those that never fire are nobody's.

    Args:
        rows: decoder rows.
        live: which latents fire.
        n: neighbours per latent.
        quiet: show no progress line.

    Returns:
        The table of all latents, and the neighbours of the live ones among themselves.
    """
    alive, dead = (torch.from_numpy(np.flatnonzero(which)) for which in (live, ~live))
    among = nearest_others(rows[alive], n, title="decoder neighbours", quiet=quiet)
    of_dead = nearest_rows(rows[dead], rows[alive], n)
    row = torch.full((len(rows), n), NOBODY)
    cosine = torch.zeros(len(rows), n)
    for latents, nearest in ((alive, among), (dead, of_dead)):
        row[latents], cosine[latents] = nearest.row, nearest.cosine
    return among_live(Nearest(row, cosine), live), among


def write_neighbours(path: Path, decoder: NeighbourTable, coactive: NeighbourTable) -> None:
    """Write the tables of an index."""
    assert coactive.images is not None
    arrays = (decoder.latent, decoder.score, coactive.latent, coactive.score, coactive.images)
    tensors = map(torch.from_numpy, arrays)
    write_tensors(path, dict(zip(_LAYOUT, tensors, strict=True)))


def map_neighbours(path: Path, n_latents: int, n: int, again: str) -> dict[By, NeighbourTable]:
    """Memory-map the tables that `write_neighbours` wrote.

    Args:
        path: the file.
        n_latents: number of latents.
        n: neighbours per latent.
        again: what to do if the file is damaged, as a sentence.

    Raises:
        SparsightError: the file is missing, cut off, or has another layout.
    """
    layout = {name: ((n_latents, n), dtype) for name, dtype in _LAYOUT.items()}
    mapped = map_tensors(path, layout, path.stat().st_size, again)
    arrays = {name: tensor.numpy() for name, tensor in mapped.items()}
    return {
        "decoder": NeighbourTable(arrays["decoder.latent"], arrays["decoder.score"]),
        "coactivation": NeighbourTable(
            arrays["coactivation.latent"],
            arrays["coactivation.score"],
            arrays["coactivation.images"],
        ),
    }


_LAYOUT = {
    "decoder.latent": torch.int32,
    "decoder.score": torch.float32,
    "coactivation.latent": torch.int32,
    "coactivation.score": torch.float32,
    "coactivation.images": torch.int32,
}


def among_live(nearest: Nearest, live: Bool[np.ndarray, " latents"]) -> NeighbourTable:
    """Return neighbours among the live latents by their own numbers."""
    number = np.append(np.flatnonzero(live), NOBODY)  # −1 stays −1
    latent = number[nearest.row.numpy()].astype(np.int32)
    return NeighbourTable(latent, nearest.cosine.numpy())
