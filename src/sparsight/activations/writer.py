"""Write a store shard by shard, so that an interruption at any byte costs little work.

A shard is committed in one step, when the manifest that names it is renamed into place. Everything
that is written before (the shard of each site, its sums, the rows about its images) is named after
the shard's number, and is written again if the manifest was not. Sums and rows wait in `journal/`
until the last shard; then they become `stats.safetensors` and `images.parquet`.

A shard that is not full yet is kept in the same way, after some time or because the extraction
stops. It is marked as unfinished, the names of its files also say how far it reaches, and the next
version of the same shard replaces it. A continued extraction reads it back and fills it: the
boundaries of shards, and every byte of them, are as if nothing had stopped.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

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
    shard_name,
    shard_path,
    stats_path,
)
from sparsight.activations.shard_buffer import IMAGE_ROWS, Filled, ShardBuffer, ShardPart
from sparsight.activations.shards import (
    ACTIVATIONS,
    check_size,
    check_sum,
    check_sums,
    map_shard,
    read_tensors,
    write_tensors,
)
from sparsight.activations.statistics import RunningSums
from sparsight.errors import SparsightError
from sparsight.files import atomic_path, sha256_file
from sparsight.interruption import STOPS
from sparsight.leftovers import remove_temporaries

JOURNAL = "journal"
_ENDINGS = ("parquet", "safetensors")
_OWN = re.compile(r"(shard-)?\d{5}(-until-\d{8})?\.(parquet|safetensors)")
"""Names of the files that this module writes, except the final ones of a complete store."""


def recorded_ids(folder: Path, manifest: Manifest) -> list[str]:
    """Return the ids of the images in a store, complete or not, as far as they can be read."""
    paths = [folder / IMAGES]
    if manifest.state != "complete":
        paths = [
            folder / JOURNAL / f"{shard_name(number, _until(shard))}.parquet"
            for number, shard in enumerate(manifest.shards)
        ]
    ids: list[str] = []
    for path in paths:
        try:
            ids += pq.read_table(path, columns=["id"])["id"].to_pylist()
        except (pa.ArrowException, OSError):
            break
    return ids


class StoreWriter:
    """Commits shards in the background; a context manager around `commit` and `keep`.

    Args:
        folder: the folder of the store.
        manifest: describes what is already there.

    Raises:
        SparsightError: what is already there is damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        # One thread commits; one sums while it writes and hashes; one checks what is already there.
        self._threads = ThreadPoolExecutor(3)
        self._pending: Future[None] | None = None
        self._checking: Future[None] | None = None
        self._checks_cancelled = threading.Event()
        self._writes_cancelled = threading.Event()
        self._room: dict[int, dict[str, Tensor]] = {}
        self._started = len(manifest.whole_shards)
        self._clean()

    @property
    def first(self) -> int:
        """The image at which the next shard begins; a part of that shard may already exist."""
        whole = self.manifest.whole_shards
        return whole[-1].stop if whole else 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being written."""
        return self._pending is None or self._pending.done()

    def buffer(self, first: int, stop: int) -> ShardBuffer:
        """Return the next shard to fill; at most two exist at a time, one filled and one written.

        It contains what a stopped extraction left of it.

        Raises:
            SparsightError: what it left is damaged.
        """
        turn = self._started % 2
        room = self._room.get(turn)
        if room is None or min(map(len, room.values())) < stop - first:
            room = self._room[turn] = {
                site: self._empty(site, stop - first) for site in self.manifest.sites
            }
        buffer = ShardBuffer(self._started, first, room)
        self._started += 1
        left = self.manifest.shards[-1:]
        if left and left[0].unfinished and left[0].first == first:
            self._restore(buffer, left[0])
        return buffer

    def commit(self, buffer: ShardBuffer) -> None:
        """Write a shard, once the one before is written; return at once."""
        self._wait()
        self._pending = self._threads.submit(self._write, buffer.part(unfinished=False))

    def keep(self, buffer: ShardBuffer) -> None:
        """Write what is in a shard that is not full, once the one before is written; return at
        once.

        Nothing is written if nothing was added since the last time, or if an earlier shard is
        missing because it could not be written.
        """
        self._wait()
        part = buffer.part(unfinished=True)
        is_next = part.number == len(self.manifest.whole_shards)
        if is_next and part.stop > max(part.first, self.manifest.done):
            self._pending = self._threads.submit(self._write, part)

    def wait(self) -> None:
        """Wait until everything that was handed over is on disk.

        Raises:
            SparsightError: it could not be written.
        """
        self._wait()

    def check_what_is_there(self) -> int:
        """Begin to compare the existing shards with their checksums, in the background.

        The next call raises what is wrong, `close_store` at the latest.

        Returns:
            The number of bytes to compare.
        """
        manifest = self.manifest
        paths = [
            (shard_path(self.folder, site, number), shard.sha256[site])
            for number, shard in enumerate(manifest.whole_shards)
            for site in manifest.sites
        ]
        if paths:
            self._checking = self._threads.submit(
                check_sums, paths, cancelled=self._checks_cancelled
            )
        return sum(sum(shard.n_bytes.values()) for shard in manifest.whole_shards)

    def failures(self) -> Iterator[tuple[str, str]]:
        """Give id and reason of each failed image of the shards so far.

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
        """Merge sums and rows and declare the store complete.

        Raises:
            SparsightError: a shard or a file of the journal is damaged, or the disk is full.
        """
        if self._checking is not None:
            self._checking.result()
        files = {}
        for position, site in enumerate(self.manifest.sites):
            running = RunningSums.nothing(self.manifest.d_in[site])
            for number, shard in enumerate(self.manifest.shards):
                sums = self._journal_sums(number)
                count = shard.n_images * self.manifest.n_tokens[site]
                total, squares = sums[f"{position}.total"], sums[f"{position}.squares"]
                running.merge(RunningSums(count, total, squares))
            statistics = running.statistics()
            path = stats_path(self.folder, site)
            files[path.relative_to(self.folder).as_posix()] = write_tensors(
                path,
                {
                    "count": torch.tensor(statistics.count),
                    "mean": statistics.mean,
                    "second_moment": statistics.second_moment,
                },
            )
        with (
            atomic_path(self.folder / IMAGES) as temporary,
            pq.ParquetWriter(temporary, IMAGE_ROWS) as writer,
        ):
            for number in range(len(self.manifest.shards)):
                writer.write_table(self._journal_rows(number))
        files[IMAGES] = sha256_file(self.folder / IMAGES)
        shards = tuple(replace(shard, journal={}) for shard in self.manifest.shards)
        self.manifest = replace(self.manifest, state="complete", shards=shards, files=files)
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
            else:
                self._checks_cancelled.set()
            if kind is not None and issubclass(kind, STOPS):
                # A first stop has waited for the writing to finish; a second one does not.
                self._writes_cancelled.set()
        finally:
            # After an error too, the shard under way is finished, because it is whole.
            self._threads.shutdown()

    def _wait(self) -> None:
        if self._checking is not None and self._checking.done():
            self._checking.result()
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _clean(self) -> None:
        """Remove what a killed process left, and check what it committed."""
        folders = [self.folder / site for site in self.manifest.sites]
        for folder in (self.folder, self.folder / JOURNAL, *folders):
            remove_temporaries(folder)
        named = {
            path
            for number, shard in enumerate(self.manifest.shards)
            for path in self._files(number, shard)
        }
        for path in (path for at in (*folders, self.folder / JOURNAL) for path in at.glob("*")):
            if path not in named and _OWN.fullmatch(path.name):
                path.unlink()
        shards = []
        for number, shard in enumerate(self.manifest.shards):
            for site in self.manifest.sites:
                check_size(self._shard(site, number, shard), shard.n_bytes[site])
            shards.append(replace(shard, journal=self._check_journal(number, shard)))
        self.manifest = replace(self.manifest, shards=tuple(shards))

    def _check_journal(self, number: int, shard: Shard) -> dict[str, str]:
        """Check, before hours of work, what is needed once the last shard is written.

        Returns:
            The checksums of the shard's files in the journal.
        """
        checksums = {}
        for path in self._journal_files(number, shard):
            ending = path.suffix[1:]
            if not path.exists():
                raise _damaged(path, "the file is not there")
            checksums[ending] = sha256_file(path)
            if checksums[ending] != shard.journal.get(ending, checksums[ending]):
                raise _damaged(path, "its checksum differs")
        self._journal_rows(number)
        if not shard.unfinished:
            self._journal_sums(number)
        return checksums

    def _write(self, part: ShardPart) -> None:
        """Write each site's shard, then its sums and rows, and the manifest last."""
        number, before = part.number, self.manifest
        until = part.stop if part.unfinished else None
        sha256, n_bytes, sums, journal = {}, {}, {}, {}
        for position, site in enumerate(before.sites):
            x = part.x[site]
            summing = None
            if not part.unfinished:
                summing = self._threads.submit(_sums, x.flatten(0, 1))
            path = shard_path(self.folder, site, number, until)
            sha256[site] = write_tensors(path, {ACTIVATIONS: x}, self._writes_cancelled)
            n_bytes[site] = path.stat().st_size
            if summing is not None:
                added = summing.result()
                sums[f"{position}.total"], sums[f"{position}.squares"] = added.total, added.squares
        if not part.unfinished:
            path = self._journal(number, "safetensors")
            journal["safetensors"] = write_tensors(path, sums)
        with atomic_path(self._journal(number, "parquet", until)) as temporary:
            pq.write_table(pa.Table.from_pylist(part.rows, schema=IMAGE_ROWS), temporary)
            journal["parquet"] = sha256_file(temporary)
        shard = Shard(
            part.first, part.stop, part.n_images, sha256, n_bytes, journal, part.unfinished
        )
        shards = (*before.whole_shards, shard)
        failed = sum(shard.stop - shard.first - shard.n_images for shard in shards)
        manifest = replace(before, shards=shards, failed=failed)
        if self._writes_cancelled.is_set():
            return
        manifest.write(self.folder)
        self.manifest = manifest
        if before.shards and before.shards[-1].unfinished:
            for path in self._files(number, before.shards[-1]):
                path.unlink(missing_ok=True)

    def _restore(self, buffer: ShardBuffer, shard: Shard) -> None:
        """Put what exists of an unfinished shard back into its buffer."""
        for site in self.manifest.sites:
            n_tokens, d_in = self.manifest.n_tokens[site], self.manifest.d_in[site]
            path = self._shard(site, buffer.number, shard)
            shape, dtype = (shard.n_images, n_tokens, d_in), DTYPES[self.manifest.dtype]
            x = map_shard(path, shape, dtype, shard.n_bytes[site])
            check_sum(path, shard.sha256[site])
            buffer.x[site][: shard.n_images].copy_(x)
        buffer.rows = self._journal_rows(buffer.number).to_pylist()
        buffer.filled = Filled(len(buffer.rows), shard.n_images)

    def _journal_rows(self, number: int) -> pa.Table:
        """Return the rows about a shard's images."""
        shard = self.manifest.shards[number]
        path = self._journal(number, "parquet", _until(shard))
        try:
            with pq.ParquetFile(path) as file:
                rows = file.read()
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, str(error)) from error
        if not rows.schema.equals(IMAGE_ROWS) or len(rows) != shard.stop - shard.first:
            raise _damaged(path, "it holds other rows than those of the shard's images")
        return rows

    def _journal_sums(self, number: int) -> dict[str, Tensor]:
        """Return the sums of each site's shard."""
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

    def _files(self, number: int, shard: Shard) -> list[Path]:
        """Return all files of a shard."""
        own = [self._shard(site, number, shard) for site in self.manifest.sites]
        return [*own, *self._journal_files(number, shard)]

    def _shard(self, site: str, number: int, shard: Shard) -> Path:
        return shard_path(self.folder, site, number, _until(shard))

    def _journal_files(self, number: int, shard: Shard) -> list[Path]:
        """Return the files of rows and, for a whole shard, of sums."""
        endings = _ENDINGS[:1] if shard.unfinished else _ENDINGS
        return [self._journal(number, ending, _until(shard)) for ending in endings]

    def _journal(self, number: int, ending: str, until: int | None = None) -> Path:
        return self.folder / JOURNAL / f"{shard_name(number, until)}.{ending}"


def _until(shard: Shard) -> int | None:
    """Return what marks the names of an unfinished shard's files; None for a whole shard."""
    return shard.stop if shard.unfinished else None


def _sums(x: Float[Tensor, "vectors d_in"]) -> RunningSums:
    running = RunningSums.nothing(x.shape[-1])
    running.add(x)
    return running


def _damaged(path: Path, reason: str) -> SparsightError:
    return SparsightError(
        f"{path}: is missing or damaged ({reason}), so the store cannot be continued. Remove the "
        "store and extract again."
    )
