"""`encode`: turn activations into sparse codes, batch by batch, and write them in shards.

A shard is committed when the manifest that names it is renamed into place; see `code_shards`.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import torch

from sparsight.activations import (
    ActivationSource,
    ActivationStore,
    LiveActivations,
    OrderedBatch,
)
from sparsight.activations.claiming import claimed_manifest
from sparsight.activations.extraction import FLUSH_SECONDS
from sparsight.activations.manifest import IMAGES
from sparsight.activations.shards import check_size, check_sums
from sparsight.config import check_positive, check_seconds, value_at
from sparsight.errors import SparsightError, UserError, memory_told
from sparsight.evaluation.data import find_site
from sparsight.images import ImageSource, open_images
from sparsight.interruption import Stop, keeping, kept, noted, postponed
from sparsight.latents.code_manifest import AGAIN, DTYPES, CodeManifest, shard_path
from sparsight.latents.code_shards import CodeBatch, ShardBuffer
from sparsight.latents.codes import CodeStore
from sparsight.latents.image_records import image_records
from sparsight.leftovers import remove_temporaries
from sparsight.progress import ProgressLine, progress
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel

FEWEST_IMAGES = 64
VECTORS_AT_ONCE = 16_384

SHARD_BYTES = 64 << 20
"""Approximate size of a shard in bytes; memory holds twice that."""


@torch.no_grad()
def encode(
    sae: SparseAutoencoder,
    given: VisionModel | ActivationSource,
    images: ImageSource | str | Path | None = None,
    *,
    out: str | Path,
    site: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    batch_images: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    flush_seconds: float = FLUSH_SECONDS,
    workers: int | None = None,
    quiet: bool = False,
) -> CodeStore:
    """Encode the activations of all images and write the active latents to disk.

    Unfinished codes of the same SAE, activations, site and dtype are continued after their last
    image, with the batch and shard sizes that they were begun with; finished codes are returned
    unchanged. Continued codes are bit for bit those of an uninterrupted call. Memory holds one
    batch of activations and one shard of codes. A store does not need its images: what it recorded
    about them is copied next to the codes.

    Ctrl-C, SIGTERM and errors keep every encoded batch; a second Ctrl-C does not wait for that. A
    killed process loses at most the work of `flush_seconds`.

    Args:
        sae: the SAE.
        given: a vision model to run over `images`; or activations, stored or live.
        images: the images (as for `open_images`), only with a model.
        out: folder for the codes.
        site: where to read; default: the site that the SAE was trained on.
        dtype: type of the values on disk; float16 keeps 3 digits and takes two thirds of the space.
            Values too small for it become its smallest number, ±2⁻²⁴.
        batch_images: images per batch; default: see `usual_batch`.
        shard_bytes: a shard ends with the batch that brings it to this size.
        flush_seconds: longest time, in seconds, before codes in memory are written.
        workers: processes that decode images, with a model.
        quiet: show no progress bar.

    Raises:
        UserError: SAE, site and activations do not match, a number is below 1, `out` holds
            something else, or another process is writing there.
        SparsightError: an activation is NaN, infinite or out of range for `dtype`, the disk is
            full, memory is short, or existing codes are damaged. Whatever was written stays intact.
        KeyboardInterrupt, Terminated: Ctrl-C or SIGTERM; a note says how many images are kept.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}.")
    check_positive(batch_images=batch_images, shard_bytes=shard_bytes)
    check_seconds(flush_seconds=flush_seconds)
    folder = Path(out)
    activations, site = find_activations(sae, given, images, site, workers)
    images_of = image_records(activations)
    plan = CodeManifest(
        sae={"hash": sae.fingerprint(), "n_latents": sae.n_latents, "d_in": sae.d_in},
        activations=activations.fingerprint,
        model={k: v for k, v in activations.model_info.items() if k != "images"},
        images={
            "spec": images_of.spec,
            "fingerprint": images_of.fingerprint,
            "n_images": images_of.n_images,
        },
        site=site,
        tokens=activations.tokens,
        n_tokens=activations.n_tokens[site],
        dtype=dtype,
        batch_images=batch_images or usual_batch(activations, site),
        shard_bytes=shard_bytes,
    )
    with claimed_manifest(
        folder,
        plan,
        what="codes",
        is_a_folder="codes are a folder",
        doing="encoding into",
        in_words=_differently,
    ) as manifest:
        if manifest.state != "complete":
            if isinstance(activations, ActivationStore):
                sha256 = _copy_records(activations.path / IMAGES, folder / IMAGES)
                manifest = replace(manifest, files={IMAGES: sha256})
            _Encoding(sae, activations, folder, manifest, flush_seconds).run(quiet)
    return CodeStore(folder)


