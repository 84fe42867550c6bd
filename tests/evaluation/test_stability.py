from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from sparsight.errors import MissingExtra, UserError
from sparsight.evaluation import match_latents, stability


def _rows(n: int, d_in: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def _noisy_copy(rows: torch.Tensor, noise: float, seed: int = 1) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator)
    return rows[order] + noise * torch.randn(rows.shape, generator=generator), order.numpy()


@pytest.mark.parametrize("exact_entries", [10**6, 0])
def test_a_reordered_and_rescaled_dictionary_is_matched_exactly(exact_entries: int) -> None:
    first = _rows(200)
    second, order = _noisy_copy(first, 1e-3)
    found = match_latents(first, 7 * second, exact_entries=exact_entries)
    assert np.array_equal(order[found.second], found.first)
    assert found.mean == pytest.approx(1, abs=1e-4)


def test_the_matching_is_the_best_possible() -> None:
    first, second = _rows(5), _rows(6, seed=3)
    cosines = functional.normalize(first, dim=1) @ functional.normalize(second, dim=1).T
    best = max(
        sum(float(cosines[i, j]) for i, j in enumerate(chosen))
        for chosen in itertools.permutations(range(6), 5)
    )
    found = match_latents(first, second)
    assert found.cosines.sum() == pytest.approx(best, abs=1e-5)
    assert len(set(found.second.tolist())) == 5
    other_way = match_latents(second, first)
    assert other_way.cosines.sum() == pytest.approx(best, abs=1e-5)
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    swapped = set(zip(other_way.second.tolist(), other_way.first.tolist(), strict=True))
    assert pairs == swapped


@pytest.mark.parametrize(("n", "m"), [(300, 300), (300, 450), (450, 300)])
def test_candidates_alone_come_close_to_the_best_in_bounded_memory(
    n: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["sparsight.evaluation.stability"]
    monkeypatch.setattr(module, "BLOCK_ENTRIES", 7 * m)
    first, second = _rows(n), _rows(m, seed=5)
    second[: n // 2] = first[: n // 2] + 0.3 * _rows(n // 2, seed=6)
    best = match_latents(first, second)
    found = match_latents(first, second, exact_entries=0, candidates=16)
    assert len(found.first) == len(set(found.second.tolist())) == min(n, m)
    assert best.mean - 2e-3 <= found.mean <= best.mean + 1e-6


def test_rows_without_a_candidate_count_with_their_true_cosine() -> None:
    same = _rows(1).expand(30, -1)
    found = match_latents(same, same.clone(), exact_entries=0, candidates=2)
    assert len(set(found.second.tolist())) == 30 and found.mean == pytest.approx(1)


def test_stability_is_over_pairs_of_seeds_and_alive_latents_with_random_rows_for_comparison() -> (
    None
):
    first = _rows(64, 32)
    second, order = _noisy_copy(first, 0.05)
    third = _rows(64, 32, seed=9)
    alive = [torch.arange(64) < 60, torch.from_numpy(order < 60), torch.ones(64).bool()]
    pair = stability([first, second], alive[:2])
    assert pair["mean_cosine"] > 0.99 and pair["shared"] == 1 and pair["n_alive"] == [60, 60]
    assert pair["random"] < 0.6 and pair["n_seeds"] == 2
    three = stability([first, second, third], alive)
    assert three["lowest"] < three["mean_cosine"] < three["highest"] == pair["mean_cosine"]
    assert stability([first, third])["mean_cosine"] == pytest.approx(pair["random"], abs=0.05)


@pytest.mark.unchecked
def test_dictionaries_that_cannot_be_matched_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="two seeds or more"):
        stability([_rows(3)])
    with pytest.raises(UserError, match="widths 12 and 8"):
        match_latents(_rows(3), _rows(3, 8))
    with pytest.raises(UserError, match="without alive latents"):
        stability([_rows(3), _rows(3)], [torch.zeros(3).bool(), torch.ones(3).bool()])
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtra, match=r"pip install 'sparsight\[stability\]'"):
        match_latents(_rows(3), _rows(3))
