"""`build_index`: one pass over the images, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Int64
from torch import Tensor

from sparsight.activations import ActivationSource
from sparsight.config import check_positive, check_seed
from sparsight.errors import UserError
from sparsight.files import read_json, write_bytes
from sparsight.folders import replaced
from sparsight.images import ImageSource
from sparsight.latents.code_shards import CodeBatch
from sparsight.latents.codes import CodeStore
from sparsight.latents.embedding_writer import EmbeddingRecorder, Wanted, embedding_kind
from sparsight.latents.encoding import (
    FEWEST_IMAGES,
    VECTORS_AT_ONCE,
    encoded,
    find_activations,
    usual_batch,
)
from sparsight.latents.heatmaps import has_heatmaps
from sparsight.latents.image_records import ImageRecords, image_records
from sparsight.latents.index import LatentIndex
from sparsight.latents.index_files import (
    AGAIN,
    BUILT,
    BY_IMAGE,
    BY_LATENT,
    EXAMPLES,
    FILES,
    FORMAT,
    IMAGES,
    LABEL_COUNTS,
    LABELS,
    LATENTS,
    MANIFEST,
    NEAR,
    VERSION,
    described,
    parquet,
    write_manifest,
)
from sparsight.latents.names import LatentName, names_from_truth, names_of, with_names
from sparsight.latents.nearness import Nearness, NearnessSettings, recording
from sparsight.latents.postings import Postings, PostingSpool
from sparsight.latents.statistics import LatentStatistics
from sparsight.latents.summary import latent_table, summarise
from sparsight.progress import progress
from sparsight.sae import SparseAutoencoder
from sparsight.sae.files import WEIGHTS
from sparsight.vision import VisionModel, count_from_start

UNIFORM_SAMPLES = 16
"""Images drawn by default from all in which a latent fires."""


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
    uniform_samples: int = UNIFORM_SAMPLES,
    batch_images: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    embeddings: Wanted = "auto",
    neighbours: bool = True,
    quiet: bool = False,
) -> LatentIndex:
    """Find out what every latent responds to; write it to the folder `out`.

    An existing index is replaced as a whole, names included, once the new one is on disk. Memory
    holds the statistics and examples of each latent, and `ENTRIES_AT_ONCE` entries of the posting
    lists, whatever the number of images.

    Args:
        sae: the SAE.
        given: a vision model to run over `images`; or activations, stored or live; or codes from
            `encode`, which give the same index, except for the embeddings and what depends on them
            (float16 codes give one of rounded activations).
        images: the images (as for `open_images`), only with a model.
        out: folder of the index, usually `index/` in the run folder; an index there is replaced.
        site: where to read; default: the site that the SAE was trained on.
        top_n: number of strongest images to keep per latent.
        quantiles: number of equal bands into which the images that activate a latent are split, by
            its strongest activation in each image.
        samples_per_quantile: images to draw from each band.
        uniform_samples: images to draw from all in which a latent fires.
        batch_images: images per batch; default: see `usual_batch`.
        seed: seed of the samples.
        workers: processes that decode images, with a model.
        metrics: result of `evaluate` on images with known attributes; it names the latents, as
            `name_from_truth` does.
        embeddings: kind of embeddings of the images, for nearest images, near misses, and examples
            without near-duplicates: `joint` (with texts), `pooled` (mean of the activations),
            `codes` or `none`; `auto` takes what costs no further pass.
        neighbours: find the closest latents of every latent, and its place on the map.
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
        uniform_samples=uniform_samples,
        batch_images=batch_images,
    )
    check_seed(seed)
    passed = _passed(sae, given, images, site, batch_images, workers, embeddings)
    names: Mapping[int, LatentName] = {}
    if metrics is not None:
        names = names_from_truth(metrics, sae.fingerprint(), sae.n_latents, Path(out))
    settings = {
        "top_n": top_n,
        "quantiles": quantiles,
        "samples_per_quantile": samples_per_quantile,
        "uniform_samples": uniform_samples,
        "seed": seed,
    }
    nearness = NearnessSettings(embeddings, neighbours)
    return _Build(sae, passed, settings, names, nearness, quiet).replace(Path(out))


