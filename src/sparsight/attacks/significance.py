"""Test whether paired differences are more than chance, many tests at a time."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64

Alternative = Literal["greater", "two-sided"]
"""More active on the first image of the pair; or differently active, in either direction."""

PERMUTATIONS = 9_999

_CHUNK = 1_000
_COLUMNS = 4_096


def sign_flip_p(
    difference: Float64[np.ndarray, "pairs latents"],
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    alternative: Alternative = "greater",
) -> Float64[np.ndarray, " latents"]:
    """Return p of each column's mean under flips of the signs of whole rows.

    If there are no more than `permutations` flips (2ⁿ), all are tried, and p is the share whose
    mean is at least as large as the observed one; otherwise p is (1 + hits) / (1 + permutations),
    which counts the observation as one of the flips (Phipson and Smyth 2010).

    Args:
        difference: difference of each pair, in each latent.
        permutations: number of random flips.
        seed: seed of the flips.
        alternative: `greater`, or `two-sided` for the mean's absolute value.
    """
    n, width = difference.shape
    every = n < 63 and 2**n <= permutations
    count = 2**n if every else permutations
    rng = np.random.default_rng(seed)
    hits = np.zeros(width, np.int64)
    seen = difference.sum(axis=0)
    # Sums of the same numbers in another order must count as equal.
    slack = 1e-9 * np.abs(difference).sum(axis=0)
    x = torch.from_numpy(np.ascontiguousarray(difference))
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        bits: npt.NDArray[Any]
        if every:
            bits = (np.arange(start, stop)[:, None] >> np.arange(n)) & 1
        else:
            bits = rng.random((stop - start, n)) < 0.5
        signs = torch.from_numpy(1.0 - 2.0 * bits)
        for left in range(0, width, _COLUMNS):
            here = slice(left, left + _COLUMNS)
            flipped = (signs @ x[:, here]).numpy()
            if alternative == "greater":
                hits[here] += (flipped >= seen[here] - slack[here]).sum(axis=0)
            else:
                hits[here] += (np.abs(flipped) >= np.abs(seen[here]) - slack[here]).sum(axis=0)
    return hits / count if every else (1 + hits) / (1 + count)


def benjamini_hochberg(p: Float64[np.ndarray, " tests"]) -> Float64[np.ndarray, " tests"]:
    """Return the q of each p: the smallest false discovery rate at which it is rejected.

    q of the i-th smallest p is the minimum of p(j) · m / j over j ≥ i.
    """
    m = len(p)
    if not m:
        return p
    order = np.argsort(p, kind="stable")
    scaled = p[order] * m / np.arange(1, m + 1)
    q = np.empty(m)
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1.0)
    return q
