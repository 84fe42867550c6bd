"""The map of latents: processor time, and how well it keeps neighbours, beside PCA.

    python benchmarks/map.py 10000 65536

Rows have width 768 and lie around planted centres, which lie around 20 directions of their own.
Purity: share of a row's 15 nearest on the map that are of its own cluster. Kept: share of its 15
nearest by cosine that are among its 15 nearest on the map.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

from sparsight.latents.layout import map_rows
from sparsight.latents.nearest import nearest_others, unit_rows

WIDTH, K = 768, 15
NOISE = 3.5


def planted(n: int) -> tuple[Tensor, Tensor]:
    """Return rows, and the cluster of each; a cluster has 100 rows on average."""
    random = torch.Generator().manual_seed(0)
    n_clusters = max(10, n // 100)
    directions = torch.randn(20, WIDTH, generator=random)
    parent = torch.randint(0, 20, (n_clusters,), generator=random)
    centres = 0.7 * directions[parent] + torch.randn(n_clusters, WIDTH, generator=random)
    cluster = torch.randint(0, n_clusters, (n,), generator=random)
    return centres[cluster] + NOISE * torch.randn(n, WIDTH, generator=random), cluster


def judged(places: Tensor, cluster: Tensor, nearest: Tensor) -> tuple[float, float]:
    """Return purity and the share of neighbours that are kept."""
    pure = kept = 0.0
    for start in range(0, len(places), 1024):
        rows = slice(start, start + 1024)
        distance = torch.cdist(places[rows], places, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(distance))
        distance[own, own + start] = torch.inf
        close = distance.topk(K, dim=1, largest=False).indices
        pure += float((cluster[close] == cluster[rows, None]).float().mean(1).sum())
        kept += float((close[:, :, None] == nearest[rows, None]).any(2).float().mean(1).sum())
    return pure / len(places), kept / len(places)


def main() -> None:
    """Print one line per number of rows and method."""
    torch.set_num_threads(1)
    print("| rows | method | CPU s | purity | kept |\n|---|---|---|---|---|")
    for n in map(int, sys.argv[1:] or ["10000"]):
        rows, cluster = planted(n)
        start = time.process_time()
        nearest = nearest_others(rows, K)
        searched = time.process_time() - start
        start = time.process_time()
        places = map_rows(rows, nearest)
        laid_out = time.process_time() - start
        unit = unit_rows(rows)
        start = time.process_time()
        centred = unit - unit.mean(0)
        _, axes = torch.linalg.eigh(centred.T @ centred)
        by_components = centred @ axes[:, -2:]
        components = time.process_time() - start
        own = float((cluster[nearest.row] == cluster[:, None]).float().mean())
        print(f"| {n:,} | neighbours by cosine | {searched:.1f} | {own:.3f} | 1 |")
        for name, seconds, found in (
            ("the map", searched + laid_out, places),
            ("PCA", components, by_components),
        ):
            pure, kept = judged(found, cluster, nearest.row)
            print(f"| {n:,} | {name} | {seconds:.1f} | {pure:.3f} | {kept:.3f} |", flush=True)


if __name__ == "__main__":
    main()
