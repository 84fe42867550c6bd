"""Pool the features of patches into one score per scene; sparse features stay sparse."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.evaluation.baselines import Features
from sparsight.evaluation.data import Layout
from sparsight.sae import SparseCode

Pooling = Literal["max", "mean"]


class PooledFeatures:
    """Maximum and mean of every feature over the patches of every scene.

    Without a grid of patches (`cls`, `mean`) both are over all vectors of an image. Sparse features
    stay sparse: memory grows with the number of active latents per scene. Features that may be
    negative are pooled with both signs: feature `n + j` is minus feature `j`.

    Args:
        layout: where the patches are.
        limit: largest number of scenes; later ones are left out.
    """

    def __init__(self, layout: Layout, limit: int) -> None:
        self.layout = layout
        self.limit = limit
        self.n_scenes = 0
        self.n_features = 0
        self.signed = False
        self._parts: list[tuple[Tensor, ...]] = []
        self._matrices: dict[Pooling, Tensor] = {}
        self._starts: list[int] = []

    def add(self, features: Features) -> None:
        """Add the features of the next images, in order."""
        n_images = len(features) // self.layout.n_tokens
        n_images = min(n_images, self.limit - self.n_scenes)
        if n_images <= 0:
            return
        if isinstance(features, SparseCode):
            self.n_features = features.n_latents
            self._add_sparse(features, n_images)
        else:
            self.n_features, self.signed = 2 * features.shape[1], True
            x = features.view(-1, self.layout.n_tokens, features.shape[1])
            x = x[:n_images, self.layout.n_prefix or 0 :]
            pooled = (x.amax(dim=1), x.amin(dim=1), x.mean(dim=1))
            self._parts.append(tuple(each.cpu() for each in pooled))
        self.n_scenes += n_images

    def columns(
        self, pooling: Pooling, features: slice | Int[Tensor, " some"]
    ) -> Float[Tensor, "scenes some"]:
        """Return the scores of features, given as a slice or as numbers, on all scenes."""
        self._settle()
        if self.signed:
            return self._matrices[pooling][:, features]
        if isinstance(features, slice):
            first, stop, _ = features.indices(self.n_features)
            return self._dense(pooling, first, stop)
        found = [self._dense(pooling, int(i), int(i) + 1) for i in features]
        return torch.cat(found, dim=1) if found else torch.zeros(self.n_scenes, 0)

    def _add_sparse(self, code: SparseCode, n_images: int) -> None:
        n_tokens, n_prefix = self.layout.n_tokens, self.layout.n_prefix or 0
        rows = code.rows
        kept = (rows % n_tokens >= n_prefix) & (rows < n_images * n_tokens)
        if not bool(kept.any()):
            return
        # By latent, then scene: the entries of a pair are contiguous.
        key = code.indices[kept] * n_images + rows[kept] // n_tokens
        key, order = key.sort(stable=True)
        pair, counts = key.unique_consecutive(return_counts=True)
        values = code.values[kept][order]
        strongest = torch.segment_reduce(values, "max", lengths=counts)
        total = torch.segment_reduce(values, "sum", lengths=counts)
        scene = self.n_scenes + pair % n_images
        parts = (pair // n_images, scene, strongest, total / (n_tokens - n_prefix))
        self._parts.append(tuple(each.cpu() for each in parts))

    def _settle(self) -> None:
        """Join the parts, sparse ones in the order of the latents."""
        if not self._parts:
            return
        joined = [torch.cat(parts) for parts in zip(*self._parts, strict=True)]
        self._parts = []
        if self.signed:
            largest, smallest, mean = joined
            self._matrices = {
                "max": torch.cat([largest, -smallest], dim=1),
                "mean": torch.cat([mean, -mean], dim=1),
            }
            return
        latent, order = joined[0].sort(stable=True)
        self._scene = joined[1][order]
        self._latent = latent
        self._matrices = {"max": joined[2][order], "mean": joined[3][order]}
        edges = torch.arange(self.n_features + 1)
        self._starts = torch.searchsorted(latent, edges).tolist()

    def _dense(self, pooling: Pooling, first: int, stop: int) -> Float[Tensor, "scenes some"]:
        out = torch.zeros(self.n_scenes, stop - first)
        if self._starts:
            part = slice(self._starts[first], self._starts[stop])
            values = self._matrices[pooling][part].float()
            out[self._scene[part], self._latent[part] - first] = values
        return out


def heat(
    features: Features,
    layout: Layout,
    chosen: Int[Tensor, " columns"],
) -> Float[Tensor, "images patches columns"]:
    """Return chosen features at every patch, numbered as in `PooledFeatures`.

    Args:
        features: features of whole images.
        layout: where the patches are.
        chosen: numbers of the features.
    """
    n_tokens, n_prefix = layout.n_tokens, layout.n_prefix or 0
    if isinstance(features, SparseCode):
        device = features.values.device
        chosen = chosen.to(device)
        column = torch.full((features.n_latents,), -1, device=device)
        column[chosen] = torch.arange(len(chosen), device=device)
        place = column[features.indices]
        kept = place >= 0
        out = features.values.new_zeros(len(features), len(chosen))
        out[features.rows[kept], place[kept]] = features.values[kept]
    else:
        n = features.shape[1]
        chosen = chosen.to(features.device)
        sign = torch.where(chosen < n, 1.0, -1.0)
        out = features[:, chosen % n] * sign
    return out.view(len(out) // n_tokens, n_tokens, len(chosen))[:, n_prefix:]
