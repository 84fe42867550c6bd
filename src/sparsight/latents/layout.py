"""Places of latents on a map: similar decoder rows lie close together.

The layout is UMAP's objective (McInnes et al. 2018, arXiv 1802.03426) on exact neighbours, with all
edges in each step instead of one at a time. So it needs no compiled package, and a seed fixes it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.latents.nearest import NOBODY, Nearest, nearest_others, unit_rows
from sparsight.progress import progress

NEIGHBOURS = 15
"""Neighbours per latent in the graph."""
PUSHES = 16
"""Random partners per latent and step that push it away."""
PUSHES_PER_PULL = 5
"""Weight of all pushes of a latent over the weight of its pulls, as in UMAP."""
SMOOTHINGS = 50
"""Rounds of smoothing before the first step."""
MOST = 4.0
"""Longest single pull, push or step, in units of the map."""


def epochs_for(n: int) -> int:
    """Return the number of steps for `n` latents: 500 up to 10,000, at least 200 above."""
    return max(200, min(500, 5_000_000 // max(n, 1)))


def map_rows(
    rows: Float[Tensor, "rows d"],
    nearest: Nearest | None = None,
    *,
    seed: int = 0,
    epochs: int | None = None,
    quiet: bool = True,
) -> Float[Tensor, "rows 2"]:
    """Lay rows out on a plane, so that neighbours by cosine lie close together.

    Args:
        rows: vectors, at least one; only their directions count.
        nearest: their nearest other rows; found if missing.
        seed: seed of the random partners. Equal arguments give equal bits on one machine.
        epochs: number of steps; default: see `epochs_for`.
        quiet: show no progress line.

    Returns:
        float32 places, centred, with a root-mean-square distance of 1 from the centre.
    """
    n = len(rows)
    if n < 4:  # too few for a graph: on a line
        return torch.stack([torch.arange(n) - (n - 1) / 2, torch.zeros(n)], dim=1).float()
    if nearest is None:
        nearest = nearest_others(rows, NEIGHBOURS)
    graph = _Graph(nearest)
    places = _start(rows, graph)
    steps = epochs_for(n) if epochs is None else epochs
    random = torch.Generator().manual_seed(seed)
    # Partners are found by turning a shuffled ring, which reads memory in order.
    ring = torch.randperm(n, generator=random)
    graph, places = graph.renumbered(ring), places[ring]
    weight = PUSHES_PER_PULL * graph.degree[:, None] / PUSHES
    with progress("map", steps, "steps", quiet=quiet) as line:
        for step in range(steps):
            move = graph.pulls(places)
            for turn in torch.randint(1, n, (PUSHES,), generator=random).tolist():
                move += weight * _push(places - places.roll(turn, 0))
            length = move.norm(dim=1, keepdim=True).clamp(min=1e-12)
            places = places + (1 - step / steps) * move * (MOST / length).clamp(max=1)
            line.advance(1)
    laid_out = torch.empty_like(places)
    laid_out[ring] = places
    laid_out -= laid_out.mean(0)
    return laid_out / laid_out.square().sum(1).mean().sqrt().clamp(min=1e-12)


def _push(apart: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
    """Return how far partners push each other: the gradient of log(1 − 1 / (1 + d²))."""
    d2 = apart.square().sum(1, keepdim=True)
    return (apart * (2 / ((0.001 + d2) * (1 + d2)))).clamp(-MOST, MOST)


class _Graph:
    """UMAP's fuzzy graph: edges in both directions, sorted by their first end.

    Attributes:
        head: first ends, int64 `[edges]`.
        tail: second ends.
        weight: 1 for the nearest neighbour, less for others.
        lengths: edges per row.
        degree: weight per row.
    """

    def __init__(self, nearest: Nearest) -> None:
        n, k = nearest.row.shape
        there = (nearest.row != NOBODY).flatten()
        head = torch.arange(n).repeat_interleave(k)[there]
        tail = nearest.row.flatten()[there]
        weight = _memberships(nearest).flatten()[there]
        # w + w' − w w' of both directions; an edge that has only one keeps its weight.
        keys, order = torch.cat([head * n + tail, tail * n + head]).sort(stable=True)
        both = torch.cat([weight, weight])[order]
        key, count = keys.unique_consecutive(return_counts=True)
        last = count.cumsum(0) - 1
        first_weight, last_weight = both[last - count + 1], both[last]
        joined = first_weight + last_weight - first_weight * last_weight
        self._set(n, key // n, key % n, torch.where(count > 1, joined, first_weight))

    def _set(
        self,
        n: int,
        head: Int[Tensor, " edges"],
        tail: Int[Tensor, " edges"],
        weight: Float[Tensor, " edges"],
    ) -> None:
        self.head, self.tail, self.weight = head, tail, weight
        self.lengths = head.bincount(minlength=n)
        self.degree = self.sums(weight[:, None])[:, 0]

    def renumbered(self, order: Int[Tensor, " n"]) -> _Graph:
        """Return the same graph whose row `i` is this one's row `order[i]`."""
        n = len(order)
        number = torch.empty_like(order)
        number[order] = torch.arange(n)
        head, tail = number[self.head], number[self.tail]
        by = (head * n + tail).argsort()
        graph = object.__new__(_Graph)
        graph._set(n, head[by], tail[by], self.weight[by])
        return graph

    def sums(self, values: Float[Tensor, "edges columns"]) -> Float[Tensor, "n columns"]:
        """Add up values of edges by their first end, in the same order each time."""
        summed: Tensor = torch.segment_reduce(
            values, "sum", lengths=self.lengths, axis=0, unsafe=True
        )
        return summed

    def pulls(self, places: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Return how far neighbours pull each row: the gradient of log(1 / (1 + d²)), twice.

        Twice, because in UMAP an edge moves both of its ends and occurs in both directions.
        """
        apart = places[self.tail] - places[self.head]
        scale = 4 * self.weight / (1 + apart.square().sum(1))
        return self.sums(apart * scale[:, None])


def _memberships(nearest: Nearest) -> Float[Tensor, "rows k"]:
    """Return exp(−(d − d₁) / σ) with d = 1 − cosine, and σ so that each row sums to log₂ k."""
    distance = (1 - nearest.cosine).masked_fill(nearest.row == NOBODY, torch.inf)
    beyond = (distance - distance[:, :1]).clamp(min=0).nan_to_num(torch.inf, torch.inf)
    wanted = math.log2(max(nearest.row.shape[1], 2))
    low, high = torch.zeros(len(beyond), 1), torch.full((len(beyond), 1), 4.0)
    for _ in range(40):
        middle = (low + high) / 2
        above = torch.exp(-beyond / middle).sum(1, keepdim=True) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.exp(-beyond / high.clamp(min=1e-6))


def _start(rows: Float[Tensor, "rows d"], graph: _Graph) -> Float[Tensor, "rows 2"]:
    """Return the two main components of the rows, smoothed over the graph.

    Smoothing (a few steps of subspace iteration towards the graph's own slowest modes) puts
    neighbours together before the first step.
    """
    unit = unit_rows(rows)
    mean = unit.mean(0)
    covariance = unit.T @ unit / len(unit) - torch.outer(mean, mean)
    _, vectors = torch.linalg.eigh(covariance.double())
    axes = vectors[:, -2:].flip(1).float()
    if axes.shape[1] < 2:
        axes = torch.cat([axes, torch.zeros_like(axes)], dim=1)
    largest = axes.abs().argmax(0)
    axes = axes * axes[largest, range(2)].sign().masked_fill(axes[largest, range(2)] == 0, 1)
    places: Tensor = unit @ axes - mean @ axes
    mass = graph.degree[:, None].clamp(min=1e-12)
    for _ in range(SMOOTHINGS):
        around = graph.sums(places[graph.tail] * graph.weight[:, None]) / mass
        places = torch.linalg.qr((places + around) / 2 - ((places + around) / 2).mean(0)).Q
    places *= 10 / places.abs().max().clamp(min=1e-12)
    return places
