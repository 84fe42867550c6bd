"""Activations in memory, so that tests of training need neither a model nor a disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparsight.activations import OrderedBatch, SiteStatistics
from sparsight.errors import SparsightError, UserError
from sparsight.images import ImageSource


class MemoryStream:
    """Every vector once an epoch, in an order that follows from the seed and the epoch."""

    prefetch = True

    def __init__(self, vectors: Mapping[str, Tensor], batch_size: int, seed: int) -> None:
        self.vectors = vectors
        self.batch_size = batch_size
        self.seed = seed
        self.vectors_per_epoch = len(next(iter(vectors.values())))
        self.position = 0

    def __iter__(self) -> MemoryStream:
        return self

    def __next__(self) -> dict[str, Tensor]:
        n = self.vectors_per_epoch
        places = []
        for position in range(self.position, self.position + self.batch_size):
            places.append(int(self._order(position // n)[position % n]))
        self.position += self.batch_size
        return {site: x[places].float() for site, x in self.vectors.items()}

    @cache  # noqa: B019
    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        return torch.randperm(self.vectors_per_epoch, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class MemoryActivations:
    """An `ActivationSource` over tensors [images, tokens, d_in]."""

    tokens = "all"
    model_info: Mapping[str, Any] = {"id": "made-up", "revision": None, "weights_hash": "0"}

    def __init__(self, activations: Mapping[str, Tensor]) -> None:
        self.activations = dict(activations)
        self.sites = tuple(activations)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for site, x in self.activations.items():
            digest.update(site.encode() + x.numpy().tobytes())
        return digest.hexdigest()

    def canonical_site(self, site: str) -> str:
        if site not in self.sites:
            raise UserError(f"holds no site {site!r}, only: {', '.join(self.sites)}")
        return site

    @property
    def n_images(self) -> int:
        return len(self.activations[self.sites[0]])

    @property
    def n_tokens(self) -> Mapping[str, int]:
        return {site: x.shape[1] for site, x in self.activations.items()}

    def d_in(self, site: str) -> int:
        return self.activations[site].shape[2]

    def stats(self, site: str) -> SiteStatistics:
        x = self.activations[site].flatten(0, 1).double()
        x = x[torch.isfinite(x).all(dim=1)]
        return SiteStatistics(len(x), x.mean(dim=0), x.square().mean(dim=0))

    def source(self) -> ImageSource:
        raise SparsightError("These activations are of no images.")

    def stream(self, sites: Sequence[str], batch_size: int, *, seed: int = 0) -> MemoryStream:
        vectors = {site: self.activations[site].flatten(0, 1) for site in sites}
        return MemoryStream(vectors, batch_size, seed)

    def ordered(self, sites: Sequence[str], batch_images: int = 64) -> Iterator[OrderedBatch]:
        for images in torch.arange(self.n_images).split(batch_images):
            yield OrderedBatch(images, {s: self.activations[s][images].float() for s in sites})


def sparse_mixtures(
    sites: Sequence[str] = ("here",), n_images: int = 64, tokens: int = 16, d_in: int = 16
) -> MemoryActivations:
    """Vectors that are sums of a few of 32 fixed directions, off centre and of any size."""
    found = {}
    for number, site in enumerate(sites):
        generator = torch.Generator().manual_seed(number)
        directions = torch.randn(32, d_in, generator=generator)
        directions /= directions.norm(dim=1, keepdim=True)
        n = n_images * tokens
        active = torch.rand(n, 32, generator=generator) < 0.05
        strength = active * (0.5 + torch.rand(n, 32, generator=generator))
        noise = 0.01 * torch.randn(n, d_in, generator=generator)
        x = 5 * (strength @ directions + noise) + 3
        found[site] = x.reshape(n_images, tokens, d_in)
    return MemoryActivations(found)
