"""From images to an activation store: what to extract, and where to.

`shard_buffer` holds the shard that is being filled; `writer` commits it.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsight.activations.claiming import claimed_manifest
from sparsight.activations.manifest import DTYPES, Manifest, describe_model
from sparsight.activations.shard_buffer import Row, ShardBuffer, image_row
from sparsight.activations.source import count_tokens, matching_sites
from sparsight.activations.statistics import all_finite
from sparsight.activations.store import ActivationStore
from sparsight.activations.summary import ExtractionSummary
from sparsight.activations.writer import JOURNAL, StoreWriter, recorded_ids
from sparsight.config import check_positive, check_seconds, value_at
from sparsight.errors import SparsightError, UserError, memory_told
from sparsight.images import ImageBatch, ImageError, ImageInfo, ImageSource
from sparsight.images.difference import images_difference
from sparsight.images.failures import FailureTally
from sparsight.interruption import keeping, kept, noted, postponed
from sparsight.vision import ImagePass, PassSettings, VisionModel

SHARD_BYTES = 128 << 20
"""Approximate bytes per shard, all sites together; memory holds twice that."""

FLUSH_SECONDS = 60.0
"""Seconds of work that are lost at most if the process is killed."""

FAILURES_BEFORE_STOP = 100
"""Number of images that may fail before extraction stops midway, to see several reasons."""


def extract(
    model: VisionModel,
    images: ImageSource,
    *,
    sites: Sequence[str],
    out: str | Path,
    tokens: str = "all",
    dtype: str = "float16",
    batch_size: int = 64,
    shard_images: int | None = None,
    flush_seconds: float = FLUSH_SECONDS,
    workers: int | None = None,
    max_failed: float = 0.01,
    quiet: bool = False,
) -> ActivationStore:
    """Read the activations of all images at some sites, in one forward pass, and store them.

    An unfinished store with the same weights, preprocessing, images, sites, tokens and dtype is
    continued at the first image that it lacks; a finished one is returned unchanged. Continued with
    the same settings, a store is bit for bit the same as one that was never interrupted.

    Ctrl-C, SIGTERM and errors keep every batch that went through the model; a second Ctrl-C does
    not wait for that. A process that is killed loses at most the work of `flush_seconds`.

    Args:
        model: the vision model.
        images: the images.
        sites: e.g. `["blocks.-2.resid_post"]`; `*` stands for every block.
        out: folder of the store.
        tokens: "all", "patches", "cls" or "mean" (over the patches).
        dtype: dtype of the stored activations: "float16", "bfloat16" or "float32".
        batch_size: number of images per forward pass.
        shard_images: number of images per shard, in whole batches; by default about 128 MB for all
            sites.
        flush_seconds: largest time, in seconds, between two writes of what is in memory.
        workers: number of processes that decode; see `load_batches`.
        max_failed: largest share of the images that may fail before extraction stops.
        quiet: show no progress.

    Returns:
        The store; its `summary` says what this call did.

    Raises:
        UserError: a setting is wrong, `out` holds something else, or another process is using it.
        SparsightError: activations are not finite or exceed the range of `dtype`, too many images
            fail, the disk is full, memory runs out, or what is already there is damaged. What was
            stored stays intact.
        KeyboardInterrupt, Terminated: Ctrl-C or SIGTERM; a note says how many images are kept.
    """
    folder = Path(out)
    if "://" in str(out):
        raise UserError(f"{out}: stores are written to local folders only; give a path.")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}.")
    check_positive(batch_size=batch_size, shard_images=shard_images)
    check_seconds(flush_seconds=flush_seconds)
    if isinstance(sites, str) or not sites:
        raise UserError(f"sites is {sites!r}; it is a list, e.g. [{model.sites[-1]!r}].")
    tally = FailureTally(len(images), max_failed)
    plan = _plan(model, images, sites, tokens, dtype, batch_size, shard_images)
    with claimed_manifest(
        folder,
        plan,
        what="activation store",
        is_a_folder="a store is a folder",
        doing="extracting into",
        in_words=partial(_in_words, folder, images),
    ) as there:
        # Where shards end is this call's to say.
        manifest = replace(there, batch_size=plan.batch_size, shard_images=plan.shard_images)
        if manifest.state == "complete":
            summary = None
            shutil.rmtree(folder / JOURNAL, ignore_errors=True)
        else:
            writer = StoreWriter(folder, manifest)
            summary = _Extraction(model, images, writer, workers, tally, flush_seconds).run(quiet)
            if not quiet:
                print(f"extract: {summary}", file=sys.stderr)
    store = ActivationStore(folder)
    store.summary = summary
    return store


def _plan(
    model: VisionModel,
    images: ImageSource,
    sites: Sequence[str],
    tokens: Any,
    dtype: str,
    batch_size: int,
    shard_images: int | None,
) -> Manifest:
    if not len(images):
        raise UserError(f"{images.spec}: holds no images.")
    names = matching_sites(sites, model.sites, model.canonical_site)
    n_tokens = count_tokens(model, names, tokens)
    d_in = {site: model.d_in(site) for site in names}
    if shard_images is None:
        per_image = sum(n_tokens[site] * d_in[site] for site in names) * DTYPES[dtype].itemsize
        shard_images = max(1, SHARD_BYTES // per_image)
    return Manifest(
        model=describe_model(model),
        preprocessing=dict(model.preprocessing),
        images={
            "spec": images.spec,
            "fingerprint": images.fingerprint(),
            "n_images": len(images),
        },
        sites=names,
        tokens=tokens,
        dtype=dtype,
        d_in=d_in,
        n_tokens=n_tokens,
        batch_size=batch_size,
        # Whole batches, so that a continued extraction forms the same ones.
        shard_images=-(-shard_images // batch_size) * batch_size,
    )


def _in_words(
    folder: Path, images: ImageSource, field: str, there: Manifest, plan: Manifest
) -> str:
    """Say how an existing store differs, without hashes, which nobody can read."""
    existing, asked = value_at(there.identity(), field), value_at(plan.identity(), field)
    if field.startswith("images."):
        specs = f"{there.images['spec']} there, {images.spec} asked for"
        ids = recorded_ids(folder, there)
        how = images_difference(images, there.images["n_images"], ids)
        return f"a store of other images ({field} differs): {how} ({specs})"
    if field == "model.weights_hash":
        models = [manifest.model.get("id") for manifest in (there, plan)]
        return (
            f"a store of other weights ({field} differs): {models[0]} there, {models[1]} asked for"
        )
    return f"a store whose {field} is {existing!r}; asked for is {asked!r}"


class _Extraction:
    """One call's part of an extraction: it runs batches through the model and fills shards."""

    def __init__(
        self,
        model: VisionModel,
        images: ImageSource,
        writer: StoreWriter,
        workers: int | None,
        tally: FailureTally,
        flush_seconds: float,
    ) -> None:
        self.model = model
        self.images = images
        self.writer = writer
        self.workers = workers
        self.tally = tally
        self.flush_seconds = flush_seconds
        self.done = writer.manifest.done
        tally.count = writer.manifest.failed
        for image_id, reason in writer.failures():
            tally.note(image_id, reason)
        self.seconds_in_forward = 0.0
        self.n_read = 0

    def run(self, quiet: bool) -> ExtractionSummary:
        """Extract what is missing and close the store."""
        self.start = self.flushed = time.perf_counter()
        n_bytes = self.writer.check_what_is_there()
        if n_bytes and not quiet:
            print(
                f"extract: goes on after image {self.done:,}; the {n_bytes / 1e6:,.0f} MB that "
                "are there are compared with their checksums meanwhile",
                file=sys.stderr,
            )
        settings = PassSettings(self.writer.manifest.batch_size, self.workers, quiet)
        missing = range(self.done, len(self.images))
        with (
            noted(self._what_is_kept),
            postponed() as stop,
            memory_told("Lower batch_size or shard_images, or take fewer workers."),
            self.writer,
            ImagePass(
                self.model,
                self.images,
                "extract",
                settings,
                indices=missing,
                done=self.done,
                stop=stop,
            ) as seen,
        ):
            self._fill_shards(seen)
            self.tally.check()
            self.writer.close_store()
        seconds = time.perf_counter() - self.start
        return ExtractionSummary(self.n_read, self.tally.count, seconds, self.seconds_in_forward)

    def _what_is_kept(self) -> str:
        manifest, folder = self.writer.manifest, self.writer.folder
        complete = manifest.state == "complete"
        return kept(manifest.done, len(self.images), "images", where=folder, complete=complete)

    def _fill_shards(self, seen: ImagePass) -> None:
        """Write all missing shards; whatever stops this, whole batches are kept."""
        with closing(seen.batches()) as batches:
            for buffer, n_batches in self._shards():
                with keeping(partial(self._keep, buffer)):
                    for _ in range(n_batches):
                        self._add(next(batches), buffer)
                        share = self.seconds_in_forward / (time.perf_counter() - self.start)
                        seen.note = f"{share:.0%} of the time in the model"
                        self._flush(buffer)
                    self.writer.commit(buffer)
                    self.flushed = time.perf_counter()
            self.writer.wait()

    def _shards(self) -> Iterator[tuple[ShardBuffer, int]]:
        """Give the shards to write, each with the number of batches that it lacks."""
        manifest, total = self.writer.manifest, len(self.images)
        first, done = self.writer.first, self.done
        while first < total:
            # Whole batches, even if they are not the ones that the first call formed.
            n_missing = max(first + manifest.shard_images - done, 0)
            stop = min(done + -(-n_missing // manifest.batch_size) * manifest.batch_size, total)
            n_batches = -(-(stop - done) // manifest.batch_size)
            yield self.writer.buffer(first, stop), n_batches
            first = done = stop

    def _add(self, batch: ImageBatch, buffer: ShardBuffer) -> None:
        """Run a batch through the model and put it into the buffer."""
        infos, batch = _described(self.images, batch)
        rows: list[Row] = []
        for index, size, reason in _outcomes(batch):
            rows.append(image_row(index, infos[index], size, reason))
            if reason is not None:
                self.tally.add(infos[index].id, reason)
        buffer.add(rows, self._read(batch, buffer.number) if batch.indices else {})
        self.tally.check(FAILURES_BEFORE_STOP)

    def _flush(self, buffer: ShardBuffer) -> None:
        """Write what is in memory, if it has been there long enough."""
        now = time.perf_counter()
        if now - self.flushed >= self.flush_seconds and self.writer.is_idle:
            self.writer.keep(buffer)
            self.flushed = now

    def _keep(self, buffer: ShardBuffer) -> None:
        """Write what is in memory, and wait until it is written."""
        self.writer.keep(buffer)
        self.writer.wait()

    def _read(self, batch: ImageBatch, shard: int) -> dict[str, Tensor]:
        """Return a batch's activations at each site, in the store's dtype."""
        manifest = self.writer.manifest
        start = time.perf_counter()
        read = self.model.read(batch.pixels, manifest.sites, manifest.tokens)  # type: ignore[arg-type]
        # On a GPU the work was only queued, so fetching the result is part of the forward pass.
        stored = {site: x.to(DTYPES[manifest.dtype]).cpu() for site, x in read.items()}
        self.seconds_in_forward += time.perf_counter() - start
        self.n_read += len(batch.indices)
        for site, x in stored.items():
            if all_finite(x):
                continue
            bad = x.isfinite().flatten(1).all(dim=1).logical_not().nonzero()[:, 0].tolist()
            ids = [self.images.info(batch.indices[row]).id for row in bad]
            where = f"shard {shard}, image {', '.join(ids[:3])}{' …' * (len(ids) > 3)}"
            if all_finite(read[site]):
                raise SparsightError(
                    f"{site}: activations up to {float(read[site].abs().max()):.3g} do not fit "
                    f"{manifest.dtype} ({where}). Extract with dtype bfloat16 or float32."
                )
            raise SparsightError(
                f"{site}: activations are NaN or infinite ({where}). What was stored before stays."
            )
        return stored


def _described(images: ImageSource, batch: ImageBatch) -> tuple[dict[int, ImageInfo], ImageBatch]:
    """Return what is known about each image of a batch; an image without that has failed."""
    infos: dict[int, ImageInfo] = {}
    failures = dict(batch.failures)
    for index in (*batch.indices, *failures):
        try:
            infos[index] = images.info(index)
        except ImageError as error:
            place = f"{images.spec}[{index}]"
            infos[index] = ImageInfo(id=place, uri=place)
            failures.setdefault(index, error.reason)
    kept = [row for row, index in enumerate(batch.indices) if index not in failures]
    if len(kept) == len(batch.indices):
        return infos, batch
    return infos, ImageBatch(
        [batch.indices[row] for row in kept],
        batch.pixels[kept],
        [batch.sizes[row] for row in kept],
        sorted(failures.items()),
    )


def _outcomes(batch: ImageBatch) -> list[tuple[int, tuple[int, int] | None, str | None]]:
    """Return index, size and reason for the failure of each image of a batch, in order."""
    read = [(index, size, None) for index, size in zip(batch.indices, batch.sizes, strict=True)]
    failed = [(index, None, reason) for index, reason in batch.failures]
    return sorted([*read, *failed], key=lambda outcome: outcome[0])
