"""A shard of activations on its way to the disk, with the rows about its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from sparsight.images import ImageInfo

IMAGE_ROWS = pa.schema(
    [
        ("index", pa.int64()),
        ("id", pa.string()),
        ("uri", pa.string()),
        ("label", pa.string()),
        ("caption", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
    ]
)


Row = dict[str, Any]
"""The columns of `images.parquet`."""


def image_row(index: int, info: ImageInfo, size: tuple[int, int] | None, reason: str | None) -> Row:
    """Return the row about an image, read (`size`) or failed (`reason`)."""
    width, height = size or (None, None)
    return {
        "index": index,
        "id": info.id,
        "uri": info.uri,
        "label": info.label,
        "caption": info.caption,
        "width": width,
        "height": height,
        "status": "ok" if reason is None else "failed",
        "reason": reason,
    }


class Filled(NamedTuple):
    """How much of a buffer counts: whole batches only."""

    n_rows: int
    n_images: int


@dataclass
class ShardBuffer:
    """One shard of every site, while it is being filled.

    Attributes:
        number: the shard's number.
        first: first image of the source that it covers.
        x: for each site, room for all its images.
        rows: rows of `images.parquet`.
        filled: number of rows and of images that are in; more may be on their way.
    """

    number: int
    first: int
    x: Mapping[str, Float[Tensor, "images tokens d_in"]]
    rows: list[Row] = field(default_factory=list)
    filled: Filled = field(default=Filled(0, 0))

    def add(
        self,
        rows: Sequence[Row],
        activations: Mapping[str, Float[Tensor, "batch tokens d_in"]],
    ) -> None:
        """Append a batch.

        Args:
            rows: about all images of the batch, in order; see `image_row`.
            activations: of the images that were read; empty if there are none.
        """
        start = stop = self.filled.n_images
        for row in rows:
            read = row["status"] == "ok"
            row["shard"], row["row"] = (self.number, stop) if read else (None, None)
            stop += read
        for site, x in activations.items():
            self.x[site][start:stop].copy_(x)
        del self.rows[self.filled.n_rows :]
        self.rows.extend(rows)
        self.filled = Filled(len(self.rows), stop)  # in one step: a stop may come at any point

    def part(self, unfinished: bool) -> ShardPart:
        """Return what is in now; later additions do not change it."""
        n_rows, n_images = self.filled
        x = {site: x[:n_images] for site, x in self.x.items()}
        return ShardPart(self.number, self.first, x, self.rows[:n_rows], n_images, unfinished)


class ShardPart(NamedTuple):
    """A shard, or the part of one that exists so far, on its way to the disk."""

    number: int
    first: int
    x: Mapping[str, Tensor]
    rows: Sequence[Row]
    n_images: int
    unfinished: bool

    @property
    def stop(self) -> int:
        """The image after the last."""
        return self.first + len(self.rows)
