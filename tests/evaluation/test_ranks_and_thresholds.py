from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsight.evaluation.ranks import (
    auc_matrix,
    auc_of_pairs,
    average_ranks,
    best_f1_on_grid,
    best_threshold,
    f1_at,
)


@pytest.fixture(scope="module")
def scored():
    g = torch.Generator().manual_seed(0)
    # Many ties, most of them at 0, as latents have.
    scores = (torch.randint(0, 6, (90, 14), generator=g) - 3).clamp(min=0).float() / 3
    labels = torch.rand(90, 4, generator=g) < 0.3
    return scores, labels


def test_ranks_are_those_of_scipy(scored):
    stats = pytest.importorskip("scipy.stats")
    np.testing.assert_array_equal(
        average_ranks(scored[0]), stats.rankdata(scored[0].numpy(), axis=0)
    )


def test_auc_of_all_columns_for_all_labels_equals_counting_pairs(scored):
    scores, labels = scored
    found = auc_matrix(scores, labels)
    for j in range(scores.shape[1]):
        for v in range(labels.shape[1]):
            positive, negative = scores[labels[:, v], j], scores[~labels[:, v], j]
            wins = (positive[:, None] > negative).double()
            ties = (positive[:, None] == negative).double()
            assert float(found[j, v]) == pytest.approx(float((wins + ties / 2).mean()), abs=1e-13)


def test_auc_and_f1_equal_those_of_scikit_learn(scored):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, labels = scored
    found = auc_matrix(scores, labels)
    for v in range(labels.shape[1]):
        expected = [metrics.roc_auc_score(labels[:, v], each) for each in scores.T]
        np.testing.assert_allclose(found[:, v], expected, atol=1e-13)
        pairs = labels[:, v : v + 1].expand(-1, scores.shape[1])
        np.testing.assert_allclose(auc_of_pairs(scores, pairs), expected, atol=1e-13)
        f1 = f1_at(scores, pairs, torch.full((14,), 0.5))
        expected = [metrics.f1_score(labels[:, v], each > 0.5) for each in scores.T]
        np.testing.assert_allclose(f1, expected, atol=1e-13)


def test_no_threshold_has_a_higher_f1_than_the_best(scored):
    scores, labels = scored
    pairs = labels[:, torch.arange(14) % 4]
    best = f1_at(scores, pairs, best_threshold(scores, pairs))
    tried = [
        f1_at(scores, pairs, torch.full((14,), t, dtype=torch.float64))
        for t in np.linspace(-1, 1.5, 60)
    ]
    assert torch.equal(best, torch.stack(tried).amax(dim=0))


def test_a_label_on_all_or_no_items_gives_no_auc():
    labels = torch.tensor([[True, False]] * 5)
    assert auc_matrix(torch.rand(5, 3), labels).isnan().all()


def test_the_coarse_f1_is_reached_by_a_threshold_and_never_above_the_best(scored):
    scores, labels = scored
    coarse = best_f1_on_grid(scores, labels)
    for v in range(labels.shape[1]):
        pairs = labels[:, v : v + 1].expand(-1, scores.shape[1])
        best = f1_at(scores, pairs, best_threshold(scores, pairs))
        assert (coarse[:, v] <= best + 1e-6).all()
    # With one threshold, "active or not", it is the F1 of that threshold.
    active = best_f1_on_grid(scores, labels, fractions=(0,))
    expected = f1_at(scores, labels[:, :1].expand(-1, 14), torch.zeros(14))
    torch.testing.assert_close(active[:, 0].double(), expected)
