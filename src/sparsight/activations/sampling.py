"""The activations of a random sample of the images."""

from __future__ import annotations

from sparsight.activations.live import LiveActivations
from sparsight.activations.source import ActivationSource
from sparsight.activations.store import ActivationStore
from sparsight.config import check_positive
from sparsight.images import sample_places


def sampled(source: ActivationSource, n_images: int | None, seed: int = 0) -> ActivationSource:
    """A view of `n_images` images drawn at random, in the order of the source.

    Of images that lie class by class, the first are those of the first classes.

    Args:
        source: a store or live activations; others are given back as they are.
        n_images: None: all; all, too, if there are no more.
        seed: of the draw.
    """
    check_positive(max_images=n_images)
    if n_images is None or n_images >= source.n_images:
        return source
    if isinstance(source, ActivationStore):
        chosen = sample_places(source.n_images, n_images, seed)
        return source.select(source.image_indices[chosen])
    if isinstance(source, LiveActivations):
        return LiveActivations(
            source.model,
            source.images.sample(n_images, seed),
            source.sites,
            source.tokens,
            batch_size=source.batch_size,
            workers=source.workers,
            window_bytes=source.window_bytes,
            statistics_images=source.statistics_images,
            max_failed=source.max_failed,
        )
    return source
