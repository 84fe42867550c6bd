"""`build_index`: one pass over the images, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from sparsight.activations import ActivationSource
from sparsight.config import check_positive, check_seed
from sparsight.errors import UserError
from sparsight.files import read_json
from sparsight.folders import replaced
from sparsight.images import ImageInfo, ImageSource
from sparsight.latents.code_shards import CodeBatch
from sparsight.latents.codes import CodeStore
from sparsight.latents.encoding import (
    FEWEST_IMAGES,
    VECTORS_AT_ONCE,
    encoded,
    find_activations,
    usual_batch,
)
from sparsight.latents.image_records import ImageRecords, image_records
from sparsight.latents.index import FILES, FORMAT, MANIFEST, VERSION, LatentIndex
from sparsight.latents.names import LatentName, names_from_truth, with_names
from sparsight.latents.statistics import Examples, LatentStatistics, label_mixture, quantile_samples
from sparsight.progress import progress
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel, count_from_start

SAMPLE_PER_PLACE = 4
"""Images in the random sample per image shown from it, so that quantiles are even."""


@torch.no_grad()
def build_index(
    sae: SparseAutoencoder,
    given: VisionModel | ActivationSource | CodeStore,
    images: ImageSource | str | Path | None = None,
    *,
    out: str | Path,
    site: str | None = None,
    top_n: int = 16,
    quantiles: int = 4,
    samples_per_quantile: int = 4,
    batch_images: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> LatentIndex:
    """Find out what every latent responds to; write it to the folder `out`.

    An existing index is replaced as a whole, names included, once the new one is on disk. Memory
    holds `n_latents × (top_n + 4 × quantiles × samples_per_quantile)` examples, whatever the number
    of images.

    Args:
        sae: the SAE.
        given: a vision model to run over `images`; or activations, stored or live; or codes from
            `encode`, which give the same index (float16 codes give one of rounded activations).
        images: the images (as for `open_images`), only with a model.
        out: folder of the index, usually `index/` in the run folder; an index there is replaced.
        site: where to read; default: the site that the SAE was trained on.
        top_n: number of strongest images to keep per latent.
        quantiles: number of equal bands into which the images that activate a latent are split, by
            its strongest activation in each image.
        samples_per_quantile: images to show from each band, from a random sample of 4 × `quantiles`
            × `samples_per_quantile` active images per latent.
        batch_images: images per batch; default: see `usual_batch`.
        seed: seed of the samples.
        workers: processes that decode images, with a model.
        metrics: result of `evaluate` on images with known attributes; it names the latents, as
            `name_from_truth` does.
        quiet: show no progress bar.

    Raises:
        UserError: SAE, site, activations and metrics do not match, a number is below 1, `out` holds
            something else, or another process is writing an index there.
        SparsightError: an activation is NaN or infinite, or a file of the codes is damaged.
    """
    check_positive(
        top_n=top_n,
        quantiles=quantiles,
        samples_per_quantile=samples_per_quantile,
        batch_images=batch_images,
    )
    check_seed(seed)
    data, site, batches = _passed(sae, given, images, site, batch_images, workers)
    names: Mapping[int, LatentName] = {}
    if metrics is not None:
        names = names_from_truth(metrics, sae.fingerprint(), sae.n_latents, Path(out))
    _refuse_other_things(Path(out))
    with replaced(Path(out), FILES, wait=0) as staged:
        settings = {
            "top_n": top_n,
            "quantiles": quantiles,
            "samples_per_quantile": samples_per_quantile,
            "seed": seed,
        }
        index = _built(sae, data, site, batches, Path(out), settings, names, quiet)
        index.write(staged)
    return LatentIndex.open(out)


def _refuse_other_things(out: Path) -> None:
    """Raise a `UserError` if the folder holds a store or codes; their files share the index's
    names.
    """
    try:
        there = read_json(out / MANIFEST)
    except UserError:  # no index, or a damaged one
        return
    if "shards" in there:
        raise UserError(
            f"{out}: holds activations or codes, which an index would overwrite. Choose another "
            "folder."
        )


def _built(
    sae: SparseAutoencoder,
    data: ActivationSource | CodeStore,
    site: str,
    batches: Iterator[CodeBatch],
    out: Path,
    settings: dict[str, int],
    names: Mapping[int, LatentName],
    quiet: bool,
) -> LatentIndex:
    """Make the index for `out`."""
    quantiles, per_quantile = settings["quantiles"], settings["samples_per_quantile"]
    device = "cpu" if isinstance(data, CodeStore) else sae.W_enc.device
    n_tokens = 0
    found = LatentStatistics(
        sae.n_latents,
        top_n=settings["top_n"],
        sample_size=SAMPLE_PER_PLACE * quantiles * per_quantile,
        seed=settings["seed"],
        device=device,
    )
    with progress("index", data.n_images, "images", quiet=quiet) as line:
        for batch in _grouped(batches):
            n_tokens = batch.n_tokens
            found.add(batch.code, batch.image_indices, n_tokens)
            line.advance(len(batch.image_indices))
    if not found.n_images:
        raise UserError("No images to index: the source is empty, or none of its images loads.")
    top = Examples(found.top.image.cpu(), found.top.token.cpu(), found.top.activation.cpu())
    bands = quantile_samples(found.sample, quantiles, per_quantile)
    samples = Examples(bands.image.cpu(), bands.token.cpu(), bands.activation.cpu())
    records = image_records(data)
    infos = _image_infos(records, top, samples)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "sae": {
            "hash": sae.fingerprint(),
            "n_latents": sae.n_latents,
            "d_in": sae.d_in,
        },
        "model": {k: v for k, v in data.model_info.items() if k != "images"},
        "images": {
            "source": records.spec,
            "fingerprint": records.fingerprint,
            "n_images": found.n_images,
            "n_unread": records.n_images - found.n_images,
            "n_vectors": found.n_vectors,
        },
        "site": site,
        "tokens": data.tokens,
        "n_tokens": n_tokens,
        "settings": settings,
    }
    table = with_names(_table(found, top, infos), names)
    return LatentIndex(out, manifest, table, _image_table(infos), top, samples)


def _passed(
    sae: SparseAutoencoder,
    given: VisionModel | ActivationSource | CodeStore,
    images: ImageSource | str | Path | None,
    site: str | None,
    batch_images: int | None,
    workers: int | None,
) -> tuple[ActivationSource | CodeStore, str, Iterator[CodeBatch]]:
    """Return what a call refers to, its site, and its codes in order."""
    if not isinstance(given, CodeStore):
        activations, site = find_activations(sae, given, images, site, workers)
        return (
            activations,
            site,
            encoded(sae, activations, site, batch_images or usual_batch(activations, site)),
        )
    if images is not None:
        raise UserError("Codes already know their images; leave `images` out.")
    given.check_sae(sae)
    n_blocks = given.model_info.get("n_blocks", 0)
    if site is not None and count_from_start(site, n_blocks) != given.site:
        raise UserError(f"{given.path}: the codes are from {given.site}, not from {site}.")
    return given, given.site, given.ordered(batch_images or FEWEST_IMAGES)


def _grouped(batches: Iterator[CodeBatch]) -> Iterator[CodeBatch]:
    """Join codes into batches of `VECTORS_AT_ONCE` or a little more.

    Counting a few vectors touches as many latents as counting many.
    """
    waiting: list[CodeBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(each.code) for each in waiting) >= VECTORS_AT_ONCE:
            yield CodeBatch.joined(waiting)
            waiting = []
    if waiting:
        yield CodeBatch.joined(waiting)


def _image_infos(records: ImageRecords, *examples: Examples) -> dict[int, ImageInfo]:
    """Return what is known about every example's image, by its place in the source."""
    images = torch.cat([found.image.flatten() for found in examples]).unique()
    return {image: records.info(image) for image in images.tolist() if image >= 0}


