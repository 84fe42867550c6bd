"""From images to an activation store: what to extract, and where it may go.

How shards are filled and committed stands in `writer`.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsight.activations.failures import FailureTally
from sparsight.activations.manifest import DTYPES, MANIFEST, Manifest, describe_model
from sparsight.activations.source import matching_sites
from sparsight.activations.statistics import all_finite
from sparsight.activations.store import ActivationStore
from sparsight.activations.writer import JOURNAL, ShardBuffer, StoreWriter
from sparsight.config import check_positive, first_difference
from sparsight.errors import SparsightError, UserError
from sparsight.files import lock
from sparsight.images import ImageBatch, ImageError, ImageInfo, ImageSource, load_batches
from sparsight.progress import ProgressLine, progress
from sparsight.vision import VisionModel

SHARD_BYTES = 128 << 20
"""Roughly how much a shard of all sites together holds; twice that is in memory."""

FAILURES_BEFORE_STOP = 100
"""So many images may fail before extraction stops midway: the reasons of the first are told."""


@dataclass(frozen=True)
class ExtractionSummary:
    """What one call of `extract` did; a continued extraction counts its own part.

    Attributes:
        images: images that went through the model.
        failed: images that could not be read, earlier calls included.
        seconds: wall time.
        seconds_in_forward: wall time in the model's forward pass.
    """

    images: int
    failed: int
    seconds: float
    seconds_in_forward: float

    @property
    def forward_share(self) -> float:
        """Share of the wall time that the model's forward pass took."""
        return self.seconds_in_forward / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        text = (
            f"{self.images:,} images in {self.seconds:,.1f} s, {self.forward_share:.0%} of it in "
            "the model"
        )
        if self.failed:
            text += f" · {self.failed:,} could not be read, see images.parquet for the reasons"
        return text


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
    workers: int | None = None,
    max_failed: float = 0.01,
    quiet: bool = False,
) -> ActivationStore:
    """Read activations of all images at some sites, in one forward pass, and store them.

    An unfinished store of the same weights, preprocessing, images, sites, tokens and dtype is
    continued at its first missing shard; a finished one is returned as it is. Continued with the
    same settings, a store is the same, bit for bit, as one that was never cut.

    Args:
        model: the vision model.
        images: the images.
        sites: e.g. `["blocks.-2.resid_post"]`; `*` stands for every block.
        out: folder of the store.
        tokens: "all", "patches", "cls" or "mean" (over the patches).
        dtype: of the stored activations: "float16", "bfloat16" or "float32".
        batch_size: images in a forward pass.
        shard_images: images of a shard, in whole batches; by default some 128 MB for all sites.
        workers: processes that decode; see `load_batches`.
        max_failed: share of the images that may fail before extraction stops.
        quiet: no progress line.

    Returns:
        The store; its `summary` tells what this call did.

    Raises:
        UserError: a setting is wrong, `out` holds something else, or another process is at it.
        SparsightError: activations are not finite or beyond the range of `dtype`, too many images
            fail, or the disk is full. What was stored stays whole.
    """
    folder = Path(out)
    if "://" in str(out):
        raise UserError(f"{out}: stores are written to local folders only; give a path.")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}.")
    check_positive(batch_size=batch_size, shard_images=shard_images)
    if isinstance(sites, str) or not sites:
        raise UserError(f"sites is {sites!r}; it is a list, e.g. [{model.sites[-1]!r}].")
    tally = FailureTally(len(images), max_failed)
    plan = _plan(model, images, sites, tokens, dtype, batch_size, shard_images)
    with _claimed(folder, plan) as manifest:
        if manifest.state == "complete":
            summary = None
            shutil.rmtree(folder / JOURNAL, ignore_errors=True)
        else:
            writer = StoreWriter(folder, manifest)
            summary = _Extraction(model, images, writer, workers, tally).run(quiet)
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
    n_tokens = {site: model.token_count(site, tokens) for site in names}
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


