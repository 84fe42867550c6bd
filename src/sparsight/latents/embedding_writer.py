"""How an index comes by embeddings of its images: in the pass that builds it, or from its codes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from sparsight.activations import ActivationSource, LiveActivations, OrderedBatch
from sparsight.activations.shards import write_tensors
from sparsight.errors import UserError
from sparsight.latents.embeddings import EMBEDDING, ROWS_AT_ONCE, Kind
from sparsight.latents.postings import Postings

Wanted = Literal["auto", "joint", "pooled", "codes", "none"]
"""The kind of embeddings that an index gets; `auto`: `joint` if the activations have the site
`embedding`, otherwise `pooled`; `codes` if there are no activations."""
CODE_WIDTH = 512


def embedding_kind(wanted: Wanted, activations: ActivationSource | None) -> Kind | None:
    """Return the kind of embeddings that an index gets, None for none.

    Args:
        wanted: what the user asks for.
        activations: the activations from which it is built; None if from codes.

    Raises:
        UserError: there is nothing from which to make this kind.
    """
    if wanted == "none":
        return None
    if wanted == "auto":
        if activations is None:
            return "codes"
        return "joint" if EMBEDDING in activations.sites else "pooled"
    if wanted == "joint" and not (activations is not None and _has_joint(activations)):
        raise UserError(
            "Joint embeddings need a model with a joint space of images and texts, or a store with "
            f"the site {EMBEDDING!r}. Use --embeddings pooled."
        )
    if wanted == "pooled" and activations is None:
        raise UserError(
            "Pooled embeddings need activations, and codes have none. Use --embeddings codes, or "
            "build the index without --codes."
        )
    return wanted


def _has_joint(activations: ActivationSource) -> bool:
    return EMBEDDING in activations.sites or (
        isinstance(activations, LiveActivations) and activations.model.has_joint_space
    )


class EmbeddingRecorder:
    """Embeddings on their way to disk, batch after batch; memory holds none of them.

    Args:
        kind: what to record; `codes` are not recorded, but made from posting lists at the end.
        site: the site whose vectors are averaged.
    """

    def __init__(self, kind: Kind, site: str) -> None:
        self.kind = kind
        self.site = EMBEDDING if kind == "joint" else site
        self.total = torch.zeros(0, dtype=torch.float64)
        self.n = 0
        self._path = Path()
        self._file: IO[bytes] | None = None

    def begin(self, folder: Path) -> None:
        """Open a temporary file in a folder."""
        self._path = folder / "embeddings.raw"
        self._file = self._path.open("wb")

    def add(self, batch: OrderedBatch) -> None:
        """Add the images of a batch."""
        if self.kind == "codes" or self._file is None or not len(batch.image_indices):
            return
        rows = batch.activations[self.site].float().mean(dim=1)
        if not self.n:
            self.total = torch.zeros(rows.shape[1], dtype=torch.float64)
        self.total += rows.double().sum(0).cpu()
        self.n += len(rows)
        rows.cpu().contiguous().numpy().tofile(self._file)

    def write(
        self, path: Path, by_image: Postings, places: Int64[np.ndarray, " images"], seed: int
    ) -> int:
        """Write the embeddings, centred if they are pooled, and remove the temporary file.

        Args:
            path: the file.
            by_image: latents by image.
            places: places of the images that were read.
            seed: seed of the directions of `codes`.

        Returns:
            Their width.
        """
        assert self._file is not None
        self._file.close()
        if self.kind == "codes":
            self._path.unlink()
            return write_code_embeddings(path, by_image, places, seed)
        width = len(self.total)
        rows = _mapped(self._path, self.n, width, torch.float32)
        mean = (self.total / max(self.n, 1)).float()
        if self.kind == "joint":
            mean.zero_()
        halves = self._path.with_suffix(".half")
        with halves.open("wb") as file:
            for some in rows.split(ROWS_AT_ONCE):
                normalize(some - mean, dim=1).half().numpy().tofile(file)
        write_tensors(path, {"mean": mean, "matrix": _mapped(halves, self.n, width, torch.float16)})
        self._path.unlink()
        halves.unlink()
        return width


def _mapped(path: Path, n: int, width: int, dtype: torch.dtype) -> Float[Tensor, "n width"]:
    """Memory-map a file of rows."""
    rows = torch.from_file(str(path), shared=False, size=n * width, dtype=dtype)
    return rows.view(n, width)


def write_code_embeddings(
    path: Path, by_image: Postings, places: Int64[np.ndarray, " images"], seed: int
) -> int:
    """Write embeddings of images from the latents that fire in them.

    Each latent has a random direction; an image is the sum of its latents' directions, weighted by
    their strongest activations (Johnson and Lindenstrauss 1984: distances change by few per cent).

    Args:
        path: the file.
        by_image: latents by image.
        places: places of the images that were read.
        seed: seed of the directions.

    Returns:
        The width.
    """
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(by_image.n_columns, CODE_WIDTH, generator=random)
    halves = path.with_suffix(".half")
    with halves.open("wb") as file:
        for chosen in _code_embeddings(by_image, directions, places):
            chosen.half().numpy().tofile(file)
    matrix = _mapped(halves, len(places), CODE_WIDTH, torch.float16)
    write_tensors(path, {"mean": torch.zeros(CODE_WIDTH), "matrix": matrix})
    halves.unlink()
    return CODE_WIDTH


def _code_embeddings(
    by_image: Postings,
    directions: Float[Tensor, "latents width"],
    places: Int64[np.ndarray, " images"],
) -> Iterator[Float[Tensor, "some width"]]:
    """Yield the unit rows of images that were read, block by block."""
    for rows in by_image.blocks():
        bounds = by_image.offsets[rows.start : rows.stop + 1]
        here = slice(int(bounds[0]), int(bounds[-1]))
        summed = embedding_bag(
            torch.from_numpy(by_image.columns[here].astype(np.int64)),
            directions,
            torch.from_numpy(bounds[:-1] - bounds[0]),
            mode="sum",
            per_sample_weights=torch.from_numpy(by_image.values[here].copy()),
        )
        read = places[(places >= rows.start) & (places < rows.stop)]
        yield normalize(summed[torch.from_numpy(read - rows.start)], dim=1)
        by_image.release()
