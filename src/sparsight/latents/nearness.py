"""What an index knows of nearness, while it is built: embeddings, repeats, near misses, neighbours,
the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sparsight.activations import ActivationSource, LiveActivations
from sparsight.activations.shards import write_tensors
from sparsight.latents.coactivation import Coactivation
from sparsight.latents.duplicates import EXACT_IMAGES, THRESHOLDS, first_of_kind
from sparsight.latents.embedding_writer import EmbeddingRecorder, Wanted, embedding_kind
from sparsight.latents.embeddings import EMBEDDING, ImageEmbeddings
from sparsight.latents.examples import Examples
from sparsight.latents.index_files import AGAIN, EMBEDDINGS, NEAR_MISSES, NEIGHBOURS
from sparsight.latents.layout import NEIGHBOURS as ON_THE_MAP
from sparsight.latents.layout import map_rows
from sparsight.latents.near_misses import candidate_rows, find_near_misses
from sparsight.latents.nearest import Nearest
from sparsight.latents.neighbour_tables import decoder_neighbours, write_neighbours
from sparsight.latents.postings import Postings


@dataclass(frozen=True)
class NearnessSettings:
    """Which of it an index gets.

    Attributes:
        embeddings: kind of the images' embeddings; without them, there are neither near misses nor
            a search for near-duplicates.
        neighbours: find the neighbours of every latent, and its place on the map.
    """

    embeddings: Wanted = "auto"
    neighbours: bool = True


def recording(
    wanted: Wanted, activations: ActivationSource, site: str
) -> tuple[ActivationSource, EmbeddingRecorder | None]:
    """Prepare to record embeddings in a pass over activations.

    Returns:
        The activations, with the site of joint embeddings if it is needed; and the recorder.

    Raises:
        UserError: the activations cannot give this kind.
    """
    kind = embedding_kind(wanted, activations)
    if kind is None:
        return activations, None
    if (
        kind == "joint"
        and isinstance(activations, LiveActivations)
        and EMBEDDING not in activations.sites
    ):
        activations = activations.with_sites([*activations.sites, EMBEDDING])
    return activations, EmbeddingRecorder(kind, site)


@dataclass(frozen=True)
class _Parts:
    """The posting lists of an index that is being built."""

    by_latent: Postings
    by_image: Postings
    image_places: Int64[np.ndarray, " images"]


class Nearness:
    """Writes what is near what into the folder of an index that is being built.

    Args:
        folder: the folder; both posting lists are there.
        by_latent: images by latent.
        by_image: latents by image.
        places: places of the images that were read.
        seed: seed of all samples and of the map.
        quiet: show no progress lines.

    Attributes:
        about: facts for the manifest.
    """

    def __init__(
        self,
        folder: Path,
        by_latent: Postings,
        by_image: Postings,
        places: Int64[np.ndarray, " images"],
        seed: int,
        quiet: bool,
    ) -> None:
        self.folder, self.seed, self.quiet = folder, seed, quiet
        self.parts = _Parts(by_latent, by_image, places)
        self.about: dict[str, Any] = {}
        self._embeddings: ImageEmbeddings | None = None
        self._first: Int64[Tensor, " images"] | None = None

    def embed(self, recorder: EmbeddingRecorder | None) -> Int64[Tensor, " places"] | None:
        """Write the embeddings, and find images that are nearly the same.

        Returns:
            For each place, the first image that its image nearly repeats, or itself; None without
            embeddings.
        """
        if recorder is None:
            return None
        path, places = self.folder / EMBEDDINGS, self.parts.image_places
        width = recorder.write(path, self.parts.by_image, places, self.seed)
        self.about["embeddings"] = {"kind": recorder.kind, "width": width}
        embeddings = ImageEmbeddings.open(path, self.about, places, AGAIN)
        threshold = THRESHOLDS[recorder.kind]
        first = first_of_kind(embeddings.matrix, threshold, seed=self.seed, quiet=self.quiet)
        self._embeddings, self._first = embeddings, first
        self.about["near_duplicates"] = {
            "threshold": threshold,
            "n_images": int((first != torch.arange(len(first))).sum()),
            "all_pairs": len(first) <= EXACT_IMAGES,
        }
        of_place = torch.arange(self.parts.by_image.n_rows)
        rows = torch.from_numpy(places.copy())
        of_place[rows] = rows[first]
        return of_place

    def miss(self, top: Examples) -> None:
        """Write the near misses of every latent, if there are embeddings."""
        if self._embeddings is None or self._first is None:
            return
        once = (self._first == torch.arange(len(self._first))).numpy()
        candidates = candidate_rows(len(once), once, self.seed)
        found = find_near_misses(
            self._embeddings, top, self.parts.by_latent, candidates, quiet=self.quiet
        )
        write_tensors(self.folder / NEAR_MISSES, {"image": found.image, "cosine": found.cosine})
        self.about["near_misses"] = {"n_candidates": len(candidates), "n": found.image.shape[1]}

    def neighbours(self, rows: Float[Tensor, "latents d"], table: pa.Table) -> pa.Table:
        """Write the neighbours of every latent, and put the latents on the map.

        Latents that never fire have no place on the map and are nobody's neighbours.

        Args:
            rows: decoder rows.
            table: one row per latent; see `LatentIndex.table`.

        Returns:
            The table with places on the map.
        """
        live = self.parts.by_latent.counts > 0
        decoder, among = decoder_neighbours(rows, live, quiet=self.quiet)
        coactivation = Coactivation(self.parts, sample=self.seed)
        write_neighbours(self.folder / NEIGHBOURS, decoder, coactivation.table(quiet=self.quiet))
        self.about["neighbours"] = {
            "coactivation_images": coactivation.n_images,
            "n": decoder.latent.shape[1],
        }
        nearest = Nearest(among.row[:, :ON_THE_MAP], among.cosine[:, :ON_THE_MAP])
        alive = torch.from_numpy(np.flatnonzero(live))
        places = np.zeros((len(live), 2), np.float32)
        places[live] = map_rows(rows[alive], nearest, seed=self.seed, quiet=self.quiet).numpy()
        for column, name in enumerate(("map_x", "map_y")):
            values = pa.array(np.ascontiguousarray(places[:, column]), mask=~live)
            table = table.set_column(table.schema.get_field_index(name), name, values)
        return table
