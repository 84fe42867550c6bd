"""Activations made on the fly, where a disk would be too small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from sparsight.activations.source import OrderedBatch
from sparsight.activations.statistics import RunningSums, SiteStatistics
from sparsight.activations.stream import VectorStream, WindowPlan
from sparsight.errors import SparsightError, UserError
from sparsight.images import ImageSource, load_batches
from sparsight.vision import VisionModel

WINDOW_VECTORS = 1 << 17
STATISTICS_IMAGES = 2048


class LiveActivations:
    """Reads the model whenever vectors are asked for; takes the place of a store.

    Args:
        model: the vision model.
        images: the images.
        sites: where to read.
        tokens: which positions.
        batch_size: images in a forward pass.
        workers: processes that decode.
        window_vectors: how many vectors of each site are mixed with one another.
        statistics_images: statistics are estimated on so many random images; exact where there
            are no more.
        max_failed: share of the images that may fail.

    Raises:
        UserError: the model has no such site or positions.
    """

    def __init__(
        self,
        model: VisionModel,
        images: ImageSource,
        sites: Sequence[str],
        tokens: str = "all",
        *,
        batch_size: int = 64,
        workers: int | None = None,
        window_vectors: int = WINDOW_VECTORS,
        statistics_images: int = STATISTICS_IMAGES,
        max_failed: float = 0.01,
    ) -> None:
        if not sites:
            raise UserError(f"Name at least one site, e.g. {model.sites[-1]!r}.")
        if min(batch_size, window_vectors, statistics_images) < 1:
            raise UserError("batch_size, window_vectors and statistics_images must be at least 1.")
        self.model = model
        self.images = images
        self.sites = tuple(dict.fromkeys(model.canonical_site(site) for site in sites))
        self.tokens = tokens
        self.batch_size = batch_size
        self.workers = workers
        self.window_vectors = window_vectors
        self.statistics_images = statistics_images
        self.max_failed = max_failed
        self.failures: dict[int, str] = {}
        self._n_tokens = {site: model.token_count(site, tokens) for site in self.sites}  # type: ignore[arg-type]
        self._stats: dict[str, SiteStatistics] = {}
        self.model_info: Mapping[str, Any] = {
            "id": model.id,
            "revision": model.revision,
            "family": model.family,
            "weights_hash": model.weights_hash,
            "dtype": str(model.dtype).removeprefix("torch."),
            "patch_grid": list(model.patch_grid),
            "n_prefix": model.n_prefix,
            "preprocessing": dict(model.preprocessing),
            "images": images.spec,
        }

    @property
    def n_images(self) -> int:
        """Images, the ones that failed so far not counted."""
        return len(self.images) - len(self.failures)

    @property
    def n_tokens(self) -> Mapping[str, int]:
        """Vectors an image gives at each site."""
        return self._n_tokens

    def d_in(self, site: str) -> int:
        """Width of a site's vectors."""
        return self.model.d_in(self._site(site))

    def source(self) -> ImageSource:
        """The images."""
        return self.images

    def stats(self, site: str) -> SiteStatistics:
        """Statistics, estimated on a random sample of the images, all sites in one pass."""
        site = self._site(site)
        if not self._stats:
            sums = {each: RunningSums.nothing(self.d_in(each)) for each in self.sites}
            chosen = np.arange(len(self.images))
            if len(chosen) > self.statistics_images:
                rng = np.random.default_rng(0)
                chosen = np.sort(rng.choice(chosen, self.statistics_images, replace=False))
            for batch in self._read(chosen, self.sites):
                for each, x in batch.activations.items():
                    sums[each].add(x.flatten(0, 1))
            self._stats = {each: running.statistics() for each, running in sums.items()}
        return self._stats[site]

    def stream(self, sites: Sequence[str], batch_size: int, *, seed: int = 0) -> VectorStream:
        """Vectors without end, shuffled, float32; the same positions at each site.

        Raises:
            UserError: the sites give different numbers of vectors an image.
        """
        names = [self._site(site) for site in sites]
        counts = {self._n_tokens[site] for site in names}
        if len(counts) > 1:
            raise UserError(
                f"The sites {', '.join(names)} give different numbers of vectors an image; "
                "train on them one by one."
            )
        n_tokens = counts.pop()
        plan = WindowPlan(
            n_images=len(self.images),
            block_images=1,
            window_images=max(1, self.window_vectors // n_tokens),
        )

        def load(images: Int64[np.ndarray, " images"]) -> dict[str, Tensor]:
            batches = list(self._read(images, names))
            if not batches:
                return {site: torch.empty(0, self.d_in(site)) for site in names}
            return {
                site: torch.cat([each.activations[site].flatten(0, 1) for each in batches])
                for site in names
            }

        return VectorStream(
            plan,
            load,
            names,
            batch_size,
            seed=seed,
            vectors_per_epoch=len(self.images) * n_tokens,
            where=lambda images, _: (
                f"images {images.min()} to {images.max()} of {self.images.spec}"
            ),
            prefetch=False,
        )

    def ordered(self, sites: Sequence[str], batch_images: int = 64) -> Iterator[OrderedBatch]:
        """All images once, in order, float32; images that cannot be read are left out."""
        names = [self._site(site) for site in sites]
        return self._read(np.arange(len(self.images)), names, batch_images)

    def _read(
        self,
        images: Int64[np.ndarray, " images"],
        sites: Sequence[str],
        batch_images: int | None = None,
    ) -> Iterator[OrderedBatch]:
        batches = load_batches(
            self.images,
            self.model.transform,
            batch_images or self.batch_size,
            indices=images.tolist(),
            workers=self.workers,
        )
        for batch in batches:
            self._note_failures(batch.failures)
            if not batch.indices:
                continue
            read = self.model.read(batch.pixels, sites, self.tokens)  # type: ignore[arg-type]
            found = {site: x.to("cpu", torch.float32) for site, x in read.items()}
            for site, x in found.items():
                if not bool(torch.isfinite(x).all()):
                    raise SparsightError(
                        f"{site}: activations are NaN or infinite in images {batch.indices[0]} to "
                        f"{batch.indices[-1]} of {self.images.spec}."
                    )
            yield OrderedBatch(torch.tensor(batch.indices), found)

    def _note_failures(self, failures: Sequence[tuple[int, str]]) -> None:
        fresh = {index: reason for index, reason in failures if index not in self.failures}
        for index, reason in fresh.items():
            print(f"{self.images.info(index).id}: could not be read ({reason}).")
        self.failures |= fresh
        if len(self.failures) > self.max_failed * len(self.images):
            raise SparsightError(
                f"{len(self.failures):,} of {len(self.images):,} images could not be read, more "
                f"than max_failed = {self.max_failed:.1%} allows."
            )

    def _site(self, site: str) -> str:
        name = self.model.canonical_site(site)
        if name not in self.sites:
            raise UserError(f"Not read here: {site!r}. The sites are: {', '.join(self.sites)}.")
        return name
