"""How certain an estimate is: intervals of shares, of paired differences and of means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sparsight.errors import UserError

Z_95 = 1.959964
RESAMPLES = 2000
WEIGHTS_AT_ONCE = 1 << 22
"""Number of resampled values held at a time, which bounds a bootstrap's memory."""


def wilson_interval(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's score interval of a share; `z` = 1.96 for 95 %."""
    if n == 0:
        return (0.0, 1.0)
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def paired_difference(
    only_first: int, only_second: int, n: int, z: float = Z_95
) -> tuple[float, tuple[float, float]]:
    """Return the share of successes of the second minus the first's, on the same `n` items.

    The interval is Wald's, with half a pseudo-count in each of the four cells (Agresti and Min
    2005), which is accurate even if hardly any items differ.

    Args:
        only_first: number of items on which only the first succeeded.
        only_second: number of items on which only the second succeeded.
        n: number of items.
        z: 1.96 for 95 %.

    Returns:
        The difference, and its interval.

    Raises:
        UserError: the counts contradict one another.
    """
    if min(only_first, only_second) < 0 or only_first + only_second > n or n < 1:
        raise UserError(
            f"paired_difference: {only_first} and {only_second} of {n} do not fit together."
        )
    first, second, total = only_first + 0.5, only_second + 0.5, n + 2.0
    middle = (second - first) / total
    spread = z * math.sqrt(max(0.0, first + second - (second - first) ** 2 / total)) / total
    return (only_second - only_first) / n, (max(-1.0, middle - spread), min(1.0, middle + spread))


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of the mean; None for fewer than two values."""
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    return bootstrap(lambda weights: weights @ array / n, n, seed, resamples)


def bootstrap(
    statistic: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    n: int,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of a statistic; None for fewer than two items.

    Args:
        statistic: maps weights `[rows, n]`, how often each item was drawn, to one value per row.
        n: number of items.
        seed: seed of the resampling.
        resamples: number of resamples.
    """
    if n < 2:
        return None
    generator, resampled = np.random.default_rng(seed), []
    rows = max(1, WEIGHTS_AT_ONCE // n)
    for first in range(0, resamples, rows):
        drawn = generator.integers(n, size=(min(rows, resamples - first), n))
        drawn += n * np.arange(len(drawn))[:, None]
        weights = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        resampled.append(statistic(weights.astype(np.float64)))
    low, high = np.quantile(np.concatenate(resampled), (0.025, 0.975))
    return float(low), float(high)


def t_interval(
    values: Sequence[float], least: float = -math.inf, most: float = math.inf
) -> tuple[float, float] | None:
    """Return Student's 95 % interval of the mean of a few values; None for fewer than 2.

    The interval of two values extends 9 times their distance on either side: two seeds say very
    little. An interval of what cannot be below `least` or above `most` is cut there.
    """
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = _t_95(n - 1) * deviation / math.sqrt(n)
    return max(mean - half, least), min(mean + half, most)


def _t_95(df: int) -> float:
    """Return the 97.5 % quantile of Student's t; beyond the table Fisher's expansion (to 1e-4)."""
    if df <= len(_T_95):
        return _T_95[df - 1]
    z = Z_95
    first = (z**3 + z) / (4 * df)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    return z + first + second + third


_T_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