@torch.no_grad()
def upgrade_index(
    folder: str | Path,
    sae: SparseAutoencoder,
    given: VisionModel | ActivationSource | CodeStore,
    images: ImageSource | str | Path | None = None,
    *,
    batch_images: int | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> LatentIndex:
    """Bring an index of format version 1 to version 2, which needs a pass over the same images.

    Names and settings are kept. An index of version 2 is returned as it is.

    Args:
        folder: the index, or the run that it belongs to.
        sae: the SAE.
        given: as for `build_index`; it must have the images of the index.
        images: as for `build_index`.
        batch_images: as for `build_index`.
        workers: as for `build_index`.
        quiet: show no progress bar.

    Raises:
        UserError: there is no index, it belongs to another SAE, or the images are not those of the
            index.
    """
    index = LatentIndex.open(folder, sae)
    if index.version == VERSION:
        return index
    passed = _passed(sae, given, images, index.site, batch_images, workers, "auto")
    about, now = index.manifest["images"], image_records(passed.data)
    if now.fingerprint != about["fingerprint"]:
        raise UserError(
            f"{index.folder}: was built from {about['n_images'] + about['n_unread']:,} images of "
            f"{about['source']}, which are not the {now.n_images:,} images of {now.spec}. Give the "
            "images of the index, or build a new index without --upgrade."
        )
    settings = {"uniform_samples": UNIFORM_SAMPLES, **index.manifest["settings"]}
    build = _Build(sae, passed, settings, names_of(index), NearnessSettings(), quiet)
    return build.replace(index.folder)


@dataclass(frozen=True)
class _Pass:
    """What a call refers to.

    Attributes:
        data: activations or codes.
        site: their site.
        batches: the codes, in order.
        recorder: takes embeddings from the same pass; None for none.
    """

    data: ActivationSource | CodeStore
    site: str
    batches: Iterator[CodeBatch]
    recorder: EmbeddingRecorder | None


def _refuse_other_things(out: Path) -> None:
    """Raise a `UserError` if the folder is a run, or holds a store or codes; their files share the
    index's names.
    """
    if (out / WEIGHTS).exists():
        raise UserError(
            f"{out}: holds an SAE, whose index is looked for in {out / 'index'}. Give that folder, "
            "or no folder."
        )
    try:
        there = read_json(out / MANIFEST)
    except UserError:  # no index, or a damaged one
        return
    if "shards" in there:
        raise UserError(
            f"{out}: holds activations or codes, which an index would overwrite. Choose another "
            "folder."
        )


@dataclass(frozen=True)
class _Build:
    """One index on its way to disk."""

    sae: SparseAutoencoder
    passed: _Pass
    settings: dict[str, int]
    names: Mapping[int, LatentName]
    nearness: NearnessSettings
    quiet: bool

    def replace(self, out: Path) -> LatentIndex:
        """Write the index; if the process is killed at any point, the old or the new remains."""
        _refuse_other_things(out)
        with replaced(out, FILES, wait=0) as staged:
            self.write(staged)
        return LatentIndex.open(out)

    def write(self, folder: Path) -> None:
        """Write all files into an empty folder."""
        spool = PostingSpool(folder)
        statistics, places, n_tokens = self._collect(folder, spool)
        records = image_records(self.passed.data)
        shape = (self.sae.n_latents, records.n_images)
        spool.write(folder / BY_IMAGE, folder / BY_LATENT, records.n_images, self.sae.n_latents)
        images = records.table(places)
        by_latent, by_image = (
            Postings.open(folder / name, *sides, spool.n_entries, tokens=tokens, again=AGAIN)
            for name, sides, tokens in ((BY_LATENT, shape, True), (BY_IMAGE, shape[::-1], False))
        )
        near = Nearness(folder, by_latent, by_image, places, self.settings["seed"], self.quiet)
        first = near.embed(self.passed.recorder)
        summary = summarise(by_latent, images, self.settings, first)
        n_label_counts = summary.labels.write(folder / LABEL_COUNTS)
        table = with_names(latent_table(statistics, summary, images), self.names)
        near.miss(summary.examples.top)
        if self.nearness.neighbours:
            table = near.neighbours(self.sae.W_dec, table)
        write_bytes(folder / LATENTS, parquet(table))
        write_bytes(folder / IMAGES, parquet(images))
        write_bytes(folder / LABELS, parquet(summary.labels.table))
        write_bytes(folder / EXAMPLES, safetensors.torch.save(summary.tensors()))
        counts = {
            "n_tokens": n_tokens,
            "n_entries": spool.n_entries,
            "n_label_counts": n_label_counts,
        }
        self._write_manifest(folder, statistics, records, {**counts, **near.about})

    def _collect(
        self, folder: Path, spool: PostingSpool
    ) -> tuple[LatentStatistics, Int64[np.ndarray, " images"], int]:
        """Make the pass; return statistics, places of the images that were read, and tokens."""
        passed = self.passed
        if passed.recorder is not None:
            passed.recorder.begin(folder)
        statistics = _statistics(self.sae, passed.data, passed.site, spool)
        places: list[Int64[Tensor, " batch"]] = []
        n_tokens = 0
        with progress("index", passed.data.n_images, "images", quiet=self.quiet) as line:
            for batch in _grouped(passed.batches):
                n_tokens = batch.n_tokens
                statistics.add(batch)
                places.append(batch.image_indices.cpu())
                line.advance(len(batch.image_indices))
        if not statistics.n_images:
            raise UserError("No images to index: the source is empty, or none of its images loads.")
        return statistics, torch.cat(places).numpy(), n_tokens

    def _write_manifest(
        self,
        folder: Path,
        statistics: LatentStatistics,
        records: ImageRecords,
        about: Mapping[str, Any],
    ) -> None:
        """Write what ties the index to its origin, with the checksum of each file."""
        data = self.passed.data
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "sae": {
                "hash": self.sae.fingerprint(),
                "n_latents": self.sae.n_latents,
                "d_in": self.sae.d_in,
            },
            "model": {k: v for k, v in data.model_info.items() if k != "images"},
            "images": {
                "source": records.spec,
                "fingerprint": records.fingerprint,
                "n_images": statistics.n_images,
                "n_unread": records.n_images - statistics.n_images,
                "n_vectors": statistics.n_vectors,
            },
            "site": self.passed.site,
            "tokens": data.tokens,
            "settings": self.settings,
            **about,
            "files": {
                name: described(folder / name)
                for name in (*BUILT, *NEAR)
                if name in BUILT or (folder / name).exists()
            },
        }
        write_manifest(folder, manifest)


