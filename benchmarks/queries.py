"""Time queries of a synthetic index: the table `queries` in RESULTS.md.

Codes of one vector per image go through the real writer of codes and the real `build_index`; how
often latents fire is as skewed as in trained autoencoders (a power law from one half of the images
down to some dozens). Every query asks for two latents, each with an activation above 0.5.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from tables import RESULTS, keep

from sparsight.activations.manifest import IMAGES
from sparsight.files import sha256_file
from sparsight.latents import CodeBatch, CodeStore, LatentIndex, build_index
from sparsight.latents.code_manifest import CodeManifest
from sparsight.latents.code_shards import ShardBuffer
from sparsight.latents.encoding import SHARD_BYTES
from sparsight.sae import SAEConfig, SparseAutoencoder, SparseCode, TopK

N_LABELS = 100
BATCH = 16_384
MIB = 1 << 20


@dataclass(frozen=True)
class Options:
    """Build a synthetic index, time queries of two latents; write the table."""

    n_images: tuple[int, ...] = (200_000,)
    """Images per index: one row of the table for each."""

    n_latents: int = 65_536
    """Latents."""

    active: float = 55.6
    """Mean number of latents that fire in an image."""

    pairs: int = 2000
    """Pairs of latents per kind of query."""

    seed: int = 0
    """Seed of codes and pairs."""

    folder: Path | None = None
    """Where to keep codes and index; default: a temporary folder."""

    build_only: bool = False
    """Build the index from existing codes (the benchmark calls itself to measure memory)."""

    out: Path = RESULTS
    """File that keeps the table."""


def main(options: Options) -> None:
    if options.build_only:
        assert options.folder is not None
        build(options.folder, options)
        return
    rows = []
    for n_images in options.n_images:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.folder or Path(temporary)) / f"{n_images}"
            rows.append(row(folder, n_images, options))
    title = (
        f"Queries of two latents (both above 0.5), synthetic index of {options.n_latents:,} "
        f"latents, {options.active} of which fire in an image"
    )
    keep(title, rows, options.out, name="queries")


def row(folder: Path, n_images: int, options: Options) -> dict[str, object]:
    if not (folder / "codes" / "manifest.json").exists():
        write_codes(folder, n_images, options)
    seconds, peak = built(folder, options)
    index = LatentIndex.open(folder / "index")
    size = sum(path.stat().st_size for path in (folder / "index").iterdir())
    start = time.perf_counter()
    index.query("0 and 1")
    first = time.perf_counter() - start
    random = np.random.default_rng(options.seed)
    counts = index.by_latent.counts
    live = np.flatnonzero(counts)
    even = random.choice(live, (options.pairs, 2))
    firing = random.choice(options.n_latents, (options.pairs, 2), p=counts / counts.sum())
    densest = np.argsort(-counts)[:10].tolist()
    heavy = sorted(combinations(densest, 2), key=lambda pair: -counts[list(pair)].sum())[:20]
    return {
        "images": f"{n_images:,}",
        "any two latents, median / p95 (ms)": timed(index, even),
        "latents as often as they fire": timed(index, firing),
        "20 densest pairs": timed(index, np.repeat(np.array(heavy), 5, axis=0)),
        "with activations and label shares": timed(index, even, whole),
        "first query (ms)": f"{1e3 * first:.0f}",
        "entries": f"{len(index.by_latent.columns):,}",
        "index (MiB)": f"{size / MIB:,.0f}",
        "built in (s)": f"{seconds:.0f}",
        "peak memory of building (MiB)": f"{peak / MIB:,.0f}",
    }


def places(index: LatentIndex, text: str) -> object:
    return index.query(text)


def whole(index: LatentIndex, text: str) -> object:
    result = index.query(text)
    return result.activations, result.labels


def timed(
    index: LatentIndex,
    pairs: np.ndarray | Sequence[Sequence[int]],
    ask: Callable[[LatentIndex, str], object] = places,
) -> str:
    times = []
    for one, other in pairs:
        text = f"{one} > .5 and {other} > .5"
        start = time.perf_counter()
        ask(index, text)
        times.append(1e3 * (time.perf_counter() - start))
    return f"{np.median(times):.2f} / {np.quantile(times, 0.95):.2f}"


def autoencoder(options: Options) -> SparseAutoencoder:
    return SparseAutoencoder(4, SAEConfig(options.n_latents, sparsity=TopK(32)), seed=0)


def build(folder: Path, options: Options) -> None:
    codes = CodeStore(folder / "codes")
    build_index(autoencoder(options), codes, out=folder / "index", quiet=True)


def built(folder: Path, options: Options) -> tuple[float, int]:
    """Build the index in a process of its own; return its time in seconds and its peak memory."""
    arguments = ["--folder", folder, "--build-only", "--n-latents", options.n_latents]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, "the build failed"
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def rates(options: Options) -> np.ndarray:
    """Return how often each latent is drawn per image; the most frequent fires in half of them."""
    weights = (np.arange(options.n_latents) + 5.0) ** -0.9
    return np.asarray(1.06 * options.active * weights / weights.sum())


def write_codes(folder: Path, n_images: int, options: Options) -> None:
    """Write codes batch by batch."""
    codes = folder / "codes"
    codes.mkdir(parents=True)
    labels = [f"label {place % N_LABELS}" for place in range(n_images)]
    ids = [f"{place:07d}.jpg" for place in range(n_images)]
    nothing = pa.nulls(n_images, pa.string())
    table = {"id": ids, "uri": ids, "label": labels, "caption": nothing}
    pq.write_table(pa.table(table), codes / IMAGES)
    sae = autoencoder(options)
    manifest = CodeManifest(
        sae={"hash": sae.fingerprint(), "n_latents": sae.n_latents, "d_in": sae.d_in},
        activations="synthetic",
        model={"id": "synthetic"},
        images={"spec": "synthetic", "fingerprint": "synthetic", "n_images": n_images},
        site="embedding",
        tokens="cls",
        n_tokens=1,
        dtype="float32",
        batch_images=BATCH,
        shard_bytes=SHARD_BYTES,
        files={IMAGES: sha256_file(codes / IMAGES)},
    )
    random = np.random.default_rng(options.seed)
    cumulative = rates(options).cumsum()
    buffer = ShardBuffer(manifest)
    for first in range(0, n_images, BATCH):
        buffer.add(batch(first, min(BATCH, n_images - first), cumulative, random, options))
        if buffer.n_bytes >= SHARD_BYTES or first + BATCH >= n_images:
            manifest = buffer.write(codes, manifest)
            buffer = ShardBuffer(manifest)
    replace(manifest, state="complete").write(codes)


def batch(
    first: int, n: int, cumulative: np.ndarray, random: np.random.Generator, options: Options
) -> CodeBatch:
    per_image = random.poisson(cumulative[-1], n)
    latents = np.searchsorted(cumulative, random.random(per_image.sum()) * cumulative[-1])
    images = np.repeat(np.arange(n), per_image)
    pairs = np.unique(images * options.n_latents + latents)
    counts = np.bincount(pairs // options.n_latents, minlength=n)
    values = random.exponential(1.0, len(pairs)).astype(np.float32) + np.float32(1e-3)
    code = SparseCode(
        torch.from_numpy(pairs % options.n_latents),
        torch.from_numpy(values),
        torch.from_numpy(np.concatenate([[0], counts.cumsum()])),
        options.n_latents,
    )
    return CodeBatch(torch.arange(first, first + n), code, 1)


if __name__ == "__main__":
    main(tyro.cli(Options))
