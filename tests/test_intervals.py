from __future__ import annotations

import math

import numpy as np
import pytest

from sparsight.errors import UserError
from sparsight.intervals import (
    bootstrap,
    bootstrap_interval,
    paired_difference,
    t_interval,
    wilson_interval,
)


def test_wilson_interval_solves_its_equation():
    # The bounds p are where |share − p| = z √(p (1 − p) / n).
    for successes, n in ((0, 20), (7, 20), (20, 20), (900, 1000)):
        for p in wilson_interval(successes, n):
            if 0 < p < 1:
                distance = abs(successes / n - p)
                assert distance == pytest.approx(1.959964 * np.sqrt(p * (1 - p) / n), rel=1e-9)


def test_paired_difference_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    n, lost, won = 300, 0.06, 0.03
    covered = 0
    for _ in range(2000):
        first, second, _ = rng.multinomial(n, [lost, won, 1 - lost - won])
        difference, (low, high) = paired_difference(int(first), int(second), n)
        assert difference == pytest.approx((second - first) / n)
        covered += low <= won - lost <= high
    assert 0.93 < covered / 2000 < 0.98


def test_items_that_never_differ_still_leave_doubt():
    difference, (low, high) = paired_difference(0, 0, 100)
    assert difference == 0 and -0.05 < low < 0 < high < 0.05
    with pytest.raises(UserError, match="do not fit"):
        paired_difference(60, 60, 100)


def test_bootstrap_interval_of_a_mean_is_close_to_that_of_theory():
    values = np.random.default_rng(0).normal(3, 1, 400).tolist()
    low, high = bootstrap_interval(values, seed=0)
    spread = 1.96 * np.std(values) / 20
    assert low == pytest.approx(np.mean(values) - spread, abs=0.02)
    assert high == pytest.approx(np.mean(values) + spread, abs=0.02)
    assert bootstrap_interval(values, seed=0) == (low, high)
    assert bootstrap_interval([1.0]) is None


@pytest.mark.parametrize("n", [2, 3, 6, 11, 12, 40])
def test_the_interval_over_seeds_is_students(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(n).normal(5, 2, n)
    spread = values.std(ddof=1) / math.sqrt(n)
    expected = stats.t.interval(0.95, n - 1, values.mean(), spread)
    assert t_interval(values.tolist()) == pytest.approx(expected, rel=1e-4)


def test_one_seed_has_no_interval_and_equal_ones_have_a_negligible_one() -> None:
    assert t_interval([0.3]) is None
    assert t_interval([0.25, 0.25]) == (0.25, 0.25)
    assert t_interval([0.1, 0.9], 0, 1) == (0, 1)


def test_bootstrap_of_a_mean_is_that_of_resampled_means(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    drawn = np.random.default_rng(3).integers(50, size=(500, 50))
    expected = pytest.approx(tuple(np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))))
    assert bootstrap(lambda weights: weights @ values / 50, 50, seed=3, resamples=500) == expected
    monkeypatch.setattr("sparsight.intervals.WEIGHTS_AT_ONCE", 50 * 7)
    assert bootstrap_interval(values.tolist(), seed=3, resamples=500) == expected
    assert bootstrap_interval([1.0]) is None