def _statistics(
    sae: SparseAutoencoder, data: ActivationSource | CodeStore, site: str, spool: PostingSpool
) -> LatentStatistics:
    """Prepare statistics for the positions that the SAE reads."""
    about = data.model_info
    rows, columns = about.get("patch_grid") or (0, 0)
    patches = has_heatmaps(data.tokens, site) and rows * columns > 0
    return LatentStatistics(
        sae.n_latents,
        spool,
        n_prefix=int(about.get("n_prefix") or 0) if patches and data.tokens == "all" else 0,
        grid=(rows, columns) if patches else None,
        expected_images=data.n_images,
        device="cpu" if isinstance(data, CodeStore) else sae.W_enc.device,
    )


def _passed(
    sae: SparseAutoencoder,
    given: VisionModel | ActivationSource | CodeStore,
    images: ImageSource | str | Path | None,
    site: str | None,
    batch_images: int | None,
    workers: int | None,
    embeddings: Wanted,
) -> _Pass:
    """Return what a call refers to."""
    if not isinstance(given, CodeStore):
        activations, site = find_activations(sae, given, images, site, workers)
        activations, recorder = recording(embeddings, activations, site)
        size = batch_images or usual_batch(activations, site)
        if recorder is None:
            return _Pass(activations, site, encoded(sae, activations, site, size), None)
        batches = encoded(sae, activations, site, size, also=[recorder.site], watch=recorder.add)
        return _Pass(activations, site, batches, recorder)
    if images is not None:
        raise UserError("Codes already know their images; leave `images` out.")
    given.check_sae(sae)
    n_blocks = given.model_info.get("n_blocks", 0)
    if site is not None and count_from_start(site, n_blocks) != given.site:
        raise UserError(f"{given.path}: the codes are from {given.site}, not from {site}.")
    kind = embedding_kind(embeddings, None)
    recorder = None if kind is None else EmbeddingRecorder(kind, given.site)
    batches = given.ordered(batch_images or FEWEST_IMAGES)
    return _Pass(given, given.site, batches, recorder)


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
