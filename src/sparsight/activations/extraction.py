"""From images to an activation store, shard by shard.

A shard is committed in one step, when the manifest that names it is renamed into place; all that
was written before (the shard of each site, its statistics, the rows about its images) is named
after its number and written again if the manifest never came. So a cut at any byte costs one shard
of work at most, and the store is the same, bit for bit, as one that was never cut.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsight.activations.manifest import DTYPES, MANIFEST, Manifest, Shard, shard_path
from sparsight.activations.statistics import RunningSums
from sparsight.activations.store import ActivationStore
from sparsight.config import first_difference
from sparsight.errors import SparsightError, UserError
from sparsight.files import atomic_path, remove_temporaries, sha256_file, write_json
from sparsight.images import ImageBatch, ImageSource, load_batches
from sparsight.progress import progress
from sparsight.vision import VisionModel

SHARD_BYTES = 256 << 20
"""Roughly how much of one site a shard holds."""

FAILURES_BEFORE_STOP = 100
_JOURNAL = "journal"

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
    ]
)


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

    An unfinished store of the same model, images and settings is continued; a finished one is
    returned as it is.

    Args:
        model: the vision model.
        images: the images.
        sites: e.g. `["blocks.-2.resid_post"]`.
        out: folder of the store.
        tokens: "all", "patches", "cls" or "mean" (over the patches).
        dtype: of the stored activations: "float16", "bfloat16" or "float32".
        batch_size: images in a forward pass.
        shard_images: images of a shard; by default some 256 MB.
        workers: processes that decode.
        max_failed: share of the images that may fail before extraction stops.
        quiet: no progress line.

    Raises:
        UserError: a setting is wrong, or `out` holds a store of something else.
        SparsightError: activations are not finite or beyond the range of `dtype`, too many images
            fail, or the disk is full. What was stored stays whole.
    """
    folder = Path(out)
    if "://" in str(out):
        raise UserError(f"{out}: stores are written to local folders only; give a path.")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}.")
    if batch_size < 1 or (shard_images is not None and shard_images < 1):
        raise UserError("batch_size and shard_images must be at least 1.")
    if not 0 <= max_failed <= 1:
        raise UserError(f"max_failed is {max_failed}; it is a share, from 0 to 1.")
    if not sites:
        raise UserError(f"Name at least one site, e.g. {model.sites[-1]!r}.")
    plan = _plan(model, images, sites, tokens, dtype, batch_size, shard_images)
    manifest = _claim(folder, plan)
    if manifest.state != "complete":
        _Extraction(model, images, folder, manifest, workers, max_failed, quiet).run()
    return ActivationStore(folder)


