"""The null: a name counts only if its score is one that untrained latents hardly ever reach.

Untrained latents are divided into three parts. With the first, methods fit their parameters; on the
second, thresholds are set; on the third, which are latents of other untrained SAEs, the share of
false names is measured. Every name of an untrained latent is false.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64

from sparsight.errors import UserError
from sparsight.intervals import wilson_interval
from sparsight.naming.scores import LatentActivations, Method

MIN_IMAGES = 10
"""Images in which a latent must fire to get a name; untrained ones likewise."""

CONFIDENCE = 0.95
"""How sure it is that untrained latents exceed the thresholds no more often than asked."""


@dataclass(frozen=True)
class UntrainedLatents:
    """Untrained latents that fire in enough images, in three parts.

    Attributes:
        fitting: for the parameters of the methods.
        threshold: for the thresholds.
        check: of other untrained SAEs, for the measured rate of false names.
    """

    fitting: LatentActivations
    threshold: LatentActivations
    check: LatentActivations

    @classmethod
    def of(cls, one: LatentActivations, other: LatentActivations) -> UntrainedLatents:
        """Divide some latents in two, and keep others, of other untrained SAEs, for the check."""
        alive, checked = (
            np.nonzero(each.n_images >= MIN_IMAGES)[0].astype(np.int64) for each in (one, other)
        )
        return cls(one.select(alive[::2]), one.select(alive[1::2]), other.select(checked))


@dataclass(frozen=True)
class Null:
    """Thresholds of methods, and how often untrained latents exceed them.

    Attributes:
        methods: the calibrated methods.
        thresholds: a name is given if its score is larger; one per method.
        asked: rate of false names that the user allows, for all methods together.
        n_threshold: untrained latents on which the thresholds were set.
        n_check: untrained latents on which the rates were measured.
        false_names: how many of these got a name, per method.
        false_names_together: how many of them got one from any method.
    """

    methods: tuple[Method, ...]
    thresholds: tuple[float, ...]
    asked: float
    n_threshold: int
    n_check: int
    false_names: tuple[int, ...]
    false_names_together: int

    @property
    def measured(self) -> float:
        """Share of the checked untrained latents that get a name from any method."""
        return self.false_names_together / self.n_check

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `measured`."""
        return wilson_interval(self.false_names_together, self.n_check)


def check_rate(rate: float) -> None:
    """Raise a `UserError` unless a rate of false names lies between 0 and 1."""
    if not 0 < rate < 1:
        raise UserError(f"--false-names is {rate}; it must lie between 0 and 1, such as 0.05.")


def fit_null(methods: Sequence[Method], untrained: UntrainedLatents, rate: float) -> Null:
    """Calibrate methods, set their thresholds, and measure the rate of false names.

    All methods share one rank: a method's threshold is its r-th largest score among untrained
    latents, with the largest r at which, with 95 % confidence, at most a share `rate` of untrained
    latents exceeds any threshold. (The confidence bound is that of order statistics: Wilks 1941.)

    Args:
        methods: at least one.
        untrained: the untrained latents.
        rate: allowed share of untrained latents with a name.

    Raises:
        UserError: the rate is not between 0 and 1, or there are too few untrained latents for it.
    """
    check_rate(rate)
    n = len(untrained.threshold)
    allowed = most_false_names(n, rate)
    if allowed is None or not len(untrained.check):
        needed = math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - rate))
        raise UserError(
            f"Only {n} untrained latents fire in {MIN_IMAGES} images or more, too few to set a "
            f"threshold for a false-name rate of {rate:g} (at least {needed} are needed). Use an "
            "index of more images, or a higher rate."
        )
    calibrated = tuple(method.calibrated(untrained.fitting) for method in methods)
    scores = np.stack([best_scores(m, untrained.threshold) for m in calibrated], axis=1)
    thresholds = _thresholds(scores, allowed)
    named = np.stack([best_scores(m, untrained.check) for m in calibrated], axis=1) > thresholds
    return Null(
        calibrated,
        tuple(map(float, thresholds)),
        rate,
        n,
        len(untrained.check),
        tuple(map(int, named.sum(axis=0))),
        int(named.any(axis=1).sum()),
    )


def best_scores(method: Method, activations: LatentActivations) -> Float[np.ndarray, " latents"]:
    """Return the score of each latent's best candidate; −inf if it has none."""
    scores: Float[np.ndarray, " latents"] = method.candidates(activations, 1).score[:, 0]
    return scores


def most_false_names(n: int, rate: float) -> int | None:
    """Return how many of `n` untrained latents may exceed a threshold set on themselves.

    If the threshold is the k-th smallest of n scores, the share of all untrained latents above it
    exceeds `rate` with probability P(Binomial(n, 1 − rate) ≥ k). The result is n − k for the
    smallest k with at most 1 − `CONFIDENCE`; None if no k has that.
    """
    cumulative, keep = 0.0, 1 - rate
    for k in range(n):
        log_share = (
            math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
            + k * math.log(keep) + (n - k) * math.log(rate)
        )  # fmt: skip
        cumulative += math.exp(log_share)
        if cumulative >= CONFIDENCE:  # P(Binomial ≤ k), so P(Binomial ≥ k + 1) ≤ 1 − CONFIDENCE
            return n - (k + 1)
    return None


def _thresholds(
    scores: Float[np.ndarray, "latents methods"], allowed: int
) -> Float[np.ndarray, " methods"]:
    """Return the lowest thresholds at a common rank that at most `allowed` latents exceed."""
    falling = -np.sort(-scores, axis=0)
    best, last = 0, allowed
    while best < last:  # the number of latents above the thresholds grows with the rank
        rank = (best + last + 1) // 2
        above: Bool[np.ndarray, " latents"] = (scores > falling[rank]).any(axis=1)
        if above.sum() <= allowed:
            best = rank
        else:
            last = rank - 1
    found: Float[np.ndarray, " methods"] = falling[best]
    return found


def alive(activations: LatentActivations) -> Int64[np.ndarray, " some"]:
    """Return the rows of latents that fire in enough images for a name."""
    rows: Int64[np.ndarray, " some"] = np.nonzero(activations.n_images >= MIN_IMAGES)[0]
    return rows.astype(np.int64)
