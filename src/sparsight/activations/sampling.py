"""The activations of a random sample of the images."""

from __future__ import annotations

from typing import cast

from sparsight.activations.source import ActivationSource
from sparsight.activations.split import Selectable
from sparsight.config import check_positive
from sparsight.images import sample_places


def sampled(source: ActivationSource, n_images: int | None, seed: int = 0) -> ActivationSource:
    """Return a view of `n_images` images drawn at random, in the order of the source.

    The first images would not do: where images are sorted by class, they show the first classes
    only.

    Args:
        source: a store or live activations; any other source is returned unchanged.
        n_images: number of images; None, or more than there are, takes all.
        seed: seed of the draw.
    """
    check_positive(max_images=n_images)
    if n_images is None or n_images >= source.n_images or not isinstance(source, Selectable):
        return source
    chosen = sample_places(len(source.image_indices), n_images, seed)
    return cast(ActivationSource, source.select(source.image_indices[chosen]))
