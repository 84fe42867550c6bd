"""Statistics of every latent from one pass over codes, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from sparsight.errors import SparsightError
from sparsight.latents.code_shards import CodeBatch
from sparsight.latents.image_maxima import ImageMaxima, image_maxima
from sparsight.latents.postings import PostingSpool
from sparsight.latents.spatial import SPATIAL_IMAGES, SpatialStatistics

MIN_IMAGES_FOR_ENTROPY = 10


class LatentStatistics:
    """Counts and sums of every latent, batch by batch; its images go to a spool.

    An image counts once per latent: with its strongest activation, at the first token that has it.

    Args:
        n_latents: number of latents.
        spool: takes the images in which each latent fires.
        n_prefix: number of tokens before the first patch that the SAE reads (CLS, registers).
        grid: rows and columns of patches, if the SAE reads patches.
        expected_images: number of images of the whole pass, for an even choice of those from which
            spatial statistics are taken.
        device: device of the codes.

    Attributes:
        n_images: number of images.
        n_vectors: number of vectors.
        n_active: number of vectors on which each latent is active.
        n_active_prefix: how many of these are prefix tokens.
        n_active_images: number of images in which it fires.
        sum: sum of its activations over all vectors, float64.
        spatial: Moran's I; None without patches.
    """

    def __init__(
        self,
        n_latents: int,
        spool: PostingSpool,
        *,
        n_prefix: int = 0,
        grid: tuple[int, int] | None = None,
        expected_images: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.n_latents = n_latents
        self.spool = spool
        self.n_prefix = n_prefix
        self.n_images = 0
        self.n_vectors = 0
        self.n_active = torch.zeros(n_latents, dtype=torch.int64)
        self.n_active_prefix = torch.zeros(n_latents, dtype=torch.int64)
        self.n_active_images = torch.zeros(n_latents, dtype=torch.int64)
        self.sum = torch.zeros(n_latents, dtype=torch.float64)
        self.spatial = None if grid is None else SpatialStatistics(n_latents, grid, device)
        self._stride = max(1, -(-expected_images // SPATIAL_IMAGES))

    def add(self, batch: CodeBatch) -> None:
        """Add the codes of images, in order.

        Raises:
            SparsightError: an activation is NaN or infinite.
        """
        code, images, n_tokens = batch.code, batch.image_indices, batch.n_tokens
        if len(code) != len(images) * n_tokens:
            raise ValueError(f"{len(code)} rows for {len(images)} images of {n_tokens} tokens")
        values = code.values.float()
        if not bool(torch.isfinite(values).all()):
            raise SparsightError(
                f"A latent's activation is NaN or infinite in images {int(images[0])} to "
                f"{int(images[-1])}. The SAE's weights or the activations are damaged."
            )
        first_image = self.n_images
        self.n_images += len(images)
        self.n_vectors += len(code)
        if not len(values):
            return
        maxima = image_maxima(code, n_tokens)
        token, values = (code.rows % n_tokens)[maxima.order], values[maxima.order]
        if self.spatial is not None:
            self._add_spatial(maxima, token, values, n_tokens, first_image)
        lengths = maxima.lengths
        sums = torch.segment_reduce(values.double(), "sum", lengths=lengths).cpu()
        prefix = (token < self.n_prefix).long()
        n_prefix = torch.zeros_like(lengths).index_add_(0, maxima.pair, prefix).cpu()
        latent = maxima.latent.cpu()
        self.n_active.index_add_(0, latent, lengths.cpu())
        self.n_active_prefix.index_add_(0, latent, n_prefix)
        self.n_active_images += latent.bincount(minlength=self.n_latents)
        self.sum.index_add_(0, latent, sums)
        image = images.cpu()[maxima.image.cpu()]
        self.spool.add(image, latent, maxima.value.cpu(), maxima.token.cpu())

    def _add_spatial(
        self,
        maxima: ImageMaxima,
        token: Int[Tensor, " entries"],
        values: Float32[Tensor, " entries"],
        n_tokens: int,
        first_image: int,
    ) -> None:
        """Add the patches of every `_stride`-th image."""
        assert self.spatial is not None
        patch = token - (n_tokens - self.spatial.n_patches)
        image = first_image + maxima.image[maxima.pair]
        taken = (patch >= 0) & (image % self._stride == 0)
        self.spatial.add(maxima.latent, maxima.pair[taken], patch[taken], values[taken].double())


@dataclass(frozen=True)
class LabelMixture:
    """The labels of a latent's strongest images.

    Attributes:
        entropy: H = −Σ p ln p over labels, p_l = Σ f of label l / Σ f, in nats; None with fewer
            than `MIN_IMAGES_FOR_ENTROPY` labelled images.
        label: the label with the largest share; None if no image has a label.
        share: its share p_l.
    """

    entropy: float | None = None
    label: str | None = None
    share: float | None = None


def label_mixture(
    images: Sequence[int], activations: Sequence[float], labels: Mapping[int, str | None]
) -> LabelMixture:
    """Mix the labels of one latent's strongest images; images without a label are left out."""
    weight: dict[str, float] = {}
    n = 0
    for image, activation in zip(images, activations, strict=True):
        label = labels.get(image) if image >= 0 else None
        if label is not None:
            # Some sparsities allow negative activations, which do not count for a label.
            weight[label] = weight.get(label, 0.0) + max(activation, 0.0)
            n += 1
    total = math.fsum(weight.values())
    if not total:
        return LabelMixture()
    label = min(weight, key=lambda name: (-weight[name], name))
    share = weight[label] / total
    if n < MIN_IMAGES_FOR_ENTROPY:
        return LabelMixture(None, label, share)
    shares = [value / total for value in weight.values() if value > 0]
    entropy = max(0.0, -math.fsum(p * math.log(p) for p in shares))
    return LabelMixture(entropy, label, share)
