"""Posting lists: where each latent fires, and what fires in each image, as files in memory maps."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import numpy as np
import torch
from jaxtyping import Float32, Int, Int32, Int64, UInt16
from torch import Tensor

from sparsight.activations.shards import map_tensors, write_tensors

ENTRIES_AT_ONCE = 1 << 20
"""Entries of the posting lists that are in memory at any moment while an index is built."""

COLLECTED_AT_ONCE = 8 * ENTRIES_AT_ONCE
"""Entries that are collected at once to make the lists by latent, 18 bytes each."""

_LAYOUT = {"columns": torch.int32, "values": torch.float32, "tokens": torch.uint16}
_NUMPY = {"columns": np.int32, "values": np.float32, "tokens": np.uint16}


@dataclass(frozen=True)
class Postings:
    """A sparse matrix of activations in compressed rows: latents × images, or the reverse.

    An entry is one latent that fires in one image, with its strongest activation there.

    Attributes:
        offsets: row `i` has the entries `offsets[i]` to `offsets[i + 1]`.
        columns: column of each entry; rising within a row.
        values: the latent's strongest activation in the image.
        tokens: the first position that has this activation, among the tokens that the SAE reads;
            None in the lists by image.
        n_columns: number of columns.
        mapped: whether the arrays lie in a memory map of a file.
    """

    offsets: Int64[np.ndarray, " rows_and_one"]
    columns: Int32[np.ndarray, " entries"]
    values: Float32[np.ndarray, " entries"]
    tokens: UInt16[np.ndarray, " entries"] | None
    n_columns: int
    mapped: bool = False

    @classmethod
    def open(
        cls, path: Path, n_rows: int, n_columns: int, n_entries: int, *, tokens: bool, again: str
    ) -> Self:
        """Memory-map a file of posting lists.

        Args:
            path: the file.
            n_rows: number of rows.
            n_columns: number of columns.
            n_entries: number of entries.
            tokens: whether the file has positions.
            again: what to do if the file is damaged, as a sentence.

        Raises:
            SparsightError: the file is missing, cut off, or has another layout.
        """
        kinds = {"offsets": torch.int64, **_LAYOUT}
        if not tokens:
            del kinds["tokens"]
        layout = {
            name: ((n_rows + 1 if name == "offsets" else n_entries,), kind)
            for name, kind in kinds.items()
        }
        mapped = map_tensors(path, layout, path.stat().st_size, again)
        offsets, columns, values = (
            mapped[name].numpy() for name in ("offsets", "columns", "values")
        )
        return cls(
            offsets,
            columns,
            values,
            mapped["tokens"].numpy() if tokens else None,
            n_columns,
            mapped=True,
        )

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    @property
    def counts(self) -> Int64[np.ndarray, " rows"]:
        """Number of entries of each row."""
        lengths: Int64[np.ndarray, " rows"] = np.diff(self.offsets)
        return lengths

    def row(self, row: int) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Return the columns (rising) and values of a row.

        Raises:
            IndexError: the row does not exist; negative numbers do not count from the end.
        """
        if not 0 <= row < self.n_rows:
            raise IndexError(f"no row {row}; there are rows 0 to {self.n_rows - 1}")
        entries = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return self.columns[entries], self.values[entries]

    def release(self) -> None:
        """Let go of the pages that were read, which count as memory of the process; they are read
        again when needed. Does nothing but on Linux, and to arrays that are not mapped.
        """
        if sys.platform != "linux" or not self.mapped:
            return
        page = mmap.PAGESIZE
        for array in (self.offsets, self.columns, self.values, self.tokens):
            if array is None or not array.nbytes:
                continue
            first = array.ctypes.data
            start = first // page * page
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(start),
                ctypes.c_size_t(first + array.nbytes - start),
                mmap.MADV_DONTNEED,
            )

    def blocks(self, n_entries: int | None = None) -> Iterator[range]:
        """Divide the rows into ranges of at most `n_entries` entries (default: `ENTRIES_AT_ONCE`),
        or of one row.
        """
        return row_blocks(self.offsets, n_entries or ENTRIES_AT_ONCE)

    def rows_of(self, rows: range) -> Int64[np.ndarray, " n"]:
        """Return the row of each entry in a range of rows."""
        lengths = np.diff(self.offsets[rows.start : rows.stop + 1])
        return np.repeat(np.arange(rows.start, rows.stop), lengths)


def row_blocks(offsets: Int64[np.ndarray, " n"], n_entries: int) -> Iterator[range]:
    """Divide compressed rows into ranges of at most `n_entries` entries, or of one row."""
    first, n_rows = 0, len(offsets) - 1
    while first < n_rows:
        most = int(offsets[first]) + n_entries
        stop = max(first + 1, int(np.searchsorted(offsets, most, side="right")) - 1)
        yield range(first, min(stop, n_rows))
        first = stop