def encoded(
    sae: SparseAutoencoder,
    activations: ActivationSource,
    site: str,
    batch_images: int,
    *,
    after: int | None = None,
    also: Sequence[str] = (),
    watch: Callable[[OrderedBatch], None] | None = None,
) -> Iterator[CodeBatch]:
    """Yield the codes of all images, in order; after the batch with image `after`, if given.

    Args:
        sae: the SAE.
        activations: its input.
        site: where it reads.
        batch_images: images per batch.
        after: an image, see above.
        also: other sites to read in the same pass, for `watch`.
        watch: called with the activations of each batch before they are encoded.

    Raises:
        SparsightError: an activation, or a latent's, is NaN or infinite.
    """
    device = sae.W_enc.device
    rest = {} if after is None else {"after": after}
    sites = list(dict.fromkeys([site, *also]))
    for batch in activations.ordered(sites, batch_images=batch_images, **rest):
        if watch is not None:
            watch(batch)
        x = batch.activations[site].to(device)
        if not len(x):
            continue
        where = f"images {int(batch.image_indices[0])} to {int(batch.image_indices[-1])}"
        if not bool(torch.isfinite(x).all()):
            raise SparsightError(f"{site}: an activation is NaN or infinite in {where}.")
        code = sae.encode(x.flatten(0, 1))
        if not bool(torch.isfinite(code.values).all()):
            raise SparsightError(
                f"A latent's activation is NaN or infinite in {where}. The SAE's weights or the "
                "activations are damaged."
            )
        yield CodeBatch(batch.image_indices, code, x.shape[1])


