"""Images that are nearly the same, so that each counts once among the examples of a latent."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sparsight.latents.embeddings import Kind
from sparsight.latents.examples import LatentEntries
from sparsight.progress import progress

THRESHOLDS: dict[Kind, float] = {"joint": 0.97, "pooled": 0.97, "codes": 0.92}
"""Cosine of embeddings from which two images count as nearly the same; the
measurement is in docs/concepts/nearness.md."""
EXACT_IMAGES = 100_000
"""With more images than this, only images in the same cell of a partition are compared."""
IMAGES_PER_CELL = 8192
PARTITIONS = 4
BLOCK = 2048


@torch.no_grad()
def first_of_kind(
    matrix: Float[Tensor, "images d"], threshold: float, *, seed: int = 0, quiet: bool = True
) -> Int64[Tensor, " images"]:
    """Return for each image the first one that it nearly repeats, or itself.

    Images are taken in order; one that reaches `threshold` with an image that repeats none belongs
    to it (to the closest, if there are several). Up to `EXACT_IMAGES` images all pairs are
    compared. Beyond, images are compared within the cells of four random partitions (each image
    goes to the closest of some random images), which miss a pair only if all four separate it.

    Args:
        matrix: embeddings of length 1.
        threshold: cosine from which two images count as nearly the same.
        seed: seed of the partitions.
        quiet: show no progress line.
    """
    n = len(matrix)
    first = torch.arange(n)
    rounds = 1 if n <= EXACT_IMAGES else PARTITIONS
    random = torch.Generator().manual_seed(seed)
    with progress("near-duplicates", rounds * n, "images", quiet=quiet) as line:
        for _ in range(rounds):
            left = (first == torch.arange(n)).nonzero()[:, 0]
            for members in _cells(matrix, left, random) if rounds > 1 else [left]:
                first[members] = members[_leaders(matrix, members, threshold)]
                line.advance(len(members))
            line.advance(n - len(left))
    while not torch.equal(first, first[first]):  # an image that led may follow by now
        first = first[first]
    return first


def _cells(
    matrix: Float[Tensor, "images d"], rows: Int64[Tensor, " rows"], random: torch.Generator
) -> list[Int64[Tensor, " members"]]:
    """Divide rows by the closest of some random ones; members rise."""
    order = torch.randperm(len(rows), generator=random)
    pivots = matrix[rows[order[: max(1, len(rows) // IMAGES_PER_CELL)]]].float()
    cell = torch.cat([(matrix[some].float() @ pivots.T).argmax(1) for some in rows.split(BLOCK)])
    members = rows[cell.argsort(stable=True)]
    return list(members.split(cell.bincount(minlength=len(pivots)).tolist()))


def _leaders(
    matrix: Float[Tensor, "images d"], members: Int64[Tensor, " members"], threshold: float
) -> Int64[Tensor, " members"]:
    """Return for each member the place among the members of the one that it repeats, or its own."""
    leader = torch.arange(len(members))
    leaders = torch.zeros(0, dtype=torch.int64)
    for start in range(0, len(members), BLOCK):
        own = torch.arange(start, min(start + BLOCK, len(members)))
        rows = matrix[members[own]].float()
        best = torch.full((len(own),), -torch.inf)
        for at in range(0, len(leaders), BLOCK):
            some = leaders[at : at + BLOCK]
            cosine, place = (rows @ matrix[members[some]].float().T).max(dim=1)
            closer = cosine > best
            best[closer], leader[own[closer]] = cosine[closer], some[place[closer]]
        follows = best >= threshold
        leader[own[~follows]] = own[~follows]
        _follow_within(rows, follows, leader[start : start + BLOCK], start, threshold)
        mine = leader[own] == own
        leaders = torch.cat([leaders, own[mine]])
    return leader


def _follow_within(
    rows: Float[Tensor, "block d"],
    follows: Tensor,
    leader: Int64[Tensor, " block"],
    start: int,
    threshold: float,
) -> None:
    """Let images of a block follow earlier ones of the same block, in order."""
    cosines = (rows @ rows.T).tril(-1)
    follows = follows.clone()
    for row in (cosines >= threshold).any(dim=1).nonzero()[:, 0].tolist():
        if follows[row]:
            continue
        own = cosines[row, :row].masked_fill(follows[:row], -torch.inf)
        if float(own.max()) >= threshold:
            leader[row] = start + int(own.argmax())
            follows[row] = True


def without_repeats(entries: LatentEntries, first: Int64[Tensor, " places"]) -> LatentEntries:
    """Return entries of latents with one image of each group: that with the strongest activation.

    Args:
        entries: entries of a block of latents.
        first: for each place, the first image that its image nearly repeats, or itself.
    """
    group = first[entries.image]
    if bool((group == entries.image).all()):
        return entries
    key = (entries.latent - entries.latent[0]) * len(first) + group
    order = key.argsort(stable=True)
    strongest = torch.ones(len(key), dtype=torch.bool)
    strongest[1:] = key[order][1:] != key[order][:-1]
    kept = torch.zeros(len(key), dtype=torch.bool)
    kept[order[strongest]] = True
    return LatentEntries.ranked(
        entries.latent[kept], entries.image[kept], entries.token[kept], entries.value[kept]
    )