class PostingSpool:
    """Entries on their way to disk, image after image; memory holds none of them.

    Args:
        folder: an empty folder for temporary files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.n_entries = 0
        self._images: list[Int64[np.ndarray, " n"]] = []
        self._counts: list[Int64[np.ndarray, " n"]] = []
        self._files = ExitStack()
        self._raw = {name: self._files.enter_context(_raw(folder, name)) for name in _LAYOUT}

    def add(
        self,
        image: Int[Tensor, " n"],
        latent: Int[Tensor, " n"],
        value: Float32[Tensor, " n"],
        token: Int[Tensor, " n"],
    ) -> None:
        """Append entries in the order of images (by place, rising), then of latents."""
        places, counts = image.unique_consecutive(return_counts=True)
        self._images.append(places.numpy())
        self._counts.append(counts.numpy())
        self.n_entries += len(image)
        for name, column in (("columns", latent), ("values", value), ("tokens", token)):
            self._raw[name].write(column.to(_LAYOUT[name]).contiguous().numpy().data)

    def write(self, by_image: Path, by_latent: Path, n_places: int, n_latents: int) -> None:
        """Write both files of posting lists, and remove the temporary ones.

        Lists by latent are collected for one range of latents after the other, so that memory holds
        `ENTRIES_AT_ONCE` entries, whatever the number of images.

        Args:
            by_image: file of the lists by image.
            by_latent: file of the lists by latent.
            n_places: number of images in the source.
            n_latents: number of latents.
        """
        self._files.close()
        offsets = np.zeros(n_places + 1, dtype=np.int64)
        for places, counts in zip(self._images, self._counts, strict=True):
            offsets[places + 1] = counts
        offsets = offsets.cumsum()
        spooled = self._mapped("")
        write_tensors(
            by_image,
            {"offsets": torch.from_numpy(offsets)}
            | {name: spooled[name] for name in ("columns", "values")},
        )
        del spooled  # its pages count as memory
        of_latents = self._count_latents(n_latents)
        self._transpose(offsets, of_latents)
        transposed = self._mapped("transposed-")
        write_tensors(by_latent, {"offsets": torch.from_numpy(of_latents), **transposed})
        del transposed
        for name in _LAYOUT:
            (self.folder / f"{name}.raw").unlink()
            (self.folder / f"transposed-{name}.raw").unlink()

    def _count_latents(self, n_latents: int) -> Int64[np.ndarray, " latents_and_one"]:
        counts = np.zeros(n_latents + 1, dtype=np.int64)
        for start in range(0, self.n_entries, ENTRIES_AT_ONCE):
            part = self._read("columns", start, start + ENTRIES_AT_ONCE)
            counts[1:] += np.bincount(part, minlength=n_latents)
        offsets: Int64[np.ndarray, " latents_and_one"] = counts.cumsum()
        return offsets

    def _transpose(
        self,
        of_images: Int64[np.ndarray, " images_and_one"],
        of_latents: Int64[np.ndarray, " latents_and_one"],
    ) -> None:
        with ExitStack() as files:
            raw = [files.enter_context(_raw(self.folder, f"transposed-{name}")) for name in _LAYOUT]
            for block in row_blocks(of_latents, COLLECTED_AT_ONCE):
                parts = [
                    self._entries_of(block, images, of_images)
                    for images in row_blocks(of_images, ENTRIES_AT_ONCE)
                ]
                latent, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
                del parts
                order = np.argsort(latent, kind="stable")  # so images keep rising
                for file, column in zip(raw, columns, strict=True):
                    file.write(column[order].data)

    def _entries_of(
        self, latents: range, images: range, of_images: Int64[np.ndarray, " images_and_one"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Read latent, image, value and token of a range of images; keep a range of latents."""
        start, stop = int(of_images[images.start]), int(of_images[images.stop])
        latent, value, token = (self._read(name, start, stop) for name in _LAYOUT)
        lengths = np.diff(of_images[images.start : images.stop + 1])
        image = np.repeat(np.arange(images.start, images.stop, dtype=np.int32), lengths)
        own = (latent >= latents.start) & (latent < latents.stop)
        return latent[own], image[own], value[own], token[own]

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read entries from a temporary file, without a map."""
        kind = np.dtype(_NUMPY[name])
        return np.fromfile(
            self.folder / f"{name}.raw", kind, stop - start, offset=start * kind.itemsize
        )

    def _mapped(self, prefix: str) -> dict[str, Tensor]:
        n = self.n_entries
        return {
            name: torch.from_file(
                str(self.folder / f"{prefix}{name}.raw"), shared=False, size=n, dtype=kind
            )
            if n
            else torch.zeros(0, dtype=kind)
            for name, kind in _LAYOUT.items()
        }


def _raw(folder: Path, name: str) -> IO[bytes]:
    return (folder / f"{name}.raw").open("wb")
