"""Activations on disk, read through memory maps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparsight.activations.manifest import DTYPES, Manifest, shard_path
from sparsight.activations.source import OrderedBatch
from sparsight.activations.statistics import RunningSums, SiteStatistics
from sparsight.activations.stream import VectorStream, WindowPlan
from sparsight.errors import SparsightError, UserError
from sparsight.files import sha256_file
from sparsight.images import ImageSource, open_images

WINDOW_BYTES = 128 << 20
BLOCK_BYTES = 128 << 10
_SAFETENSORS_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


class ActivationStore:
    """What `extract` left in a folder.

    Args:
        path: the folder.
        verify: read every shard and compare its checksum.

    Raises:
        UserError: the folder holds no store, or an unfinished one.
        SparsightError: a file is missing, cut off or altered.
    """

    def __init__(self, path: str | Path, *, verify: bool = False) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        if self.manifest.state != "complete":
            raise UserError(
                f"{self.path}: the store is unfinished ({self.manifest.n_images:,} of "
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
        ends = np.cumsum([0, *(shard.n_images for shard in self.manifest.shards)])
        self._starts: Int64[np.ndarray, " shards_plus_one"] = ends
        self._maps = {
            site: [self._open(site, number) for number in range(len(self.manifest.shards))]
            for site in self.sites
        }
        self._rows = np.arange(ends[-1])
        self._stats: dict[str, SiteStatistics] = {}
        if verify:
            self.verify()

    @property
    def n_images(self) -> int:
        """Images whose activations are here."""
        return len(self._rows)

    @property
    def n_tokens(self) -> Mapping[str, int]:
        """Vectors an image gives at each site."""
        return self.manifest.n_tokens

    def n_vectors(self, site: str) -> int:
        """Vectors of a site."""
        return self.n_images * self.n_tokens[self._site(site)]

    def d_in(self, site: str) -> int:
        """Width of a site's vectors.

        Raises:
            UserError: the store has no such site.
        """
        return self.manifest.d_in[self._site(site)]

    @cached_property
    def images(self) -> pa.Table:
        """A row for each image: index, id, uri, label, caption, size, status, reason."""
        try:
            return pq.read_table(self.path / "images.parquet")
        except (OSError, pa.ArrowException) as error:
            raise SparsightError(
                f"{self.path / 'images.parquet'}: is damaged ({error})."
            ) from error

    @cached_property
    def image_indices(self) -> Int64[np.ndarray, " images"]:
        """The place in the source of each stored image."""
        table = self.images
        ok = np.asarray(table["status"].to_pylist()) == "ok"
        indices: Int64[np.ndarray, " images"] = table["index"].to_numpy()[ok]
        if len(indices) != self._starts[-1]:
            raise SparsightError(
                f"{self.path / 'images.parquet'}: lists {len(indices):,} images, the shards hold "
                f"{self._starts[-1]:,}."
            )
        return indices[self._rows]

    def source(self) -> ImageSource:
        """The images, opened again.

        Raises:
            UserError: they are not there any more, or have changed.
        """
        images = open_images(self.manifest.images["spec"])
        if images.fingerprint() != self.manifest.images["fingerprint"]:
            raise UserError(f"{images.spec}: the images have changed since {self.path} was made.")
        return images

    def stats(self, site: str) -> SiteStatistics:
        """Exact statistics of a site, as written at extraction; of a selection, computed here."""
        site = self._site(site)
        if site not in self._stats:
            whole = len(self._rows) == self._starts[-1]
            self._stats[site] = self._read_stats(site) if whole else self._compute_stats(site)
        return self._stats[site]

    def select(self, image_indices: Sequence[int]) -> ActivationStore:
        """A view of some images, by their places in the source, in the order of the store.

        Raises:
            UserError: an image is not in the store.
        """
        wanted = np.unique(np.asarray(image_indices, dtype=np.int64))
        absent = np.setdiff1d(wanted, self.image_indices)
        if len(absent):
            raise UserError(f"{self.path}: holds no activations of image {absent[0]}.")
        view = ActivationStore(self.path)
        view._rows = self._rows[np.isin(self.image_indices, wanted)]
        view.__dict__.pop("image_indices", None)
        return view

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            SparsightError: one differs; its name is given.
        """
        for number, shard in enumerate(self.manifest.shards):
            for site in self.sites:
                path = shard_path(self.path, site, number)
                if sha256_file(path) != shard.sha256[site]:
                    raise SparsightError(
                        f"{path}: has been altered (its checksum differs). Extract again."
                    )

    def ordered(self, sites: Sequence[str], batch_images: int = 64) -> Iterator[OrderedBatch]:
        """All images once, in order, float32."""
        names = [self._site(site) for site in sites]
        if batch_images < 1:
            raise UserError(f"batch_images is {batch_images}; it must be at least 1.")
        for first in range(0, len(self._rows), batch_images):
            rows = self._rows[first : first + batch_images]
            indices = torch.from_numpy(self.image_indices[first : first + batch_images])
            found = {site: self._gather(site, rows).float() for site in names}
            for site, x in found.items():
                if not bool(torch.isfinite(x).all()):
                    raise SparsightError(
                        f"Activations at {site} are NaN or infinite in {self._shards_of(rows, site)}."
                    )
            yield OrderedBatch(indices, found)

    def stream(self, sites: Sequence[str], batch_size: int, *, seed: int = 0) -> VectorStream:
        """Vectors without end, shuffled, float32; the same positions at each site.

        Raises:
            UserError: the sites give different numbers of vectors an image.
        """
        names = [self._site(site) for site in sites]
        counts = {self.n_tokens[site] for site in names}
        if len(counts) > 1:
            raise UserError(
                f"The sites {', '.join(names)} give different numbers of vectors an image; "
                "stream them one by one."
            )
        itemsize = DTYPES[self.manifest.dtype].itemsize
        n_tokens = counts.pop()
        largest = max(n_tokens * self.d_in(site) * itemsize for site in names)
        per_window = sum(n_tokens * self.d_in(site) * itemsize for site in names)
        plan = WindowPlan(
            n_images=self.n_images,
            block_images=max(1, BLOCK_BYTES // largest),
            window_images=max(1, WINDOW_BYTES // per_window),
        )

        def load(images: Int64[np.ndarray, " images"]) -> dict[str, Tensor]:
            rows = self._rows[images]
            return {site: self._gather(site, rows).flatten(0, 1) for site in names}

        return VectorStream(
            plan,
            load,
            names,
            batch_size,
            seed=seed,
            vectors_per_epoch=self.n_images * n_tokens,
            where=lambda images, site: self._shards_of(self._rows[images], site),
            prefetch=plan.n_windows > 1,
        )

    def _site(self, site: str) -> str:
        if site not in self.sites:
            raise UserError(f"{self.path}: holds no site {site!r}, only: {', '.join(self.sites)}.")
        return site

    def _open(self, site: str, number: int) -> Float[Tensor, "images tokens d_in"]:
        """Map a shard; its header and length must be what the manifest says."""
        path = shard_path(self.path, site, number)
        shard = self.manifest.shards[number]
        shape = [shard.n_images, self.manifest.n_tokens[site], self.manifest.d_in[site]]
        try:
            size = path.stat().st_size
            if size != shard.n_bytes[site]:
                raise SparsightError(
                    f"{path}: has {size:,} bytes, {shard.n_bytes[site]:,} were written: it is cut "
                    "off or altered. Extract again."
                )
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entry = json.loads(file.read(min(length, size)))["activations"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SparsightError(f"{path}: is missing or damaged ({error}).") from error
        if (
            entry.get("shape") != shape
            or entry.get("dtype") != _SAFETENSORS_DTYPES[self.manifest.dtype]
        ):
            raise SparsightError(
                f"{path}: holds {entry.get('dtype')} {entry.get('shape')}, expected "
                f"{self.manifest.dtype} {shape}: it has been altered. Extract again."
            )
        if shard.n_images == 0:
            return torch.zeros(shape, dtype=DTYPES[self.manifest.dtype])
        # Copy on write: torch wants memory that could be written, and nothing here writes.
        data = np.memmap(path, np.uint8, "c", offset=8 + length)
        flat = torch.frombuffer(data, dtype=DTYPES[self.manifest.dtype], count=math.prod(shape))
        return flat.view(shape)

    def _gather(
        self, site: str, rows: Int64[np.ndarray, " images"]
    ) -> Float[Tensor, "images tokens d_in"]:
        """Copy some images' activations, in the stored type, run by run."""
        n_tokens, d_in = self.manifest.n_tokens[site], self.manifest.d_in[site]
        out = torch.empty(len(rows), n_tokens, d_in, dtype=DTYPES[self.manifest.dtype])
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(shards) != 0)) + 1
        edges = [0, *breaks.tolist(), len(rows)]
        for first, stop in zip(edges[:-1], edges[1:], strict=True):
            if first == stop:
                continue
            shard = int(shards[first])
            start = int(rows[first] - self._starts[shard])
            out[first:stop] = self._maps[site][shard][start : start + stop - first]
        return out

    def _shards_of(self, rows: Int64[np.ndarray, " images"], site: str) -> str:
        for number in np.unique(np.searchsorted(self._starts, rows, side="right") - 1):
            if not bool(torch.isfinite(self._maps[site][int(number)]).all()):
                return str(shard_path(self.path, site, int(number)))
        return str(self.path / site)

    def _read_stats(self, site: str) -> SiteStatistics:
        path = self.path / site / "stats.safetensors"
        try:
            found = load_file(path)
            count = int(found["count"])
            stats = SiteStatistics(count, found["mean"], found["second_moment"])
        except (SafetensorError, OSError, KeyError) as error:
            raise SparsightError(f"{path}: is missing or damaged ({error}).") from error
        if count != self.n_vectors(site) or len(stats.mean) != self.d_in(site):
            raise SparsightError(f"{path}: does not fit the store: it counts {count:,} vectors.")
        return stats

    def _compute_stats(self, site: str) -> SiteStatistics:
        running = RunningSums.nothing(self.d_in(site))
        for batch in self.ordered([site]):
            running.add(batch.activations[site].flatten(0, 1))
        return running.statistics()
