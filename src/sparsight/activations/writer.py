"""Writes a store shard by shard, so that a cut at any byte costs one shard of work at most.

A shard is committed in one step: when the manifest that names it is renamed into place. All that
is written before (the shard of each site, its sums, the rows about its images) is named after its
number, and written again if the manifest never came. Sums and rows wait in `journal/` until the
last shard; then they become `stats.safetensors` and `images.parquet`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.activations.manifest import (
    DTYPES,
    IMAGES,
    Manifest,
    Shard,
    shard_path,
    stats_path,
)
from sparsight.activations.shards import ACTIVATIONS, check_size, read_tensors, write_tensors
from sparsight.activations.statistics import RunningSums
from sparsight.errors import SparsightError
from sparsight.files import atomic_path, remove_temporaries, sha256_file
from sparsight.images import ImageInfo

JOURNAL = "journal"

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


@dataclass
class ShardBuffer:
    """One shard of every site, being filled.

    Attributes:
        number: of the shard.
        first: first image of the source that it covers.
        stop: the image after the last.
        x: for each site, room for all its images.
        n_images: images that are in.
        rows: of `images.parquet`.
        n_ok: how many of them are of images that were read.
    """

    number: int
    first: int
    stop: int
    x: Mapping[str, Float[Tensor, "images tokens d_in"]]
    n_images: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    n_ok: int = 0

    def add_row(
        self, index: int, info: ImageInfo, size: tuple[int, int] | None, reason: str | None
    ) -> None:
        """Record an image, read (`size`) or failed (`reason`); rows come in order."""
        read = reason is None
        width, height = size or (None, None)
        self.rows.append(
            {
                "index": index,
                "id": info.id,
                "uri": info.uri,
                "label": info.label,
                "caption": info.caption,
                "width": width,
                "height": height,
                "status": "ok" if read else "failed",
                "reason": reason,
                "shard": self.number if read else None,
                "row": self.n_ok if read else None,
            }
        )
        self.n_ok += read

    def add(self, activations: Mapping[str, Float[Tensor, "batch tokens d_in"]]) -> None:
        """Put a batch behind the ones that are in."""
        n = len(next(iter(activations.values())))
        for site, x in activations.items():
            self.x[site][self.n_images : self.n_images + n].copy_(x)
        self.n_images += n


class StoreWriter:
    """Commits shards in the background; used as a context around `commit`.

    Args:
        folder: of the store.
        manifest: what is there already.

    Raises:
        SparsightError: what is there already is damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._threads = ThreadPoolExecutor(2)  # one commits; one sums while it writes and hashes
        self._pending: Future[None] | None = None
        self._room: dict[int, dict[str, Tensor]] = {}
        self._started = len(manifest.shards)
        self._clean()

    def buffer(self, first: int, stop: int) -> ShardBuffer:
        """The next shard to fill; at most two exist at a time, one filled and one written."""
        turn = self._started % 2
        if turn not in self._room:
            images = min(self.manifest.shard_images, self.manifest.images["n_images"])
            self._room[turn] = {site: self._empty(site, images) for site in self.manifest.sites}
        self._started += 1
        return ShardBuffer(self._started - 1, first, stop, self._room[turn])

    def commit(self, buffer: ShardBuffer) -> None:
        """Write a shard, once the one before is written; returns at once."""
        self._wait()
        self._pending = self._threads.submit(self._commit, buffer)

    def failures(self) -> Iterator[tuple[str, str]]:
        """Id and reason of each failed image of the shards so far.

        Raises:
            SparsightError: a file of the journal is damaged.
        """
        if not self.manifest.failed:
            return
        for number in range(len(self.manifest.shards)):
            for row in self._journal_rows(number).to_pylist():
                if row["status"] == "failed":
                    yield row["id"], row["reason"]

    def close_store(self) -> None:
        """Bring sums and rows together and declare the store complete.

        Raises:
            SparsightError: a file of the journal is damaged, or the disk is full.
        """
        files = {}
        for position, site in enumerate(self.manifest.sites):
            running = RunningSums.nothing(self.manifest.d_in[site])
            for number, shard in enumerate(self.manifest.shards):
                sums = self._journal_sums(number)
                count = shard.n_images * self.manifest.n_tokens[site]
                total, squares = sums[f"{position}.total"], sums[f"{position}.squares"]
                running.merge(RunningSums(count, total, squares))
            found = running.statistics()
            path = stats_path(self.folder, site)
            files[path.relative_to(self.folder).as_posix()] = write_tensors(
                path,
                {
                    "count": torch.tensor(found.count),
                    "mean": found.mean,
                    "second_moment": found.second_moment,
                },
            )
        with (
            atomic_path(self.folder / IMAGES) as temporary,
            pq.ParquetWriter(temporary, IMAGE_ROWS) as writer,
        ):
            for number in range(len(self.manifest.shards)):
                writer.write_table(self._journal_rows(number))
        files[IMAGES] = sha256_file(self.folder / IMAGES)
        self.manifest = replace(self.manifest, state="complete", files=files)
        self.manifest.write(self.folder)
        shutil.rmtree(self.folder / JOURNAL, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            # After an error too, the shard under way is finished: it is whole.
            self._threads.shutdown()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _clean(self) -> None:
        """Remove what a killed process left, and look at what it committed."""
        number = len(self.manifest.shards)
        folders = [self.folder / site for site in self.manifest.sites]
        for folder in (self.folder, self.folder / JOURNAL, *folders):
            remove_temporaries(folder)
        for path in (each for folder in folders for each in folder.glob("shard-*.safetensors")):
            found = re.fullmatch(r"shard-(\d+)", path.stem)
            if found and int(found[1]) >= number:
                path.unlink()
        for number, shard in enumerate(self.manifest.shards):
            for site in self.manifest.sites:
                check_size(shard_path(self.folder, site, number), shard.n_bytes[site])
            for ending in ("parquet", "safetensors"):
                if not self._journal(number, ending).exists():
                    raise _damaged(self._journal(number, ending), "there is no such file")
            # Before hours of work: what is in them is needed when the last shard is written.
            self._journal_rows(number)
            self._journal_sums(number)

    def _commit(self, buffer: ShardBuffer) -> None:
        """Write a shard of each site, its sums and rows, and last the manifest."""
        number = buffer.number
        sha256, n_bytes, sums = {}, {}, {}
        for position, site in enumerate(self.manifest.sites):
            x = buffer.x[site][: buffer.n_images]
            summing = self._threads.submit(_sums, x.flatten(0, 1))
            path = shard_path(self.folder, site, number)
            sha256[site] = write_tensors(path, {ACTIVATIONS: x})
            n_bytes[site] = path.stat().st_size
            found = summing.result()
            sums[f"{position}.total"], sums[f"{position}.squares"] = found.total, found.squares
        write_tensors(self._journal(number, "safetensors"), sums)
        with atomic_path(self._journal(number, "parquet")) as temporary:
            pq.write_table(pa.Table.from_pylist(buffer.rows, schema=IMAGE_ROWS), temporary)
        shard = Shard(buffer.first, buffer.stop, buffer.n_images, sha256, n_bytes)
        failed = self.manifest.failed + len(buffer.rows) - buffer.n_ok
        manifest = replace(self.manifest, shards=(*self.manifest.shards, shard), failed=failed)
        manifest.write(self.folder)
        self.manifest = manifest

    def _journal_rows(self, number: int) -> pa.Table:
        """The rows about a shard's images."""
        path, shard = self._journal(number, "parquet"), self.manifest.shards[number]
        try:
            with pq.ParquetFile(path) as file:
                rows = file.read()
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, str(error)) from error
        if not rows.schema.equals(IMAGE_ROWS) or len(rows) != shard.stop - shard.first:
            raise _damaged(path, "it holds other rows than those of the shard's images")
        return rows

    def _journal_sums(self, number: int) -> dict[str, Tensor]:
        """The sums of a shard of each site."""
        path = self._journal(number, "safetensors")
        try:
            sums = read_tensors(path)
        except SparsightError as error:
            raise _damaged(path, str(error.__cause__)) from error
        for position, site in enumerate(self.manifest.sites):
            for name in (f"{position}.total", f"{position}.squares"):
                if name not in sums or sums[name].shape != (self.manifest.d_in[site],):
                    raise _damaged(path, f"it lacks {name} or holds it in another form")
        return sums

    def _empty(self, site: str, images: int) -> Float[Tensor, "images tokens d_in"]:
        n_tokens, d_in = self.manifest.n_tokens[site], self.manifest.d_in[site]
        return torch.empty(images, n_tokens, d_in, dtype=DTYPES[self.manifest.dtype])

    def _journal(self, number: int, ending: str) -> Path:
        return self.folder / JOURNAL / f"{number:05d}.{ending}"


def _sums(x: Float[Tensor, "vectors d_in"]) -> RunningSums:
    running = RunningSums.nothing(x.shape[-1])
    running.add(x)
    return running


def _damaged(path: Path, reason: str) -> SparsightError:
    return SparsightError(
        f"{path}: is missing or damaged ({reason}), so the store cannot be continued. Remove the "
        "store and extract again."
    )