@contextmanager
def _claimed(folder: Path, plan: Manifest) -> Iterator[Manifest]:
    """The manifest to go on with, while no other process is at the same folder."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; a store is a folder.")
    there = _manifest_of(folder, plan)
    if there is not None and there.state == "complete":
        yield there
        return
    with lock(folder / ".lock", f"{folder}: another process is extracting into it."):
        there = _manifest_of(folder, plan)
        if there is None:
            plan.write(folder)
            yield plan
        else:
            yield replace(there, batch_size=plan.batch_size, shard_images=plan.shard_images)


def _manifest_of(folder: Path, plan: Manifest) -> Manifest | None:
    """The manifest that is there, if any; it must be of the same extraction."""
    if not (folder / MANIFEST).exists():
        if folder.is_dir() and any(each.name[0] != "." for each in folder.iterdir()):
            raise UserError(f"{folder}: is not empty and holds no activation store.")
        return None
    there = Manifest.read(folder)
    field = first_difference(there.identity(), plan.identity())
    if field is not None:
        raise UserError(
            f"{folder}: holds a store whose {field} is {_at(there.identity(), field)!r}; asked "
            f"for is {_at(plan.identity(), field)!r}. Choose another folder, or remove this one."
        )
    return there


def _at(values: dict[str, Any], dotted: str) -> Any:
    found: Any = values
    for key in dotted.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


class _Extraction:
    """One call's part of an extraction: batches through the model, into shards."""

    def __init__(
        self,
        model: VisionModel,
        images: ImageSource,
        writer: StoreWriter,
        workers: int | None,
        tally: FailureTally,
    ) -> None:
        self.model = model
        self.images = images
        self.writer = writer
        self.workers = workers
        self.tally = tally
        self.done = writer.manifest.done
        tally.count = writer.manifest.failed
        for image_id, reason in writer.failures():
            tally.note(image_id, reason)
        self.seconds_in_forward = 0.0
        self.n_read = 0

    def run(self, quiet: bool) -> ExtractionSummary:
        """Extract what is missing and close the store."""
        start = time.perf_counter()
        total = len(self.images)
        with progress("extract", total, "images", done=self.done, quiet=quiet) as line:
            with self.writer:
                for buffer, batches in self._shards():
                    self._fill(buffer, batches, line, start)
                    self.writer.commit(buffer)
            self.tally.check()
            self.writer.close_store()
        seconds = time.perf_counter() - start
        return ExtractionSummary(self.n_read, self.tally.count, seconds, self.seconds_in_forward)

    def _shards(self) -> Iterator[tuple[ShardBuffer, Iterator[ImageBatch]]]:
        """The shards to write, each with its batches, all from one chain of workers."""
        manifest = self.writer.manifest
        batches = load_batches(
            self.images,
            self.model.transform,
            manifest.batch_size,
            indices=range(self.done, len(self.images)),
            workers=self.workers,
            min_side=self.model.min_side,
        )
        for first in range(self.done, len(self.images), manifest.shard_images):
            stop = min(first + manifest.shard_images, len(self.images))
            n_batches = -(-(stop - first) // manifest.batch_size)
            yield self.writer.buffer(first, stop), (next(batches) for _ in range(n_batches))

    def _fill(
        self,
        buffer: ShardBuffer,
        batches: Iterator[ImageBatch],
        line: ProgressLine,
        start: float,
    ) -> None:
        for batch in batches:
            infos, batch = _described(self.images, batch)
            for index, size, reason in _outcomes(batch):
                info = infos[index]
                buffer.add_row(index, info, size, reason)
                if reason is not None:
                    self.tally.add(info.id, reason)
            self.tally.check(FAILURES_BEFORE_STOP)
            if batch.indices:
                self._read(batch, buffer)
            share = self.seconds_in_forward / max(time.perf_counter() - start, 1e-9)
            line.advance(
                len(batch.indices) + len(batch.failures), f"{share:.0%} of the time in the model"
            )

    def _read(self, batch: ImageBatch, buffer: ShardBuffer) -> None:
        manifest = self.writer.manifest
        start = time.perf_counter()
        read = self.model.read(batch.pixels, manifest.sites, manifest.tokens)  # type: ignore[arg-type]
        # Where the work was only queued, fetching it is part of the forward pass.
        stored = {site: x.to(DTYPES[manifest.dtype]).cpu() for site, x in read.items()}
        self.seconds_in_forward += time.perf_counter() - start
        self.n_read += len(batch.indices)
        for site, x in stored.items():
            if all_finite(x):
                continue
            bad = x.isfinite().flatten(1).all(dim=1).logical_not().nonzero()[:, 0].tolist()
            ids = [self.images.info(batch.indices[row]).id for row in bad]
            where = f"shard {buffer.number}, image {', '.join(ids[:3])}{' …' * (len(ids) > 3)}"
            if all_finite(read[site]):
                raise SparsightError(
                    f"{site}: activations up to {float(read[site].abs().max()):.3g} do not fit "
                    f"{manifest.dtype} ({where}). Extract with dtype bfloat16 or float32."
                )
            raise SparsightError(
                f"{site}: activations are NaN or infinite ({where}). What was stored before stays."
            )
        buffer.add(stored)


def _described(images: ImageSource, batch: ImageBatch) -> tuple[dict[int, ImageInfo], ImageBatch]:
    """What is known of each image of a batch; an image of which that cannot be read has failed."""
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
    """Index, size and reason of failure of each image of a batch, in order."""
    read = [(index, size, None) for index, size in zip(batch.indices, batch.sizes, strict=True)]
    failed = [(index, None, reason) for index, reason in batch.failures]
    return sorted([*read, *failed], key=lambda outcome: outcome[0])
