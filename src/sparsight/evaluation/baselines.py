"""What every score is compared with: an untrained SAE, principal components, raw neurons.

Each, like an SAE, is a function from vectors to a reconstruction and features (`Decomposition`),
so that the same code measures them all.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.errors import UserError
from sparsight.sae import SparseAutoencoder, SparseCode, TopK

Features = SparseCode | Tensor
"""The features of vectors: a sparse code, or `[vectors, n]` with all features, of either sign."""

Decomposition = Callable[[Tensor], tuple[Tensor, Features]]
"""From `[vectors, d_in]` to a reconstruction and features. An SAE is one of these."""

INIT_SAMPLE = 4096
"""Vectors from which an untrained SAE gets the scale of its encoder."""


def untrained(
    sae: SparseAutoencoder, sample: Float[Tensor, "vectors d_in"], seed: int, k: int
) -> SparseAutoencoder:
    """Return an SAE of the same configuration and normaliser, with its weights before training.

    A sparsity that is itself trained, by penalties and thresholds, does not hold at the start: k
    latents per vector replace it.

    Args:
        sae: the trained one.
        sample: activations, for the scale of the encoder.
        seed: seed of the weights.
        k: active latents per vector, if the sparsity does not set k.
    """
    own, config = copy.deepcopy(sae.normaliser), sae.config
    if not hasattr(config.sparsity, "k"):
        config = dataclasses.replace(config, sparsity=TopK(min(k, sae.n_latents)))
    fresh = SparseAutoencoder(
        sae.d_in,
        config,
        d_out=sae.d_out if sae.is_transcoder else None,
        normaliser=own,
        target_normaliser=copy.deepcopy(sae.target_normaliser),
        sample=own(sample.to(own.mean)).cpu(),
        seed=seed,
        metadata=sae.metadata,
    )
    return fresh.to(sae.W_enc.device).requires_grad_(False)


class Moments:
    """Mean and covariance of vectors, streaming, in float64.

    The products are of differences from a fixed point near the mean, which avoids cancellation.
    """

    def __init__(self, d_in: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(d_in, dtype=torch.float64, device=device)
        self._products = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)

    def add(self, x: Float[Tensor, "vectors d_in"]) -> None:
        """Add vectors."""
        if not len(x):
            return
        x = x.double()
        if self._shift is None:
            self._shift = x.mean(dim=0)
        x = x - self._shift
        self.count += len(x)
        self._sum += x.sum(dim=0)
        self._products += x.T @ x

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """x̄, float64."""
        if self._shift is None:
            raise UserError("No vectors: the mean of nothing is not defined.")
        return self._shift + self._sum / self.count

    @property
    def covariance(self) -> Float[Tensor, "d_in d_in"]:
        """Mean of (x − x̄)(x − x̄)ᵀ, float64."""
        centre = self._sum / self.count
        return self._products / self.count - torch.outer(centre, centre)


@dataclass(frozen=True)
class PCA:
    """The first k principal components; the features are all components, strongest first.

    Attributes:
        mean: x̄ of the vectors that it was fitted to.
        components: unit rows, by decreasing variance.
        variances: variance along each component, float64.
        k: number of components in the reconstruction.
    """

    mean: Float[Tensor, " d_in"]
    components: Float[Tensor, "d_in d_in"]
    variances: Float[Tensor, " d_in"]
    k: int

    @classmethod
    def fit(cls, moments: Moments, k: int) -> PCA:
        """Fit to the covariance of vectors.

        Raises:
            UserError: k is not 1 … d_in.
        """
        d_in = len(moments.mean)
        if not 1 <= k <= d_in:
            raise UserError(f"PCA: k is {k}; it must be 1 to {d_in}, the width of the activations.")
        variances, vectors = torch.linalg.eigh(moments.covariance)
        return cls(
            moments.mean.float(),
            vectors.T.flip(0).float().contiguous(),
            variances.flip(0).clamp(min=0),
            k,
        )

    def __call__(self, x: Float[Tensor, "vectors d_in"]) -> tuple[Tensor, Tensor]:
        """Return the reconstruction from k components, and the coordinates along all."""
        features = (x - self.mean) @ self.components.T
        return torch.addmm(self.mean, features[:, : self.k], self.components[: self.k]), features

    def fvu_of(self, n: int) -> float | None:
        """Return the FVU of the first n components on the fitted vectors; None if these do not
        vary.
        """
        total = float(self.variances.sum())
        return float(self.variances[n:].sum()) / total if total else None

    def components_for(self, fvu: float | None) -> int | None:
        """Return the smallest number of components that reach an FVU on the fitted vectors."""
        if fvu is None:
            return None
        counts = range(len(self.variances) + 1)
        return next((n for n in counts if (self.fvu_of(n) or 0.0) <= fvu), None)


@dataclass(frozen=True)
class Neurons:
    """The dimensions of the activations themselves, centred; k of them are kept for x̂.

    Attributes:
        mean: x̄.
        k: number of deviations from x̄ that each vector keeps, the largest ones.
    """

    mean: Float[Tensor, " d_in"]
    k: int

    def __call__(self, x: Float[Tensor, "vectors d_in"]) -> tuple[Tensor, Tensor]:
        """Return x̄ plus the k largest deviations from it; and all deviations."""
        features = x - self.mean
        largest = features.abs().topk(self.k, dim=1, sorted=False).indices
        kept = torch.zeros_like(features).scatter_(1, largest, features.gather(1, largest))
        return self.mean + kept, features