def usual_batch(activations: ActivationSource, site: str) -> int:
    """Return the images per batch: 64; for a store, enough for about 16,000 vectors.

    With fewer vectors, the low-precision copy of the encoder, which speeds up the selection of
    latents, does not pay.
    """
    if isinstance(activations, LiveActivations):
        return FEWEST_IMAGES
    return max(FEWEST_IMAGES, -(-VECTORS_AT_ONCE // activations.n_tokens[site]))


def find_activations(
    sae: SparseAutoencoder,
    given: VisionModel | ActivationSource,
    images: ImageSource | str | Path | None,
    site: str | None,
    workers: int | None,
) -> tuple[ActivationSource, str]:
    """Return the activations that a call refers to, and their site.

    Raises:
        UserError: SAE, site and activations do not belong together.
    """
    if not isinstance(given, VisionModel):
        if images is not None:
            raise UserError("Activations already know their images; leave `images` out.")
        return given, find_site(sae, given, site)
    if images is None:
        raise UserError("A model needs images to run on; give `images`.")
    wanted = site or sae.metadata.get("site")
    if wanted is None:
        raise UserError("The SAE does not name the site it was trained on; give site=….")
    tokens = sae.metadata.get("tokens", "all")
    live = LiveActivations(given, open_images(images), [wanted], tokens, workers=workers)
    return live, find_site(sae, live, given.canonical_site(wanted))


class _Encoding:
    """One call's part of an encoding: batches through the SAE, into shards."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        activations: ActivationSource,
        folder: Path,
        manifest: CodeManifest,
        flush_seconds: float,
    ) -> None:
        self.sae = sae
        self.activations = activations
        self.folder = folder
        self.manifest = manifest
        self.flush_seconds = flush_seconds
        _clean(folder, manifest)
        self.buffer = ShardBuffer(manifest)
        self.n_kept = 0  # images in the buffer that are already on disk
        if manifest.shards and manifest.shards[-1].unfinished:
            self.buffer.restore(folder, manifest)
            self.n_kept = self.buffer.n_images

    def run(self, quiet: bool) -> None:
        """Write the missing shards, and mark the codes as complete."""
        self.flushed = time.perf_counter()
        total, done = self.activations.n_images, self.manifest.n_images
        with (
            noted(self._what_is_kept),
            postponed() as stop,
            memory_told("Lower batch_images or shard_bytes."),
            progress("encode", total, "images", done=done, quiet=quiet) as line,
        ):
            self._fill_shards(line, stop)
            self._close()

    def _what_is_kept(self) -> str:
        there, total = CodeManifest.read(self.folder), self.activations.n_images
        complete = there.state == "complete"
        return kept(there.n_images, total, "images", where=self.folder, complete=complete)

    def _fill_shards(self, line: ProgressLine, stop: Stop) -> None:
        """Write all missing shards; whatever stops it, whole batches are kept."""
        manifest = self.manifest
        after = manifest.shards[-1].last_image if manifest.shards else None
        batches = cast(
            Generator[CodeBatch, None, None],
            encoded(self.sae, self.activations, manifest.site, manifest.batch_images, after=after),
        )
        with closing(batches), keeping(self._keep):
            while (batch := self._next(batches, stop)) is not None:
                self.buffer.add(batch)
                if self.buffer.n_bytes >= manifest.shard_bytes:
                    self._write()
                elif time.perf_counter() - self.flushed >= self.flush_seconds:
                    self._keep()
                line.advance(len(batch.image_indices))
            if self.buffer.n_images:
                self._write()

    def _next(self, batches: Generator[CodeBatch, None, None], stop: Stop) -> CodeBatch | None:
        """Return the next batch, None after the last; nothing is lost if a stop ends the wait."""
        with stop.at_once():
            return next(batches, None)

    def _write(self) -> None:
        """Write a full shard, or the last one, and begin the next."""
        self.manifest = self.buffer.write(self.folder, self.manifest)
        self.buffer, self.n_kept = ShardBuffer(self.manifest), 0
        self.flushed = time.perf_counter()

    def _keep(self) -> None:
        """Write an unfinished shard from memory."""
        if self.buffer.n_images > self.n_kept:
            self.manifest = self.buffer.write(self.folder, self.manifest, unfinished=True)
            self.n_kept = self.buffer.n_images
        self.flushed = time.perf_counter()

    def _close(self) -> None:
        if not self.manifest.shards:
            raise UserError(
                "No images to encode: the source is empty, or none of its images loads."
            )
        self.manifest = replace(self.manifest, state="complete")
        self.manifest.write(self.folder)


def _copy_records(recorded: Path, target: Path) -> str:
    """Copy what a store recorded about its images; a partial copy is made again with the codes.

    Returns:
        Its SHA-256, in hex.
    """
    data = recorded.read_bytes()
    try:
        with target.open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())
    except OSError as error:
        raise SparsightError(
            f"{target}: could not be written ({error.strerror or error})."
        ) from error
    return hashlib.sha256(data).hexdigest()


def _differently(field: str, there: CodeManifest, plan: CodeManifest) -> str:
    """Say in words how existing codes differ; hashes would tell a reader nothing."""
    return f"codes of another encoding ({field} differs): {_in_words(field, there, plan)}"


def _in_words(field: str, there: CodeManifest, plan: CodeManifest) -> str:
    if field.startswith("images."):
        counts = [f"{each.images['n_images']:,} images" for each in (there, plan)]
        specs = [each.images["spec"] for each in (there, plan)]
        return f"{counts[0]} of {specs[0]} there, {counts[1]} of {specs[1]} now"
    words = {
        "activations": "other weights of the model, preprocessing, images or selection of them",
        "sae.hash": "other weights of the SAE",
        "model.weights_hash": "other weights of the model",
    }
    if field in words:
        return words[field]
    found, asked = value_at(there.identity(), field), value_at(plan.identity(), field)
    return f"{found!r} there, {asked!r} now"


def _clean(folder: Path, manifest: CodeManifest) -> None:
    """Remove what a killed process left, and check what it committed."""
    remove_temporaries(folder)
    named = {shard_path(folder, n, shard): shard for n, shard in enumerate(manifest.shards)}
    for path in folder.glob("shard-*.safetensors"):
        if path not in named and re.fullmatch(r"shard-\d{5}(-until-\d{8})?", path.stem):
            path.unlink()
    for path, shard in named.items():
        check_size(path, shard.n_bytes, AGAIN)
    check_sums([(path, shard.sha256) for path, shard in named.items()], AGAIN)
