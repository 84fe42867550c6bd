"""An index as Parquet files, for SQL: posting lists, latents, images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.errors import UserError
from sparsight.folders import replaced
from sparsight.latents.index import LatentIndex
from sparsight.latents.index_files import MANIFEST
from sparsight.latents.postings import Postings
from sparsight.progress import progress

POSTINGS, LATENTS, IMAGES = "postings.parquet", "latents.parquet", "images.parquet"
ROW_GROUP = 122_880
"""Rows per row group: DuckDB's own size, which it reads many times as fast as smaller ones."""

_SCHEMA = pa.schema(
    [
        ("latent", pa.int32()),
        ("image", pa.int64()),
        ("activation", pa.float32()),
        ("token", pa.uint16()),
    ]
)


def export_index(index: LatentIndex, out: str | Path, *, quiet: bool = False) -> Path:
    """Write an index as Parquet files for DuckDB, pyarrow, pandas and other readers.

    `postings.parquet` has one row per latent and image in which it fires, ordered by latent and
    then image: `latent`, `image` (place in the source), `activation` (the strongest in the image)
    and `token` (its position). `latents.parquet` is the table of the index, and `images.parquet`
    has id, origin, label and caption of each image. Existing files of these names are replaced once
    all new ones are complete. Memory holds one row group.

    Args:
        index: the index.
        out: folder of the files; it may hold other files, but no index, store or codes.
        quiet: show no progress bar.

    Returns:
        The folder.

    Raises:
        UserError: the index has format version 1, or the folder holds an index, a store or codes.
        SparsightError: the disk is full or the folder cannot be written.
    """
    folder = Path(out)
    postings = index.by_latent
    if (folder / MANIFEST).exists():
        raise UserError(
            f"{folder}: holds an index, activations or codes, whose files would be overwritten. "
            "Choose another folder."
        )
    with (
        replaced(folder, (POSTINGS, LATENTS, IMAGES)) as staged,
        progress("export", len(postings.columns), "entries", quiet=quiet) as line,
    ):
        order = [pq.SortingColumn(0), pq.SortingColumn(1)]
        with pq.ParquetWriter(
            staged / POSTINGS, _SCHEMA, compression="zstd", sorting_columns=order
        ) as writer:
            for group in _groups(postings):
                writer.write_table(group, row_group_size=ROW_GROUP)
                line.advance(group.num_rows)
        pq.write_table(index.table, staged / LATENTS, compression="zstd")
        pq.write_table(index.images, staged / IMAGES, compression="zstd")
    return folder


def _groups(postings: Postings) -> Iterator[pa.Table]:
    assert postings.tokens is not None  # lists by latent have positions
    offsets = postings.offsets
    for start in range(0, len(postings.columns), ROW_GROUP):
        stop = min(start + ROW_GROUP, len(postings.columns))
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        last = int(np.searchsorted(offsets, stop, side="left"))
        lengths = np.diff(offsets[first : last + 1].clip(start, stop))
        columns = [
            np.repeat(np.arange(first, last, dtype=np.int32), lengths),
            *(part[start:stop] for part in (postings.columns, postings.values, postings.tokens)),
        ]
        kinds = _SCHEMA.types
        arrays = [pa.array(part, kind) for part, kind in zip(columns, kinds, strict=True)]
        yield pa.table(arrays, schema=_SCHEMA)
