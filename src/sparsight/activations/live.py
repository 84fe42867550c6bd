"""Activations computed on the fly, for when they would not fit on a disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.activations.manifest import describe_model
from sparsight.activations.source import (
    OrderedBatch,
    count_tokens,
    matching_sites,
    same_count,
)
from sparsight.activations.statistics import RunningSums, SiteStatistics, all_finite
from sparsight.activations.stream import Position, VectorStream, WindowPlan
from sparsight.config import check_positive
from sparsight.errors import SparsightError, UserError
from sparsight.files import sha256_json
from sparsight.images import ImageBatch, ImageSource
from sparsight.images.failures import FailureTally
from sparsight.vision import ImagePass, PassSettings, VisionModel

WINDOW_BYTES = 256 << 20
STATISTICS_IMAGES = 2048
_FAILURES_SHOWN = 10

Read = tuple[list[int], dict[str, Float[Tensor, "batch tokens d_in"]]]
"""The images of a batch that could be read, and their activations in the model's own dtype."""


class LiveActivations:
    """Runs the model whenever vectors are asked for; a replacement for a store.

    An image that cannot be read is left out, reported once, and kept in `failures`.

    Args:
        model: the vision model.
        images: the images.
        sites: where to read.
        tokens: which positions: "all", "patches", "cls" or "mean".
        batch_size: number of images per forward pass.
        workers: number of processes that decode; see `load_batches`.
        window_bytes: bytes that a stream holds and mixes, for all its sites together.
        statistics_images: number of random images on which statistics are estimated; with no more
            images than that they are exact.
        max_failed: largest share of the images that may fail.

    Attributes:
        sites: canonical names of the sites.
        image_indices: place of each image in the whole source, of which this may be a view.
        failures: place in the source, and reason, of each image that could not be read so far.
        model_info: as in `ActivationStore`.

    Raises:
        UserError: the model has no such site or positions, or a number is out of range.
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
        window_bytes: int = WINDOW_BYTES,
        statistics_images: int = STATISTICS_IMAGES,
        max_failed: float = 0.01,
    ) -> None:
        if isinstance(sites, str) or not sites:
            raise UserError(f"sites is {sites!r}; it is a list, e.g. [{model.sites[-1]!r}].")
        check_positive(
            batch_size=batch_size, window_bytes=window_bytes, statistics_images=statistics_images
        )
        if not len(images):
            raise UserError(f"{images.spec}: holds no images.")
        self.model = model
        self.images = images
        self.sites = matching_sites(sites, model.sites, model.canonical_site)
        self.tokens = tokens
        self.batch_size = batch_size
        self.workers = workers
        self.window_bytes = window_bytes
        self.statistics_images = statistics_images
        self.max_failed = max_failed
        self.failures: dict[int, str] = {}
        self.image_indices: npt.NDArray[np.int64] = np.arange(len(images))
        self._n_listed = len(images)
        self._tally = FailureTally(len(images), max_failed)
        self._n_tokens = count_tokens(model, self.sites, tokens)
        self._stats: dict[str, SiteStatistics] = {}
        self.model_info: Mapping[str, Any] = {
            **describe_model(model),
            "preprocessing": dict(model.preprocessing),
            "images": images.spec,
        }

    @property
    def fingerprint(self) -> str:
        """Return a hex digest, the same for sources with the same vectors in the same order."""
        return sha256_json(
            {
                "model": {**describe_model(self.model), "id": None, "revision": None},
                "preprocessing": self.model.preprocessing,
                "images": self.images.fingerprint(),
                "sites": self.sites,
                "tokens": self.tokens,
                "window_bytes": self.window_bytes,
            }
        )

    def canonical_site(self, site: str) -> str:
        """Return the canonical name of a site; negative block numbers count from the end.

        Raises:
            UserError: the site is not read here.
        """
        name = self.model.canonical_site(site)
        if name not in self.sites:
            raise UserError(f"Not read here: {site!r}. The sites are: {', '.join(self.sites)}.")
        return name

    @property
    def n_images(self) -> int:
        """The number of images, without those that have failed so far."""
        return len(self.images) - len(self.failures)

    @property
    def n_listed(self) -> int:
        """The number of images of the whole source, including failed and unselected ones."""
        return self._n_listed

    @property
    def n_tokens(self) -> Mapping[str, int]:
        """The number of vectors per image at each site."""
        return self._n_tokens

    def d_in(self, site: str) -> int:
        """Return the width of a site's vectors."""
        return self.model.d_in(self._site(site))

    def source(self) -> ImageSource:
        """Return the images."""
        return self.images

    def with_tokens(self, tokens: str) -> LiveActivations:
        """Return the activations at other positions of the same images."""
        return self._view(self.images, tokens, self.image_indices)

    def with_sites(self, sites: Sequence[str]) -> LiveActivations:
        """Return the activations at other sites of the same images.

        Raises:
            UserError: the model has no such site, or it lacks these positions.
        """
        return self._view(self.images, self.tokens, self.image_indices, sites)

    def select(self, image_indices: Sequence[int] | npt.NDArray[np.int64]) -> LiveActivations:
        """Return a view of some images, given by their places in the whole source, in its order.

        The view's `source()` has only these images.

        Raises:
            UserError: an image is not among these.
        """
        wanted = np.unique(np.asarray(image_indices, dtype=np.int64))
        absent = np.setdiff1d(wanted, self.image_indices)
        if len(absent):
            raise UserError(f"{self.images.spec}: image {absent[0]} is not read here.")
        chosen = np.flatnonzero(np.isin(self.image_indices, wanted))
        return self._view(
            self.images.select(chosen.tolist()), self.tokens, self.image_indices[chosen]
        )

    def _view(
        self,
        images: ImageSource,
        tokens: str,
        image_indices: npt.NDArray[np.int64],
        sites: Sequence[str] | None = None,
    ) -> LiveActivations:
        view = LiveActivations(
            self.model,
            images,
            self.sites if sites is None else sites,
            tokens,
            batch_size=self.batch_size,
            workers=self.workers,
            window_bytes=self.window_bytes,
            statistics_images=self.statistics_images,
            max_failed=self.max_failed,
        )
        view.image_indices, view._n_listed = image_indices, self._n_listed
        view.model_info = self.model_info
        return view

    def stats(self, site: str) -> SiteStatistics:
        """Return statistics over `statistics_images` random images (a fixed sample).

        They are exact if there are no more images than that, and an estimate otherwise; `count`
        shows it.
        """
        site = self._site(site)
        if not self._stats:
            sums = {name: RunningSums.nothing(self.d_in(name)) for name in self.sites}
            chosen = np.arange(len(self.images))
            if len(chosen) > self.statistics_images:
                random = np.random.default_rng(0)
                chosen = np.sort(random.choice(chosen, self.statistics_images, replace=False))
            for _, activations in self._read(self._batches(chosen, self.batch_size), self.sites):
                for name, x in activations.items():
                    sums[name].add(x.flatten(0, 1))
            self._stats = {name: running.statistics() for name, running in sums.items()}
        return self._stats[site]

    def stream(self, sites: Sequence[str], batch_size: int, *, seed: int = 0) -> VectorStream:
        """Stream vectors without end, shuffled, float32; the same positions at each site.

        Images come in random order, in windows of about 256 MB whose vectors are mixed. A restored
        stream reads its current window again. If all images fit in one window, they go through the
        model once, not once per epoch.

        Raises:
            UserError: the sites give different numbers of vectors per image.
        """
        names = [self._site(site) for site in sites]
        n_tokens = same_count(names, self._n_tokens)
        per_image = sum(n_tokens * self.d_in(site) for site in names) * self.model.dtype.itemsize
        window_images = max(1, self.window_bytes // per_image)
        batch_images = min(self.batch_size, window_images)
        plan = WindowPlan(
            n_images=len(self.images),
            block_images=1,
            # Whole batches, so that one chain of workers serves one window after another.
            window_images=window_images - window_images % batch_images,
        )
        chain = _Chain(self, plan, seed, batch_images)

        def load(at: Position, images: npt.NDArray[np.int64]) -> dict[str, Tensor]:
            room = {
                site: torch.empty(len(images), n_tokens, self.d_in(site), dtype=self.model.dtype)
                for site in names
            }
            n = 0
            for indices, activations in self._read(chain.batches(at, len(images)), names):
                for site, x in activations.items():
                    room[site][n : n + len(indices)].copy_(x)
                n += len(indices)
            return {site: x[:n].flatten(0, 1) for site, x in room.items()}

        return VectorStream(
            plan,
            load,
            names,
            batch_size,
            seed=seed,
            vectors_per_epoch=len(self.images) * n_tokens,
            where=lambda images, _: f"{len(images):,} images of {self.images.spec}",
            prefetch=False,
        )

    def ordered(
        self, sites: Sequence[str], batch_images: int = 64, *, after: int | None = None
    ) -> Iterator[OrderedBatch]:
        """Give all images once, in order, float32; images that cannot be read are left out.

        See `ActivationSource.ordered` for `after`.
        """
        names = [self._site(site) for site in sites]
        check_positive(batch_images=batch_images)
        start = 0 if after is None else (after // batch_images + 1) * batch_images
        batches = self._batches(np.arange(start, len(self.images)), batch_images)
        return (
            OrderedBatch(torch.tensor(indices), {site: x.float() for site, x in read.items()})
            for indices, read in self._read(batches, names)
        )

    def _batches(self, images: npt.NDArray[np.int64], batch_size: int) -> Iterator[ImageBatch]:
        settings = PassSettings(batch_size, self.workers)
        return ImagePass(
            self.model, self.images, settings=settings, indices=images.tolist()
        ).batches()

    def _read(self, batches: Iterator[ImageBatch], sites: Sequence[str]) -> Iterator[Read]:
        """Run batches through the model and note failures; skip batches with nothing readable."""
        for batch in batches:
            self._note_failures(batch.failures)
            if not batch.indices:
                continue
            read = self.model.read(batch.pixels, sites, self.tokens)  # type: ignore[arg-type]
            activations = {site: x.cpu() for site, x in read.items()}
            for site, x in activations.items():
                if not all_finite(x):
                    bad = x.isfinite().flatten(1).all(dim=1).logical_not().nonzero()
                    first = self.images.known(batch.indices[int(bad[0, 0])]).id
                    raise SparsightError(
                        f"{site}: activations are NaN or infinite ({len(bad)} of "
                        f"{len(batch.indices)} images of a batch, image {first} first)."
                    )
            yield batch.indices, activations

    def _note_failures(self, failures: Sequence[tuple[int, str]]) -> None:
        for index, reason in failures:
            if index in self.failures:
                continue
            self.failures[index] = reason
            image_id = self.images.known(index).id
            self._tally.add(image_id, reason)
            if self._tally.count <= _FAILURES_SHOWN:
                print(f"{image_id}: could not be read ({reason}).", file=sys.stderr)
        self._tally.check()

    def _site(self, site: str) -> str:
        return self.canonical_site(site)


class _Chain:
    """One chain of workers over the rest of an epoch, which fills one window after another."""

    def __init__(
        self, live: LiveActivations, plan: WindowPlan, seed: int, batch_images: int
    ) -> None:
        self.live = live
        self.plan = plan
        self.seed = seed
        self.batch_images = batch_images
        self._next: Position | None = None
        self._rest: Iterator[ImageBatch] = iter(())

    def batches(self, at: Position, n_images: int) -> Iterator[ImageBatch]:
        """Return the batches of a window."""
        if self._next != at:
            windows = [Position(at.epoch, w) for w in range(at.window, self.plan.n_windows)]
            images = np.concatenate([self.plan.images(self.seed, window) for window in windows])
            self._rest = self.live._batches(images, self.batch_images)
        self._next = None  # an error in between breaks the chain
        for _ in range(-(-n_images // self.batch_images)):
            yield next(self._rest)
        self._next = Position(at.epoch, at.window + 1)
