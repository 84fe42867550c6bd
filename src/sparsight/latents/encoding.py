"""`encode`: from activations to sparse codes, batch by batch, and from there to shards on disk.

A shard is committed when the manifest that names it is renamed into place; see `codes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from sparsight.activations import ActivationSource, LiveActivations
from sparsight.activations.shards import check_size
from sparsight.config import check_positive, first_difference
from sparsight.errors import SparsightError, UserError
from sparsight.evaluation.data import find_site
from sparsight.files import lock, remove_temporaries
from sparsight.images import ImageSource, open_images
from sparsight.latents.codes import (
    AGAIN,
    DTYPES,
    MANIFEST,
    CodeBatch,
    CodeManifest,
    CodeStore,
    ShardBuffer,
    shard_path,
)
from sparsight.progress import progress
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel

FEWEST_IMAGES = 64
VECTORS_AT_ONCE = 16_384

SHARD_BYTES = 64 << 20
"""Roughly how much a shard holds; twice that is in memory."""


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
    workers: int | None = None,
    quiet: bool = False,
) -> CodeStore:
    """Encode the activations of all images; keep what is active on disk.

    Unfinished codes of the same SAE, activations, site and dtype are continued at their first
    missing shard, with the batches and shards that they were begun with; finished ones are returned
    as they are. Continued codes are the same, bit for bit, as ones that were never cut. Memory
    holds one batch of activations and one shard of codes.

    Args:
        sae: the SAE.
        given: a vision model, to be run over `images`; or activations: a store, or
            live ones.
        images: the pictures (what `open_images` takes), with a model; nothing with activations.
        out: folder of the codes.
        site: where to read; default the site that the SAE was trained on.
        dtype: of the values on disk; float16 keeps 3 digits and takes two thirds of the room. What
            is too small for it is kept at its smallest number, 2⁻²⁴.
        batch_images: images at a time; default see `usual_batch`.
        shard_bytes: a shard ends with the batch that brings it to so many bytes.
        workers: processes that decode pictures, with a model.
        quiet: no progress bar.

    Raises:
        UserError: SAE, site and activations do not belong together, a number is below 1, `out`
            holds something else, or another process is at it.
        SparsightError: an activation is NaN, infinite or beyond the range of `dtype`, or the disk
            is full. What was written stays whole.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}.")
    check_positive(batch_images=batch_images, shard_bytes=shard_bytes)
    folder = Path(out)
    activations, site = find_activations(sae, given, images, site, workers)
    source = activations.source()
    plan = CodeManifest(
        sae={"hash": sae.fingerprint(), "n_latents": sae.n_latents, "d_in": sae.d_in},
        activations=activations.fingerprint,
        model={k: v for k, v in activations.model_info.items() if k != "images"},
        images={
            "spec": source.spec,
            "fingerprint": source.fingerprint(),
            "n_images": len(source),
        },
        site=site,
        tokens=activations.tokens,
        n_tokens=activations.n_tokens[site],
        dtype=dtype,
        batch_images=batch_images or usual_batch(activations, site),
        shard_bytes=shard_bytes,
    )
    with _claimed(folder, plan) as manifest:
        if manifest.state != "complete":
            _encode_rest(sae, activations, folder, manifest, quiet)
    return CodeStore(folder)


def encoded(
    sae: SparseAutoencoder,
    activations: ActivationSource,
    site: str,
    batch_images: int,
    *,
    after: int | None = None,
) -> Iterator[CodeBatch]:
    """The codes of all images, in order; of those behind the batch with image `after`, if given.

    Raises:
        SparsightError: an activation, or a latent's, is NaN or infinite.
    """
    device = sae.W_enc.device
    rest = {} if after is None else {"after": after}
    for batch in activations.ordered([site], batch_images=batch_images, **rest):
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
    """Images to encode at a time: 64; of a store as many as it takes for some 16,000 vectors.

    Few vectors would not pay for the encoder's copy in low precision, with which latents are
    selected quickly.
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
    """The activations that a call means, and the site in them.

    Raises:
        UserError: SAE, site and activations do not belong together.
    """
    if not isinstance(given, VisionModel):
        if images is not None:
            raise UserError("Activations already know their images; leave `images` out.")
        return given, find_site(sae, given, site)
    if images is None:
        raise UserError("A model needs images to look at: give `images`.")
    wanted = site or sae.metadata.get("site")
    if wanted is None:
        raise UserError("The SAE does not say which site it was trained on; give site=….")
    tokens = sae.metadata.get("tokens", "all")
    live = LiveActivations(given, open_images(images), [wanted], tokens, workers=workers)
    return live, find_site(sae, live, given.canonical_site(wanted))


def _encode_rest(
    sae: SparseAutoencoder,
    activations: ActivationSource,
    folder: Path,
    manifest: CodeManifest,
    quiet: bool,
) -> None:
    """Write the shards that are missing, and declare the codes complete."""
    _clean(folder, manifest)
    after = manifest.shards[-1].last_image if manifest.shards else None
    buffer = ShardBuffer(manifest)
    title, total, done = "encode", activations.n_images, manifest.n_images
    with progress(title, total, "images", done=done, quiet=quiet) as line:
        for batch in encoded(sae, activations, manifest.site, manifest.batch_images, after=after):
            buffer.add(batch)
            if buffer.n_bytes >= manifest.shard_bytes:
                manifest = buffer.write(folder, manifest)
                buffer = ShardBuffer(manifest)
            line.advance(len(batch.image_indices))
        if buffer.n_bytes:
            manifest = buffer.write(folder, manifest)
    if not manifest.shards:
        raise UserError("There is not one image to encode.")
    replace(manifest, state="complete").write(folder)


@contextmanager
def _claimed(folder: Path, plan: CodeManifest) -> Iterator[CodeManifest]:
    """The manifest to go on with, while no other process is at the same folder."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; codes are a folder.")
    there = _manifest_of(folder, plan)
    if there is not None and there.state == "complete":
        yield there
        return
    with lock(folder / ".lock", f"{folder}: another process is encoding into it."):
        there = _manifest_of(folder, plan)
        if there is None:
            plan.write(folder)
        yield there or plan


def _manifest_of(folder: Path, plan: CodeManifest) -> CodeManifest | None:
    """The manifest that is there, if any; it must be of the same encoding."""
    if not (folder / MANIFEST).exists():
        if folder.is_dir() and any(each.name[0] != "." for each in folder.iterdir()):
            raise UserError(f"{folder}: is not empty and holds no codes.")
        return None
    there = CodeManifest.read(folder)
    field = first_difference(there.identity(), plan.identity())
    if field is not None:
        raise UserError(
            f"{folder}: holds codes of another encoding ({field} differs). Choose another folder, "
            "or remove this one."
        )
    return there


def _clean(folder: Path, manifest: CodeManifest) -> None:
    """Remove what a killed process left, and look at what it committed."""
    remove_temporaries(folder)
    shard_path(folder, len(manifest.shards)).unlink(missing_ok=True)
    for number, shard in enumerate(manifest.shards):
        check_size(shard_path(folder, number), shard.n_bytes, AGAIN)
