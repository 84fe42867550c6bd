"""Statistics of every latent from one pass over codes, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.errors import SparsightError
from sparsight.latents.examples import EMPTY, ExampleTable, lottery_rank, strength_rank
from sparsight.sae import SparseCode

MIN_IMAGES_FOR_ENTROPY = 10


class LatentStatistics:
    """Density, activations and examples of every latent, batch by batch.

    An image counts once per latent: with its strongest activation, at the first token that has it.

    Args:
        n_latents: number of latents.
        top_n: number of strongest images to keep per latent.
        sample_size: number of images to keep per latent as a random sample of those on which it is
            active.
        seed: seed of the sample.
        device: device of the codes.
    """

    def __init__(
        self,
        n_latents: int,
        *,
        top_n: int,
        sample_size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.n_latents = n_latents
        self.seed = seed
        self.n_images = 0
        self.n_vectors = 0
        self.n_active = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.n_active_images = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.sum = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self.top = ExampleTable(n_latents, top_n, device)
        self.sample = ExampleTable(n_latents, sample_size, device)

    def add(self, code: SparseCode, images: Int[Tensor, " batch"], n_tokens: int) -> None:
        """Add the code of `len(images) × n_tokens` vectors, grouped by image.

        Raises:
            SparsightError: an activation is NaN or infinite.
        """
        if len(code) != len(images) * n_tokens:
            raise ValueError(f"{len(code)} rows for {len(images)} images of {n_tokens} tokens")
        values = code.values.float()
        if not bool(torch.isfinite(values).all()):
            raise SparsightError(
                f"A latent's activation is NaN or infinite in images {int(images[0])} to "
                f"{int(images[-1])}. The SAE's weights or the activations are damaged."
            )
        self.n_images += len(images)
        self.n_vectors += len(code)
        if not len(values):
            return
        images = images.to(values.device)
        pair = code.indices * len(images) + code.rows // n_tokens
        token = code.rows % n_tokens

        # By latent, then image, then strength; among equals the first token, as the sort is stable.
        order = ((pair << 32) + strength_rank(values)).argsort(stable=True)
        pair, values, token = pair[order], values[order], token[order]
        latent = pair // len(images)
        active, counts = latent.unique_consecutive(return_counts=True)
        self.n_active[active] += counts
        self.sum[active] += torch.segment_reduce(values.double(), "sum", lengths=counts)

        first = torch.ones_like(pair, dtype=torch.bool)
        first[1:] = pair[1:] != pair[:-1]
        latent, image = latent[first], images[pair[first] % len(images)]
        token, strongest = token[first], values[first]
        active, counts = latent.unique_consecutive(return_counts=True)
        self.n_active_images[active] += counts
        self.top.offer(latent, strength_rank(strongest), image, token, strongest)
        ticket = lottery_rank(latent, image, self.seed)
        self.sample.offer(latent, ticket, image, token, strongest)


@dataclass(frozen=True)
class Examples:
    """Images, tokens and activations of examples; empty places have image −1 and activation 0.

    The strongest: `[n_latents, top_n]`, strongest first. A sample: `[n_latents, quantiles,
        samples]`, the strongest band first.
    """

    image: Int[Tensor, "n_latents ..."]
    token: Int[Tensor, "n_latents ..."]
    activation: Float[Tensor, "n_latents ..."]


def quantile_samples(sample: ExampleTable, quantiles: int, per_quantile: int) -> Examples:
    """Split each latent's sample into `quantiles` bands of equal size and thin out each band.

    The sample is a random part of the images on which the latent is active, so its quantiles
    estimate theirs (and equal theirs if it holds all of them). Each band gives `per_quantile`
    evenly spaced images, or all if it has fewer.
    """
    n_latents, size = sample.image.shape
    device = sample.image.device
    here = sample.image >= 0
    strength = torch.where(here, strength_rank(sample.activation.flatten()).view_as(here), EMPTY)
    order = sample.image.argsort(dim=1, stable=True)
    order = order.gather(1, strength.gather(1, order).argsort(dim=1, stable=True))
    count = here.sum(dim=1, keepdim=True)

    band = torch.arange(quantiles, device=device)
    start = (band * count + quantiles - 1) // quantiles  # [n_latents, quantiles]
    stop = ((band + 1) * count + quantiles - 1) // quantiles
    width = (stop - start)[..., None]
    slot = torch.arange(per_quantile, device=device)
    # Middles of equal parts of the band; a band with fewer than `per_quantile` gives all.
    place = torch.where(
        width > per_quantile,
        (2 * slot + 1) * width // (2 * per_quantile),
        slot.expand_as(width * slot),
    )
    there = place < width
    place = (start[..., None] + place).clamp(max=size - 1).flatten(1)
    chosen = order.gather(1, place)
    shape = (n_latents, quantiles, per_quantile)

    def taken(values: Tensor, nothing: int) -> Tensor:
        return values.gather(1, chosen).view(shape).masked_fill(~there, nothing)

    return Examples(taken(sample.image, -1), taken(sample.token, -1), taken(sample.activation, 0))


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
