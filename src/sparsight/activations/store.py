"""Activations on disk, read through memory maps."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sparsight.activations.manifest import DTYPES, IMAGES, Manifest, shard_path, stats_path
from sparsight.activations.shards import (
    AGAIN,
    check_size,
    check_sum,
    check_sums,
    map_shard,
    read_tensors,
)
from sparsight.activations.source import OrderedBatch, other_tokens, same_count
from sparsight.activations.statistics import RunningSums, SiteStatistics, all_finite
from sparsight.activations.stream import Position, VectorStream, WindowPlan
from sparsight.activations.summary import ExtractionSummary
from sparsight.config import check_positive
from sparsight.errors import SparsightError, UserError
from sparsight.files import sha256_json
from sparsight.images import ImageSource, reopen_images
from sparsight.vision import Tokens, count_from_start, select_tokens
from sparsight.vision.tokens import check_tokens

WINDOW_BYTES = 128 << 20
"""Bytes that a stream mixes at a time; it holds two such windows, the page cache the rest."""

BLOCK_BYTES = 256 << 10
"""Bytes that stay together on the way from a shard into a window."""

Rows = npt.NDArray[np.int64]

_HELD = {"all": ("patches", "cls", "mean"), "patches": ("mean",)}
"""The positions that can be derived from those that a store holds."""


class ActivationStore:
    """The activations that `extract` wrote to a folder.

    Sizes are compared at once; a file's checksum when it is first read, once per process.

    Args:
        path: the folder.
        verify: read every file and compare its checksum now.

    Attributes:
        path: the folder.
        manifest: the store's description of itself.
        sites: canonical names of the sites.
        tokens: "all", "patches", "cls" or "mean".
        model_info: id, revision, family, weight hash, preprocessing, and the spec of the images.
        summary: what the call of `extract` that returned this store did; None if it did nothing.

    Raises:
        UserError: the folder holds no store, or an unfinished one.
        SparsightError: a file is missing, cut off or altered.
    """

    summary: ExtractionSummary | None = None

    def __init__(self, path: str | Path, *, verify: bool = False) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        if self.manifest.state != "complete":
            raise UserError(
                f"{self.path}: the store is unfinished ({self.manifest.done:,} of "
                f"{self.manifest.images['n_images']:,} images). Run the same extraction again; it "
                "continues."
            )
        self.sites = self.manifest.sites
        self.tokens = self.manifest.tokens
        self.model_info: Mapping[str, Any] = {
            **self.manifest.model,
            "preprocessing": self.manifest.preprocessing,
            "images": self.manifest.images["spec"],
        }
        self._starts: Rows = np.cumsum([0, *(s.n_images for s in self.manifest.shards)])
        self._rows: Rows = np.arange(self._starts[-1])
        self._stats: dict[str, SiteStatistics] = {}
        self._n_tokens: Mapping[str, int] = self.manifest.n_tokens
        self._checked: set[tuple[str, int]] = set()  # shards; shared by views
        for site in self.sites:
            for number, shard in enumerate(self.manifest.shards):
                check_size(shard_path(self.path, site, number), shard.n_bytes[site])
        if verify:
            self.verify()

    @property
    def n_images(self) -> int:
        """The number of images whose activations are here."""
        return len(self._rows)

    @property
    def n_listed(self) -> int:
        """The number of images of the whole source, including failed and unselected ones."""
        return int(self.manifest.images["n_images"])

    @property
    def n_tokens(self) -> Mapping[str, int]:
        """The number of vectors per image at each site."""
        return self._n_tokens

    def n_vectors(self, site: str) -> int:
        """Return the number of vectors of a site."""
        return self.n_images * self.n_tokens[self._site(site)]

    def d_in(self, site: str) -> int:
        """Return the width of a site's vectors.

        Raises:
            UserError: the store has no such site.
        """
        return self.manifest.d_in[self._site(site)]

    def canonical_site(self, site: str) -> str:
        """Return the canonical name of a site; negative block numbers count from the end.

        Raises:
            UserError: the store has no such site.
        """
        name = count_from_start(site, self.manifest.model.get("n_blocks", 0))
        if name not in self.sites:
            raise UserError(f"{self.path}: holds no site {site!r}, only: {', '.join(self.sites)}.")
        return name

    @property
    def fingerprint(self) -> str:
        """Return a hex digest, the same for stores with the same vectors in the same order."""
        return sha256_json(
            {
                **self.manifest.identity(),
                "batch_size": self.manifest.batch_size,
                "shards": [shard.sha256 for shard in self.manifest.shards],
                "rows": hashlib.sha256(self._rows.tobytes()).hexdigest(),
                **({} if self._is_whole else {"positions": self.tokens}),
            }
        )

    @cached_property
    def images(self) -> pa.Table:
        """Return one row per image of the source, including failed and unselected ones.

        Columns: index, id, uri, label, caption, width, height, status ("ok" or "failed"), reason,
        and the shard and the row in it.
        """
        return self._read_images(None)

    @cached_property
    def image_indices(self) -> Int64[np.ndarray, " images"]:
        """The place in the source of each image here, in order."""
        table = self._read_images(["index", "status"])
        indices = table.filter(pc.equal(table["status"], "ok"))["index"].to_numpy()
        if len(indices) != self._starts[-1]:
            raise SparsightError(
                f"{self.path / IMAGES}: lists {len(indices):,} images, but the shards hold "
                f"{self._starts[-1]:,}. Extract again."
            )
        chosen: Rows = indices[self._rows]
        return chosen

    def source(self) -> ImageSource:
        """Open the images again; `image_indices` are places in them.

        Raises:
            UserError: they are no longer there, or have changed.
        """
        about = self.manifest.images
        return reopen_images(
            about["spec"],
            about["fingerprint"],
            str(self.path),
            about["n_images"],
            lambda: self._read_images(["id"])["id"].to_pylist(),
        )

    def stats(self, site: str) -> SiteStatistics:
        """Return exact statistics of a site, from the extraction; for a selection, compute them."""
        site = self._site(site)
        if site not in self._stats:
            whole = self.n_images == self._starts[-1] and self._is_whole
            self._stats[site] = self._read_stats(site) if whole else self._compute_stats(site)
        return self._stats[site]

    def select(self, image_indices: Sequence[int] | Rows) -> Self:
        """Return a view of some images, given by their places in the source, in the store's order.

        Raises:
            UserError: an image is not in the store.
        """
        wanted = np.unique(np.asarray(image_indices, dtype=np.int64))
        absent = np.setdiff1d(wanted, self.image_indices)
        if len(absent):
            raise UserError(f"{self.path}: holds no activations of image {absent[0]}.")
        chosen = np.isin(self.image_indices, wanted)
        view = copy.copy(self)
        view._rows = self._rows[chosen]
        view.__dict__["image_indices"] = self.image_indices[chosen]
        view._stats = {}
        return view

    def with_tokens(self, tokens: str) -> Self:
        """Return a view of some of the positions, or of the mean over the patches.

        Raises:
            UserError: the store does not hold these positions.
        """
        if tokens == self.tokens:
            return self
        if not self._is_whole or tokens not in _HELD.get(self.tokens, ()):
            raise UserError(other_tokens(tokens, self.tokens))
        n_patches = math.prod(self.manifest.model.get("patch_grid") or (0,))
        n_prefix = self._n_prefix
        check_tokens(tokens, has_cls=self.tokens == "all" and n_prefix > 0)
        counts = {"patches": n_patches, "cls": 1, "mean": 1}
        view = copy.copy(self)
        view.tokens = tokens
        view._n_tokens = {site: 1 if self._has_one(site) else counts[tokens] for site in self.sites}
        if tokens != "cls":  # a final_norm of only the CLS position has no patches
            view.sites = tuple(
                site for site in self.sites if not (self._has_one(site) and site == "final_norm")
            )
        view._stats = {}
        return view

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            SparsightError: a checksum differs; the message names the file.
        """
        for name, sha256 in self.manifest.files.items():
            check_sum(self.path / name, sha256)
        for number, shard in enumerate(self.manifest.shards):
            for site in self.manifest.sites:
                check_sum(shard_path(self.path, site, number), shard.sha256[site])

    def ordered(
        self, sites: Sequence[str], batch_images: int = 64, *, after: int | None = None
    ) -> Iterator[OrderedBatch]:
        """Give all images once, in order, float32; see `ActivationSource.ordered` for `after`.

        Raises:
            SparsightError: an activation is NaN or infinite; the message names the shard.
        """
        names = [self._site(site) for site in sites]
        check_positive(batch_images=batch_images)
        done = 0 if after is None else int(np.searchsorted(self.image_indices, after, side="right"))
        return self._ordered(names, batch_images, -(-done // batch_images) * batch_images)

    def _ordered(
        self, names: Sequence[str], batch_images: int, start: int
    ) -> Iterator[OrderedBatch]:
        for first in range(start, len(self._rows), batch_images):
            rows = self._rows[first : first + batch_images]
            for site in names:
                self._check(site, rows)
            indices = torch.from_numpy(self.image_indices[first : first + batch_images].copy())
            stored = {s: self._gather(s, rows, self._room(s, len(rows))) for s in names}
            for site, x in stored.items():
                if not all_finite(x):
                    raise SparsightError(
                        f"Activations at {site} are NaN or infinite in {self._damaged(rows, site)}."
                    )
            yield OrderedBatch(indices, {site: x.float() for site, x in stored.items()})

    def stream(self, sites: Sequence[str], batch_size: int, *, seed: int = 0) -> VectorStream:
        """Stream vectors without end, shuffled, float32; the same positions at each site.

        Blocks of neighbouring images come in random order, in windows of about 128 MB whose vectors
        are mixed; see `VectorStream`.

        Raises:
            UserError: the sites give different numbers of vectors per image.
        """
        names = [self._site(site) for site in sites]
        n_tokens = same_count(names, self.n_tokens)
        itemsize = DTYPES[self.manifest.dtype].itemsize
        image_bytes = [n_tokens * self.d_in(site) * itemsize for site in names]
        plan = WindowPlan(
            n_images=self.n_images,
            block_images=max(1, BLOCK_BYTES // max(image_bytes)),
            window_images=max(1, WINDOW_BYTES // sum(image_bytes)),
        )

        # Windows come and go one after another, two at a time: memory that is reused need not be
        # allocated and cleared again.
        rooms: list[dict[str, Tensor]] = [{}, {}]

        def load(_: Position, images: Rows) -> dict[str, Tensor]:
            rooms.reverse()
            rows = self._rows[images]
            for site in names:
                self._check(site, rows)
                if site not in rooms[0]:
                    rooms[0][site] = self._room(site, min(plan.window_images, self.n_images))
                self._gather(site, rows, rooms[0][site])
            return {site: rooms[0][site][: len(rows)].flatten(0, 1) for site in names}

        return VectorStream(
            plan,
            load,
            names,
            batch_size,
            seed=seed,
            vectors_per_epoch=self.n_images * n_tokens,
            where=lambda images, site: self._damaged(self._rows[images], site),
            prefetch=True,
        )

    def __repr__(self) -> str:
        return (
            f"ActivationStore({str(self.path)!r}, {self.n_images:,} images, "
            f"{self.tokens} tokens at {', '.join(self.sites)})"
        )

    def _site(self, site: str) -> str:
        return self.canonical_site(site)

    @property
    def _is_whole(self) -> bool:
        """Whether all stored positions are read."""
        return self.tokens == self.manifest.tokens

    @property
    def _n_prefix(self) -> int:
        """The number of stored positions before the first patch."""
        return int(self.manifest.model.get("n_prefix") or 0) if self.manifest.tokens == "all" else 0

    def _has_one(self, site: str) -> bool:
        """Return whether a site has one position per image, whatever the tokens."""
        return self.manifest.n_tokens[site] == 1

    def _chosen(
        self, x: Float[Tensor, "images stored d_in"], site: str
    ) -> Float[Tensor, "images tokens d_in"]:
        """Return the positions of this view."""
        if self._is_whole or self._has_one(site):
            return x
        return select_tokens(x, cast(Tokens, self.tokens), self._n_prefix, self._n_prefix > 0)

    def _map(self, site: str, number: int) -> Float[Tensor, "images stored d_in"]:
        shard = self.manifest.shards[number]
        shape = (shard.n_images, self.manifest.n_tokens[site], self.manifest.d_in[site])
        path = shard_path(self.path, site, number)
        return map_shard(path, shape, DTYPES[self.manifest.dtype], shard.n_bytes[site])

    def _room(self, site: str, n_images: int) -> Float[Tensor, "images tokens d_in"]:
        n_tokens, d_in = self.n_tokens[site], self.manifest.d_in[site]
        return torch.empty(n_images, n_tokens, d_in, dtype=DTYPES[self.manifest.dtype])

    def _gather(
        self, site: str, rows: Rows, out: Float[Tensor, "room tokens d_in"]
    ) -> Float[Tensor, "images tokens d_in"]:
        """Copy the activations of some images to the beginning of `out`, run by run.

        Maps live only as long as this call, so that what was read does not keep counting as this
        process's memory.
        """
        shards = self._shards_of(rows)
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(shards) != 0)) + 1
        edges = [0, *breaks.tolist(), len(rows)]
        maps: dict[int, Tensor] = {}
        for first, stop in pairwise(edges):
            if first == stop:
                continue
            number = int(shards[first])
            if number not in maps:
                maps[number] = self._map(site, number)
            start = int(rows[first] - self._starts[number])
            out[first:stop].copy_(self._chosen(maps[number][start : start + stop - first], site))
        return out[: len(rows)]

    def _check(self, site: str, rows: Rows) -> None:
        """Compare the shards of some images with their checksums, each when it is first used."""
        numbers = np.unique(self._shards_of(rows)).tolist()
        numbers = [number for number in numbers if (site, number) not in self._checked]
        if not numbers:
            return
        paths = {n: shard_path(self.path, site, n) for n in numbers}
        for number in numbers:
            self._map(site, number)  # says more about a damaged header
        try:
            check_sums([(paths[n], self.manifest.shards[n].sha256[site]) for n in numbers])
        except SparsightError as error:
            for number, path in paths.items():
                if str(path) in str(error) and not all_finite(self._map(site, number)):
                    raise SparsightError(
                        f"Activations at {site} are NaN or infinite in {path}, which has been "
                        f"altered (its checksum differs). {AGAIN}"
                    ) from error
            raise
        self._checked.update((site, number) for number in numbers)

    def _shards_of(self, rows: Rows) -> Rows:
        numbers: Rows = np.searchsorted(self._starts, rows, side="right") - 1
        return numbers

    def _damaged(self, rows: Rows, site: str) -> str:
        """Say in which of these images' shards there are numbers that are not finite."""
        for number in np.unique(self._shards_of(rows)).tolist():
            if not all_finite(self._map(site, number)):
                return str(shard_path(self.path, site, number))
        return str(self.path / site)

    def _read_images(self, columns: list[str] | None) -> pa.Table:
        path = self.path / IMAGES
        try:
            self._check_file(path)
            return pq.read_table(path, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise SparsightError(f"{path}: is missing or damaged ({error}). {AGAIN}") from error

    def _check_file(self, path: Path) -> None:
        """Compare a file beside the shards with its checksum, when it is first used."""
        sha256 = self.manifest.files.get(path.relative_to(self.path).as_posix())
        if sha256 is not None:
            check_sums([(path, sha256)])

    def _read_stats(self, site: str) -> SiteStatistics:
        path = stats_path(self.path, site)
        tensors = read_tensors(path)
        try:
            stats = SiteStatistics(int(tensors["count"]), tensors["mean"], tensors["second_moment"])
        except KeyError as error:
            raise SparsightError(f"{path}: is damaged (it has no {error}).") from error
        if stats.count != self.n_vectors(site) or len(stats.mean) != self.d_in(site):
            raise SparsightError(
                f"{path}: does not fit the store: it counts {stats.count:,} vectors. Extract again."
            )
        self._check_file(path)
        return stats

    def _compute_stats(self, site: str) -> SiteStatistics:
        running = RunningSums.nothing(self.d_in(site))
        for batch in self.ordered([site]):
            running.add(batch.activations[site].flatten(0, 1))
        return running.statistics()