def _image_table(images: dict[int, ImageInfo]) -> pa.Table:
    infos = images.values()

    def text(values: Iterable[str | None]) -> pa.Array:
        return pa.array(list(values), pa.string())

    return pa.table(
        {
            "image": pa.array(list(images), pa.int64()),
            "id": text(info.id for info in infos),
            "uri": text(info.uri for info in infos),
            "label": text(info.label for info in infos),
            "caption": text(info.caption for info in infos),
        }
    )


def _table(found: LatentStatistics, top: Examples, infos: dict[int, ImageInfo]) -> pa.Table:
    active = found.n_active.cpu()
    mean = found.sum.cpu() / active
    labels = {image: info.label for image, info in infos.items()}
    mixtures = [
        label_mixture(images, activations, labels)
        for images, activations in zip(top.image.tolist(), top.activation.tolist(), strict=True)
    ]
    nothing = pa.nulls(found.n_latents, pa.string())
    return pa.table(
        {
            "latent": pa.array(range(found.n_latents), pa.int32()),
            "density": pa.array((active.double() / found.n_vectors).numpy()),
            "mean_activation": pa.array(mean.numpy(), mask=(active == 0).numpy()),
            "max_activation": pa.array(top.activation[:, 0].contiguous().numpy()),
            "n_active": pa.array(active.numpy()),
            "n_active_images": pa.array(found.n_active_images.cpu().numpy()),
            "label_entropy": pa.array([m.entropy for m in mixtures], pa.float64()),
            "top_label": pa.array([m.label for m in mixtures], pa.string()),
            "top_label_share": pa.array([m.share for m in mixtures], pa.float64()),
            "name": nothing,
            "name_score": pa.nulls(found.n_latents, pa.float64()),
            "name_source": nothing,
        }
    )
