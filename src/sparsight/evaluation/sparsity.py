"""How many latents are active, how often and how strongly, and which never are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from sparsight.errors import UserError
from sparsight.sae import SparseCode

CLIPSCOPE_WINDOW = 10_000_000
"""The window of CLIP-Scope's dead proportion, of Gao et al. 2024, and our default, in vectors."""

LOW_DENSITY = 1e-5
DECADES = (-8, 0)
BINS_PER_DECADE = 4


@dataclass(frozen=True)
class LatentCounts:
    """Counts of every latent.

    Attributes:
        density: share of vectors on which it is active.
        mean_activation: mean over the vectors on which it is active; NaN where it never is.
        n_active: number of vectors on which it is active.
    """

    density: Float[np.ndarray, " n_latents"]
    mean_activation: Float[np.ndarray, " n_latents"]
    n_active: Int[np.ndarray, " n_latents"]


class SparsityMeter:
    """Counts active latents over sparse codes, in the order of the data.

    Args:
        n_latents: width of the dictionary.
        n_tokens: positions per image.
        device: device of the counts.
    """

    def __init__(self, n_latents: int, n_tokens: int, device: torch.device | str = "cpu") -> None:
        self.n_vectors = 0
        self.n_active = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self._sum = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self._l0 = torch.zeros(n_tokens, dtype=torch.int64, device=device)
        # The last vector on which each latent was active, counted from 1.
        self._last = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def add(self, code: SparseCode) -> None:
        """Add the codes of whole images, image after image."""
        n_tokens = len(self._l0)
        if len(code) % n_tokens:
            raise UserError(
                f"Sparsity: {len(code)} vectors are not whole images of {n_tokens} positions."
            )
        n_latents = len(self.n_active)
        rows = code.rows
        self.n_active += torch.bincount(code.indices, minlength=n_latents)
        self._sum.index_add_(0, code.indices, code.values.double())
        self._l0 += code.l0.view(-1, n_tokens).sum(dim=0)
        self._last.scatter_reduce_(0, code.indices, rows + (self.n_vectors + 1), "amax")
        self.n_vectors += len(code)

    def counts(self) -> LatentCounts:
        """Return the counts of each latent."""
        active = self.n_active.double()
        return LatentCounts(
            (active / self.n_vectors).cpu().numpy(),
            (self._sum / active).cpu().numpy(),
            self.n_active.cpu().numpy(),
        )

    def alive(self, window: int) -> Bool[Tensor, " n_latents"]:
        """Return which latents were active in the last `window` vectors."""
        return self._last > max(0, self.n_vectors - window)

    def l0(self, first: int = 0, stop: int | None = None) -> float:
        """Return the mean number of active latents at the positions `first` … `stop − 1`."""
        counts = self._l0[first:stop]
        return int(counts.sum()) / (len(counts) * self.n_vectors // len(self._l0))

    def result(self, n_prefix: int | None, has_cls: bool, window: int | None) -> dict[str, Any]:
        """Return the figures for JSON; docs/concepts/metrics.md explains the keys.

        Args:
            n_prefix: number of measured positions before the first patch; None without a grid of
                patches (one vector per image).
            has_cls: whether the first of them is the CLS position.
            window: N of `dead`, in vectors; None is 10,000,000, or all vectors if there are fewer.

        Raises:
            UserError: no vectors were added.
        """
        if self.n_vectors == 0:
            raise UserError("Sparsity: no vectors to measure.")
        n = min(window or CLIPSCOPE_WINDOW, self.n_vectors)
        clipscope_n = min(CLIPSCOPE_WINDOW, self.n_vectors)
        counts = self.counts()
        result: dict[str, Any] = {
            "l0": self.l0(),
            "dead": float((~self.alive(n)).double().mean()),
            "dead_window": n,
            "clipscope_dead": float((~self.alive(clipscope_n)).double().mean()),
            "clipscope_dead_window": clipscope_n,
            "density": _density_summary(counts.density),
        }
        if n_prefix is not None and len(self._l0) > n_prefix > 0 and has_cls:
            result["l0_cls"] = self.l0(0, 1)
            result["l0_patches"] = self.l0(n_prefix)
        return result


def low_density_cluster(
    counts: LatentCounts, W_enc: Float[Tensor, "n_latents d_in"], threshold: float = LOW_DENSITY
) -> dict[str, Any]:
    """Do the encoder rows of ultra-low-density latents share one direction?

    Bricken et al. 2023, "Towards Monosemanticity", saw such a cluster. The result is the mean
    cosine over all pairs of these latents, and over all pairs of the others.

    Args:
        counts: counts of the latents.
        W_enc: encoder rows.
        threshold: density under which a latent belongs to the cluster, dead ones included.
    """
    low = torch.from_numpy(counts.density < threshold).to(W_enc.device)
    return {
        "threshold": threshold,
        "n": int(low.sum()),
        "mean_cosine": mean_pairwise_cosine(W_enc[low]),
        "mean_cosine_others": mean_pairwise_cosine(W_enc[~low]),
    }


def mean_pairwise_cosine(rows: Float[Tensor, "n d_in"]) -> float | None:
    """Return the exact mean cosine of pairs, (‖Σ u‖² − n) / (n (n − 1)); None under two rows."""
    n = len(rows)
    if n < 2:
        return None
    unit = functional.normalize(rows.detach().double(), dim=1)
    total = unit.sum(dim=0).square().sum() - unit.square().sum()
    return float(total) / (n * (n - 1))


def _density_summary(density: Float[np.ndarray, " n_latents"]) -> dict[str, Any]:
    low, high = DECADES
    edges = np.linspace(low, high, (high - low) * BINS_PER_DECADE + 1)
    logs = np.log10(density[density > 0])
    histogram, _ = np.histogram(np.clip(logs, low, high), edges)
    return {
        "below_1e-5": float((density < 1e-5).mean()),
        "below_1e-6": float((density < 1e-6).mean()),
        "median": float(np.median(density)),
        "max": float(density.max()),
        "never": int((density == 0).sum()),
        "log10_edges": edges.tolist(),
        "histogram": histogram.tolist(),
    }
