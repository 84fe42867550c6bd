"""How fast an activation store is written, streamed back and checked, from the page cache.

    make bench-peers                                   # installs the peers and runs this too python
    benchmarks/stream.py [--gb 1] [--folder DIR] [--peers saev] [--out FILE]

Rates are gigabytes of stored activations per second: per second of processor time (all threads
together, so per core) and of wall time. Writing includes SHA-256, the exact statistics and fsync;
streaming includes the shuffle, the check for NaN and the conversion to float32. For comparison, the
same bytes are written plainly, with only fsync: no store can be faster. In the comparison with
other packages, all have the same vectors in float32 and the same number of workers; each job runs
in a separate process, and rounds go A B C, C B A.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from data_path import D_IN, N_TOKENS, READERS, SITE, WARM_UP, WRITERS, Vectors, write_store
from tables import RESULTS, cores, keep
from train_step import OPEN_CLIP, PEERS, versions
from turns import chosen, take_turns, told

from sparsight.activations import ActivationStore
from sparsight.activations.extraction import SHARD_BYTES
from sparsight.activations.manifest import DTYPES


@dataclass(frozen=True)
class Options:
    """Write stores of random numbers, stream them back, print the rates."""

    gb: float = 1.0
    """Gigabytes per store."""

    batch_size: int = 4096
    """Vectors per batch."""

    folder: Path | None = None
    """Folder for the stores, one at a time; default: a temporary folder."""

    peers: tuple[str, ...] = ("by hand", "saev")
    """Names of other packages, or "none"."""

    rounds: int = 3
    """Number of rounds."""

    peers_folder: Path = PEERS
    """Where other packages are installed."""

    open_clip_folder: Path = OPEN_CLIP
    """Where torchvision is, which saev needs."""

    out: Path = RESULTS
    """File that keeps the tables."""


@dataclass
class Clock:
    """Wall and processor seconds of the timed code."""

    wall: float = 0.0
    cpu: float = 0.0

    def time(self, work: Callable[[], object]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


def main(options: Options) -> None:
    if options.peers != ("none",):
        chosen(READERS, options.peers, "sparsight")
        beside_others(options)
    torch.set_num_threads(1)
    rows = []
    for dtype, tokens, n_tokens in (
        ("float16", "all", N_TOKENS),
        ("float16", "cls", 1),
        ("bfloat16", "all", N_TOKENS),
        ("float32", "all", N_TOKENS),
    ):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows += measure(Path(folder) / "store", dtype, tokens, n_tokens, options)
    keep(f"Activation store, {D_IN} wide, {options.gb:g} GB each", rows, options.out, name="stream")


def beside_others(options: Options) -> None:
    n_images = SHARD_BYTES // (N_TOKENS * D_IN * 4)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        batches = Path(folder) / "batches.npy"
        generator = torch.Generator().manual_seed(0)
        np.save(batches, torch.randn(n_images, N_TOKENS, D_IN, generator=generator).numpy())
        repeats = max(1, round(options.gb * 1e9 / SHARD_BYTES))
        patches = n_images * repeats * (N_TOKENS - 1)  # saev reads no CLS
        vectors = Vectors(
            batches,
            repeats=repeats,
            n_read=max(1, min(50, patches // options.batch_size - WARM_UP - 1)),
            out=Path(folder) / "out",
            peers=options.peers_folder.absolute(),
            open_clip=options.open_clip_folder.absolute(),
            batch_size=options.batch_size,
            workers=cores(),
        )
        for title, jobs, amount in (
            ("Writing", WRITERS, n_images * N_TOKENS * vectors.repeats),
            ("Streaming, shuffled", READERS, vectors.n_read * vectors.batch_size),
        ):
            names = [name for name in options.peers if name in jobs]
            some = chosen(jobs, names, "sparsight")
            results = take_turns(some, vectors, options.rounds)
            keep(
                f"{title}: vectors of {D_IN} in float32, beside others",
                told(results, "vectors", amount, "sparsight", memory=False),
                options.out,
                versions(options.peers, options.peers_folder),
            )


def measure(
    folder: Path, dtype: str, tokens: str, n_tokens: int, options: Options
) -> list[dict[str, Any]]:
    image_bytes = n_tokens * D_IN * DTYPES[dtype].itemsize
    n_images = int(options.gb * 1e9 / image_bytes)
    plain_write(folder.parent / "plain", n_images * image_bytes)  # once before, as below
    clocks = {
        "write": write(folder, dtype, tokens, n_tokens, n_images),
        "plain write": plain_write(folder.parent / "plain", n_images * image_bytes),
    }
    store = ActivationStore(folder)
    stream = store.stream([SITE], options.batch_size)

    def epoch() -> None:
        for _ in range(stream.vectors_per_epoch // options.batch_size):
            next(stream)

    def ordered() -> None:
        for _ in store.ordered([SITE], max(1, 4096 // n_tokens)):
            pass

    epoch()  # a warm-up, so that pages and memory are allocated
    works = {"stream, shuffled": epoch, "read in order": ordered, "verify": store.verify}
    for name, work in works.items():
        clocks[name] = Clock()
        clocks[name].time(work)
    gb = n_images * image_bytes / 1e9
    return [
        {
            "what": name,
            "dtype": dtype,
            "tokens": tokens,
            "GB/s of a core": gb / clock.cpu,
            "GB/s of wall time": gb / clock.wall,
        }
        for name, clock in clocks.items()
    ]


def plain_write(path: Path, n_bytes: int) -> Clock:
    """Write the same number of bytes as fast as possible, and remove them."""
    piece = memoryview(bytes(8 << 20))
    clock = Clock()

    def work() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(n_bytes // len(piece)):
                file.write(piece)
            os.fsync(file.fileno())

    clock.time(work)
    path.unlink()
    return clock


def write(folder: Path, dtype: str, tokens: str, n_tokens: int, n_images: int) -> Clock:
    """Write a store of random numbers."""
    shard_images = SHARD_BYTES // (n_tokens * D_IN * DTYPES[dtype].itemsize)
    torch.manual_seed(0)
    x = torch.randn(shard_images, n_tokens, D_IN).to(DTYPES[dtype])
    clock = Clock()
    clock.time(lambda: write_store(folder, x, n_images, tokens))
    return clock


if __name__ == "__main__":
    main(tyro.cli(Options))