def _plan(
    model: VisionModel,
    images: ImageSource,
    sites: Sequence[str],
    tokens: Any,
    dtype: str,
    batch_size: int,
    shard_images: int | None,
) -> Manifest:
    names = tuple(dict.fromkeys(model.canonical_site(site) for site in sites))
    n_tokens = {site: model.token_count(site, tokens) for site in names}
    d_in = {site: model.d_in(site) for site in names}
    if shard_images is None:
        largest = max(n_tokens[site] * d_in[site] for site in names)
        shard_images = max(1, SHARD_BYTES // (largest * DTYPES[dtype].itemsize))
    return Manifest(
        model={
            "id": model.id,
            "revision": model.revision,
            "family": model.family,
            "weights_hash": model.weights_hash,
            "dtype": str(model.dtype).removeprefix("torch."),
            "patch_grid": list(model.patch_grid),
            "n_prefix": model.n_prefix,
        },
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
        # Whole batches, so that a resumed run forms the same ones.
        shard_images=-(-shard_images // batch_size) * batch_size,
    )


def _claim(folder: Path, plan: Manifest) -> Manifest:
    """The manifest to go on with: the one that is there, if it is of the same extraction."""
    if not (folder / MANIFEST).exists():
        if folder.is_dir() and any(not each.name.startswith(".") for each in folder.iterdir()):
            raise UserError(f"{folder}: is not empty and holds no activation store.")
        plan.write(folder)
        return plan
    there = Manifest.read(folder)
    field = first_difference(there.identity(), plan.identity())
    if field is not None:
        raise UserError(
            f"{folder}: holds a store with another {field}: {_at(there.identity(), field)!r}, asked "
            f"for is {_at(plan.identity(), field)!r}. Choose another folder, or remove this one."
        )
    return there


def _at(values: dict[str, Any], dotted: str) -> Any:
    found: Any = values
    for key in dotted.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


@dataclass
class _Times:
    forward: float = 0.0
    total: float = 0.0
    images: int = 0


class _Extraction:
    """One process's part of an extraction."""

    def __init__(
        self,
        model: VisionModel,
        images: ImageSource,
        folder: Path,
        manifest: Manifest,
        workers: int | None,
        max_failed: float,
        quiet: bool,
    ) -> None:
        self.model = model
        self.images = images
        self.folder = folder
        self.manifest = manifest
        self.workers = workers
        self.max_failed = max_failed
        self.quiet = quiet
        self.dtype = DTYPES[manifest.dtype]
        self.reasons: list[str] = []
        self.failed = manifest.failed
        self.times = _Times()

    def run(self) -> None:
        """Extract what is missing and close the store."""
        for leftover in (self.folder, *(self.folder / site for site in self.manifest.sites)):
            remove_temporaries(leftover)
        for note in getattr(self.images, "notes", ()):
            print(f"{self.images.spec}: {note}")
        done = self.manifest.shards[-1].stop if self.manifest.shards else 0
        start = time.perf_counter()
        with (
            ThreadPoolExecutor(1) as writer,
            progress("extract", len(self.images), "images", done=done, quiet=self.quiet) as line,
        ):
            pending: Future[None] | None = None
            for first, stop, batches in self._shards(done):
                rows: list[dict[str, Any]] = []
                parts: dict[str, list[Tensor]] = {site: [] for site in self.manifest.sites}
                for batch in batches:
                    rows += self._rows(batch)
                    self._read(batch, parts)
                    line.advance(len(batch.indices) + len(batch.failures))
                    self._check_failures(done=rows[-1]["index"] + 1)
                if pending is not None:
                    pending.result()
                pending = writer.submit(self._commit, first, stop, rows, parts, self.failed)
            if pending is not None:
                pending.result()
        self._check_failures(done=None)
        self.times.total += time.perf_counter() - start
        self._close()

    def _shards(self, done: int) -> Iterator[tuple[int, int, Iterator[ImageBatch]]]:
        """The shards to write, each with its batches, all from one chain of workers."""
        size = self.manifest.shard_images
        batches = load_batches(
            self.images,
            self.model.transform,
            self.manifest.batch_size,
            indices=range(done, len(self.images)),
            workers=self.workers,
        )
        for first in range(done, len(self.images), size):
            stop = min(first + size, len(self.images))
            n_batches = -(-(stop - first) // self.manifest.batch_size)
            yield first, stop, (next(batches) for _ in range(n_batches))

    def _rows(self, batch: ImageBatch) -> list[dict[str, Any]]:
        sizes = dict(zip(batch.indices, batch.sizes, strict=True))
        reasons = dict(batch.failures)
        rows = []
        for index in sorted([*sizes, *reasons]):
            info = self.images.info(index)
            width, height = sizes.get(index, (None, None))
            rows.append(
                {
                    "index": index,
                    "id": info.id,
                    "uri": info.uri,
                    "label": info.label,
                    "caption": info.caption,
                    "width": width,
                    "height": height,
                    "status": "failed" if index in reasons else "ok",
                    "reason": reasons.get(index),
                }
            )
            if index in reasons:
                self.failed += 1
                self.reasons.append(f"{info.id}: {reasons[index]}")
        return rows

    def _read(self, batch: ImageBatch, parts: dict[str, list[Tensor]]) -> None:
        if not batch.indices:
            return
        start = time.perf_counter()
        read = self.model.read(batch.pixels, self.manifest.sites, self.manifest.tokens)  # type: ignore[arg-type]
        # Where the work was only queued, fetching it is part of the forward pass.
        found = {site: x.to("cpu", torch.float32) for site, x in read.items()}
        self.times.forward += time.perf_counter() - start
        self.times.images += len(batch.indices)
        for site, x in found.items():
            stored = x.to(self.dtype)
            if not bool(torch.isfinite(stored).all()):
                self._refuse(site, batch, x, stored)
            parts[site].append(stored)

    def _refuse(self, site: str, batch: ImageBatch, x: Tensor, stored: Tensor) -> None:
        bad = ~torch.isfinite(stored).flatten(1).all(dim=1)
        ids = [self.images.info(batch.indices[row]).id for row in bad.nonzero()[:, 0].tolist()]
        some = ", ".join(ids[:3]) + (" …" if len(ids) > 3 else "")
        if bool(torch.isfinite(x).all()):
            raise SparsightError(
                f"{site}: activations up to {x.abs().max():.3g} do not fit {self.manifest.dtype} "
                f"(image {some}). Extract with dtype bfloat16 or float32."
            )
        raise SparsightError(f"{site}: activations are NaN or infinite (image {some}).")

    def _check_failures(self, done: int | None) -> None:
        allowed = self.max_failed * len(self.images)
        if self.failed <= allowed or (done is not None and self.failed <= FAILURES_BEFORE_STOP):
            return
        shown = "; ".join(self.reasons[:5])
        raise SparsightError(
            f"{self.failed:,} of {done or len(self.images):,} images could not be read, more than "
            f"max_failed = {self.max_failed:.1%} allows: {shown}"
        )

    def _commit(
        self,
        first: int,
        stop: int,
        rows: list[dict[str, Any]],
        parts: dict[str, list[Tensor]],
        failed: int,
    ) -> None:
        """Write a shard of each site, its statistics and rows, and last the manifest."""
        number = len(self.manifest.shards)
        sha256, n_bytes, sums = {}, {}, {}
        n_images = sum(row["status"] == "ok" for row in rows)
        for position, site in enumerate(self.manifest.sites):
            shape = (n_images, self.manifest.n_tokens[site], self.manifest.d_in[site])
            x = torch.cat(parts[site]) if parts[site] else torch.zeros(shape, dtype=self.dtype)
            path = shard_path(self.folder, site, number)
            write_tensors(path, {"activations": x})
            sha256[site], n_bytes[site] = sha256_file(path), path.stat().st_size
            running = RunningSums.nothing(x.shape[-1])
            running.add(x.flatten(0, 1))
            sums[f"{position}.total"], sums[f"{position}.squares"] = running.total, running.squares
        write_tensors(self._journal(number, "safetensors"), sums)
        with atomic_path(self._journal(number, "parquet")) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=IMAGE_ROWS), temporary)
        shard = Shard(first, stop, n_images, sha256, n_bytes)
        manifest = replace(self.manifest, shards=(*self.manifest.shards, shard), failed=failed)
        manifest.write(self.folder)
        self.manifest = manifest

    def _journal(self, number: int, ending: str) -> Path:
        return self.folder / _JOURNAL / f"{number:05d}.{ending}"

    def _close(self) -> None:
        """Bring statistics and rows together and declare the store complete."""
        numbers = range(len(self.manifest.shards))
        journals = [load_file(self._journal(number, "safetensors")) for number in numbers]
        for position, site in enumerate(self.manifest.sites):
            running = RunningSums.nothing(self.manifest.d_in[site])
            for shard, sums in zip(self.manifest.shards, journals, strict=True):
                running.merge(
                    RunningSums(
                        shard.n_images * self.manifest.n_tokens[site],
                        sums[f"{position}.total"],
                        sums[f"{position}.squares"],
                    )
                )
            found = running.statistics()
            write_tensors(
                self.folder / site / "stats.safetensors",
                {
                    "count": torch.tensor(found.count),
                    "mean": found.mean,
                    "second_moment": found.second_moment,
                },
            )
        with (
            atomic_path(self.folder / "images.parquet") as temporary,
            pq.ParquetWriter(temporary, IMAGE_ROWS) as writer,
        ):
            for number in numbers:
                writer.write_table(pq.read_table(self._journal(number, "parquet")))
        write_json(
            self.folder / "timing.json",
            {
                "images": self.times.images,
                "seconds": round(self.times.total, 3),
                "seconds_in_forward": round(self.times.forward, 3),
            },
        )
        self.manifest = replace(self.manifest, state="complete")
        self.manifest.write(self.folder)
        shutil.rmtree(self.folder / _JOURNAL, ignore_errors=True)
        if self.failed:
            print(
                f"{self.failed:,} of {len(self.images):,} images could not be read; "
                f"{self.folder / 'images.parquet'} gives the reasons."
            )


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        SparsightError: it could not be written, e.g. because the disk is full.
    """
    try:
        with atomic_path(path) as temporary:
            save_file({name: each.contiguous() for name, each in tensors.items()}, temporary)
    except SafetensorError as error:
        raise SparsightError(f"{path}: could not be written ({error}).") from error
