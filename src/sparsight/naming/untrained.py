"""Activations of untrained SAEs over the images of an index: what a name must beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.activations import ActivationSource
from sparsight.errors import UserError
from sparsight.evaluation.baselines import INIT_SAMPLE, untrained
from sparsight.latents import Postings
from sparsight.latents.code_shards import CodeBatch
from sparsight.latents.encoding import usual_batch
from sparsight.latents.image_maxima import image_maxima
from sparsight.naming.scores import LatentActivations
from sparsight.progress import progress
from sparsight.sae import SparseAutoencoder

MOST_LATENTS = 4096
"""Latents of an untrained SAE that are kept; more would not make a threshold more exact."""

MOST_ENTRIES = 1 << 25
"""Activations of untrained SAEs that are kept, 8 bytes each; beyond, latents are dropped."""

ENOUGH_LATENTS = 2048
"""Untrained latents for the thresholds, and as many for the check; of an SAE with fewer latents,
several untrained ones are drawn."""


class _Collector:
    """Image activations of some latents of one SAE, batch after batch."""

    def __init__(self, sae: SparseAutoencoder, seed: int, most: int, entries: int) -> None:
        self.sae = sae
        # In random order, so that any first part of them is a fair sample.
        random = np.random.default_rng([seed, sae.n_latents])
        self.kept = random.permutation(sae.n_latents)[:most]
        self.most_entries = entries
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._n = 0
        self._number()

    def _number(self) -> None:
        self._row = np.full(self.sae.n_latents, -1, dtype=np.int64)
        self._row[self.kept] = np.arange(len(self.kept))

    def add(self, batch: CodeBatch) -> None:
        """Add the codes of the next images."""
        maxima = image_maxima(batch.code, batch.n_tokens)
        row = self._row[maxima.latent.cpu().numpy()]
        known = row >= 0
        places = batch.image_indices.cpu()[maxima.image.cpu()].numpy().astype(np.int32)
        value = maxima.value.cpu().numpy()[known]
        self._parts.append((row[known].astype(np.int32), places[known], value))
        self._n += len(value)
        while self._n > self.most_entries and len(self.kept) > 1:
            self.kept = self.kept[: len(self.kept) // 2]
            self._number()
            self._parts = [
                (row[own], image[own], value[own])
                for row, image, value in self._parts
                for own in [row < len(self.kept)]
            ]
            self._n = sum(len(part[0]) for part in self._parts)

    def result(self, n_places: int) -> LatentActivations:
        """Return the activations by latent."""
        nothing = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
        columns = zip(*(self._parts or [nothing]), strict=True)
        row, image, value = (np.concatenate(column) for column in columns)
        self._parts = []
        order = np.argsort(row, kind="stable")  # so images keep rising
        counts = np.bincount(row, minlength=len(self.kept))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = Postings(offsets, image[order], value[order], None, n_places)
        return LatentActivations(self.sae, self.kept.astype(np.int64), rows)


@torch.no_grad()
def untrained_activations(
    sae: SparseAutoencoder,
    activations: ActivationSource,
    site: str,
    l0: float,
    seeds: Sequence[int],
    n_places: int,
    *,
    most_latents: int = MOST_LATENTS,
    most_entries: int = MOST_ENTRIES,
    quiet: bool = False,
) -> list[LatentActivations]:
    """Encode the images with untrained SAEs of the same shape, in one pass.

    Each has the configuration and the normaliser of the trained one, and weights as they are before
    training (`evaluation.baselines.untrained`).

    Args:
        sae: the trained SAE.
        activations: activations of the images.
        site: where the SAE reads.
        l0: mean number of active latents per vector of the trained SAE; the untrained one has as
            many if its sparsity does not set the number.
        seeds: seeds of the weights, one per untrained SAE.
        n_places: number of images in the source.
        most_latents: latents kept per SAE, drawn at random.
        most_entries: activations kept, of all SAEs; if there are more, fewer latents are kept.
        quiet: show no progress line.

    Raises:
        UserError: there are no activations.
    """
    batch_images = usual_batch(activations, site)
    sample = _first_vectors(activations, site, batch_images)
    k = max(1, round(l0))
    fresh = [untrained(sae, sample, seed, k) for seed in seeds]
    found = [
        _Collector(each, seed, most_latents, max(1, most_entries // len(seeds)))
        for each, seed in zip(fresh, seeds, strict=True)
    ]
    with progress("untrained", activations.n_images, "images", quiet=quiet) as line:
        for batch in activations.ordered([site], batch_images=batch_images):
            for each in found:
                for codes in _encoded(each.sae, batch.activations[site], batch.image_indices):
                    each.add(codes)
            line.advance(len(batch.image_indices))
    return [each.result(n_places) for each in found]


def _encoded(
    sae: SparseAutoencoder, x: Float[Tensor, "images tokens d_in"], images: Tensor
) -> Iterator[CodeBatch]:
    if len(x):
        code = sae.encode(x.to(sae.W_enc.device).flatten(0, 1))
        yield CodeBatch(images, code, x.shape[1])


def _first_vectors(
    activations: ActivationSource, site: str, batch_images: int
) -> Float[Tensor, "vectors d_in"]:
    parts: list[Tensor] = []
    for batch in activations.ordered([site], batch_images=batch_images):
        parts.append(batch.activations[site].flatten(0, 1))
        if sum(map(len, parts)) >= INIT_SAMPLE:
            break
    if not parts:
        raise UserError("There are no activations to compare names with: no image was read.")
    return torch.cat(parts)[:INIT_SAMPLE].float()
