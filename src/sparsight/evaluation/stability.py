"""Do other seeds learn the same latents? Dictionaries matched one to one by their decoder rows.

Each latent of one dictionary is paired with a latent of the other so that the sum of the cosines of
their decoder rows is as large as possible (the Hungarian method). The mean cosine of the pairs is 1
if two seeds learnt the same dictionary in another order. Random rows score well above 0, more so if
there are many of them in few dimensions, so their score is reported too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from sparsight.errors import MissingExtra, UserError

EXACT_ENTRIES = 1 << 25
"""Pairs up to which all cosines are held at once: 400 MB with scipy's copies."""

CANDIDATES = 32
"""Beyond that, the number of most similar rows with which each row may be matched."""

BLOCK_ENTRIES = 1 << 25
SHARED = 0.7
"""Cosine from which two latents count as the same."""


@dataclass(frozen=True)
class Matching:
    """Pairs of rows of two dictionaries; every row of the smaller one is in a pair.

    Attributes:
        first: rows of the first dictionary.
        second: their partners in the second.
        cosines: cosines of the pairs.
    """

    first: Int[np.ndarray, " pairs"]
    second: Int[np.ndarray, " pairs"]
    cosines: Float[np.ndarray, " pairs"]

    @property
    def mean(self) -> float:
        """Mean cosine of the pairs."""
        return float(self.cosines.mean())


def match_latents(
    first: Float[Tensor, "n d_in"],
    second: Float[Tensor, "m d_in"],
    *,
    exact_entries: int = EXACT_ENTRIES,
    candidates: int = CANDIDATES,
) -> Matching:
    """Match the rows of two dictionaries for the largest sum of cosines.

    Memory is bounded: beyond `exact_entries` pairs of rows, only pairs in which one row is among
        the `candidates` most similar rows of the other are considered; the remaining rows are
        paired in order. The sum is then close to the largest one, and never above it.

    Args:
        first: decoder rows, of any length but 0.
        second: decoder rows of the other dictionary.
        exact_entries: number of pairs up to which all are considered.
        candidates: number of candidates for each row otherwise.

    Raises:
        UserError: a dictionary is empty, or the widths differ.
        MissingExtra: scipy is not installed.
    """
    if first.shape[1] != second.shape[1]:
        raise UserError(
            f"Dictionaries of widths {first.shape[1]} and {second.shape[1]} cannot be matched: "
            "both must read the same site."
        )
    if not len(first) or not len(second):
        raise UserError("A dictionary without alive latents cannot be matched.")
    if len(first) > len(second):
        swapped = match_latents(second, first, exact_entries=exact_entries, candidates=candidates)
        order = np.argsort(swapped.second)
        return Matching(swapped.second[order], swapped.first[order], swapped.cosines[order])
    one, other = (functional.normalize(each.detach().float(), dim=1) for each in (first, second))
    if len(one) * len(other) <= exact_entries:
        columns = _assign(one @ other.T)
    else:
        columns = _assign_candidates(one, other, min(candidates, len(other)))
    partners = other[torch.from_numpy(columns).to(other.device)]
    cosines = (one * partners).sum(dim=1).cpu().double().numpy()
    return Matching(np.arange(len(one)), columns, cosines)


def stability(
    dictionaries: Sequence[Float[Tensor, "_ d_in"]],
    alive: Sequence[Bool[Tensor, " _"]] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure how similar the dictionaries of several seeds are; the result is for JSON.

    Args:
        dictionaries: decoder rows of each dictionary.
        alive: which latents count; all by default.
        seed: seed of the random rows.

    Returns:
        `mean_cosine` over the pairs of seeds, its `lowest` and `highest` value, `shared`: the share
        of matched latents with a cosine of 0.7 or more, `random`: the mean cosine of the first
        dictionary with the same number of random rows as the second has, `n_seeds`, and `n_alive`
        per seed.

    Raises:
        UserError: there are fewer than two dictionaries, one has no alive latents, or the widths
            differ.
        MissingExtra: scipy is not installed.
    """
    if len(dictionaries) < 2:
        raise UserError("Stability needs the dictionaries of two seeds or more.")
    rows = list(dictionaries)
    if alive is not None:
        rows = [each[mask.to(each.device)] for each, mask in zip(rows, alive, strict=True)]
    found = [match_latents(one, other) for one, other in itertools.combinations(rows, 2)]
    means = [each.mean for each in found]
    # Not torch's generator: the weights may come from the same seed.
    drawn = np.random.default_rng(seed).standard_normal(tuple(rows[1].shape), dtype=np.float32)
    noise = torch.from_numpy(drawn).to(rows[0].device)
    return {
        "mean_cosine": fmean(means),
        "lowest": min(means),
        "highest": max(means),
        "shared": fmean(float((each.cosines >= SHARED).mean()) for each in found),
        "random": match_latents(rows[0], noise).mean,
        "n_seeds": len(rows),
        "n_alive": [len(each) for each in rows],
    }


def _assign(cosines: Float[Tensor, "n m"]) -> Int[np.ndarray, " n"]:
    """Return the column assigned to each row, n ≤ m."""
    _, columns = _scipy("optimize").linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    return np.asarray(columns)


def _assign_candidates(
    one: Float[Tensor, "n d_in"], other: Float[Tensor, "m d_in"], n_candidates: int
) -> Int[np.ndarray, " n"]:
    """Return the same from candidates only; n ≤ m, unit rows.

    Every row has an extra column of its own, so that a matching always exists: staying unmatched
    costs as much as a cosine of 0.
    """
    sparse, csgraph = _scipy("sparse"), _scipy("sparse.csgraph")
    n, m = len(one), len(other)
    values, columns = _most_similar(one, other, n_candidates)
    back_values, back = _most_similar(other, one, min(n_candidates, n))
    row = np.concatenate([np.repeat(np.arange(n), columns.shape[1]), back.ravel(), np.arange(n)])
    column = np.concatenate(
        [columns.ravel(), np.repeat(np.arange(m), back.shape[1]), m + np.arange(n)]
    )
    cosine = np.concatenate([values.ravel(), back_values.ravel(), np.zeros(n)])
    _, once = np.unique(row * (m + n) + column, return_index=True)
    # Costs must not be 0, which a sparse matrix treats as a missing edge.
    costs = sparse.csr_matrix((2.0 - cosine[once], (row[once], column[once])), shape=(n, m + n))
    matched, chosen = csgraph.min_weight_full_bipartite_matching(costs)
    result = np.empty(n, dtype=np.int64)
    result[matched] = chosen
    left = result >= m
    free = np.setdiff1d(np.arange(m), result[~left])
    result[left] = free[: int(left.sum())]
    return result


def _most_similar(
    rows: Float[Tensor, "n d_in"], others: Float[Tensor, "m d_in"], k: int
) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, "n k"]]:
    """Find the cosines and places of the k most similar `others` of each row, block by block."""
    block = max(1, BLOCK_ENTRIES // len(others))
    found = [(part @ others.T).topk(k, dim=1) for part in rows.split(block)]
    values = torch.cat([each.values for each in found]).cpu().double().numpy()
    return values, torch.cat([each.indices for each in found]).cpu().numpy()


def _scipy(part: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(f"scipy.{part}")
    except ImportError:
        raise MissingExtra("scipy", "stability") from None
