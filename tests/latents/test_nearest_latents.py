"""Nearest rows, the map and near-duplicates, against all pairs and planted clusters."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparsight.latents import duplicates
from sparsight.latents.duplicates import first_of_kind
from sparsight.latents.layout import map_rows
from sparsight.latents.nearest import NOBODY, nearest_others, nearest_rows


def clusters(n: int = 600, n_clusters: int = 12, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Rows around `n_clusters` random centres, in 32 dimensions, and the cluster of each."""
    random = torch.Generator().manual_seed(3)
    cluster = torch.randint(0, n_clusters, (n,), generator=random)
    centres = torch.randn(n_clusters, 32, generator=random)
    return centres[cluster] + noise * torch.randn(n, 32, generator=random), cluster


def test_nearest_others_are_those_of_all_pairs_whatever_the_block() -> None:
    rows, _ = clusters(301)
    unit = normalize(rows, dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-torch.inf)
    cosine, row = cosines.topk(7, dim=1)
    for block in (32, 100, 4096):
        nearest = nearest_others(rows, 7, block=block)
        assert torch.equal(nearest.row, row)
        torch.testing.assert_close(nearest.cosine, cosine)


def test_nearest_rows_among_others_are_those_of_all_pairs() -> None:
    rows, _ = clusters(200)
    queries, others = rows[:60] * 3, rows[60:]
    cosine, row = (normalize(queries, dim=1) @ normalize(others, dim=1).T).topk(5, dim=1)
    nearest = nearest_rows(queries, others, 5, block=17)
    assert torch.equal(nearest.row, row)
    torch.testing.assert_close(nearest.cosine, cosine)


def test_with_fewer_rows_than_neighbours_the_last_places_are_empty() -> None:
    nearest = nearest_others(clusters(3)[0], 5)
    assert (nearest.row[:, 2:] == NOBODY).all()
    assert (nearest.cosine[:, 2:] == 0).all()
    assert (nearest.row[:, :2] != NOBODY).all()
    assert (nearest_rows(clusters(2)[0], torch.zeros(0, 32), 3).row == NOBODY).all()


def purity(places: Tensor, cluster: Tensor, k: int = 10) -> float:
    distance = torch.cdist(places, places).fill_diagonal_(torch.inf)
    nearest = distance.topk(k, dim=1, largest=False).indices
    return float((cluster[nearest] == cluster[:, None]).float().mean())


def test_the_map_keeps_planted_clusters_together() -> None:
    rows, cluster = clusters(noise=1.2)
    unit = normalize(rows, dim=1)
    best = float((cluster[nearest_others(rows, 10).row] == cluster[:, None]).float().mean())
    main = torch.linalg.svd(unit - unit.mean(0), full_matrices=False).Vh[:2]
    by_components = purity(unit @ main.T, cluster)
    on_the_map = purity(map_rows(rows, epochs=200), cluster)
    assert by_components < 0.8 * best
    assert on_the_map > 0.95 * best


def test_the_map_is_fixed_by_its_seed() -> None:
    rows, _ = clusters(150)
    first, again, other = (map_rows(rows, seed=seed, epochs=30) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(first.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.square().sum(1).mean(), torch.tensor(1.0))


def test_any_number_of_rows_has_a_map() -> None:
    for n in (0, 1, 2, 3, 4, 5, 20):
        places = map_rows(clusters(20)[0][:n], epochs=20)
        assert places.shape == (n, 2)
        assert places.isfinite().all()
    same = map_rows(torch.ones(30, 8), epochs=20)
    assert same.isfinite().all()


def planted_repeats() -> tuple[Tensor, list[int]]:
    """Unrelated rows, three of which repeat an earlier one nearly, and the first of each."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 64, generator=random)
    first = list(range(40))
    for copy, original in ((7, 2), (31, 2), (25, 24)):
        rows[copy] = rows[original] + 0.05 * torch.randn(64, generator=random)
        first[copy] = original
    return normalize(rows, dim=1), first


def test_planted_repeats_follow_the_first_one_whatever_the_block(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    rows, first = planted_repeats()
    for block in (1, 5, 2048):
        monkeypatch.setattr(duplicates, "BLOCK", block)
        assert first_of_kind(rows.half(), 0.97).tolist() == first


def test_a_chain_of_small_changes_does_not_count_as_repeats_of_its_start() -> None:
    angle = torch.arange(30) * 0.15
    rows = torch.stack([angle.cos(), angle.sin()], dim=1)
    first = first_of_kind(rows, 0.97)
    assert (rows * rows[first]).sum(1).min() >= 0.97
    assert len(first.unique()) > 5


def test_many_images_are_compared_within_cells_and_repeats_are_still_found(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(duplicates, "EXACT_IMAGES", 100)
    monkeypatch.setattr(duplicates, "IMAGES_PER_CELL", 64)
    random = torch.Generator().manual_seed(1)
    originals = torch.randn(400, 32, generator=random)
    copies = originals[:200] + 0.05 * torch.randn(200, 32, generator=random)
    first = first_of_kind(normalize(torch.cat([originals, copies]), dim=1), 0.97)
    assert np.array_equal(first[:400], np.arange(400))
    followed = float((first[400:] == torch.arange(200)).float().mean())
    assert followed > 0.95
    assert ((first[400:] == torch.arange(200)) | (first[400:] >= 400)).all()
