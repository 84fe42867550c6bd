"""Describe how images differ from those that something was made from."""

from __future__ import annotations

from collections.abc import Sequence

from sparsight.images.decoding import ImageError
from sparsight.images.source import ImageSource


def images_difference(images: ImageSource, n_images: int, ids: Sequence[str] = ()) -> str:
    """Describe how a source with a new fingerprint differs from what it was.

    Args:
        images: the source now.
        n_images: how many images it had then.
        ids: the ids of the first images, as far as they are known.
    """
    if len(images) != n_images:
        return f"{n_images:,} images then, {len(images):,} now"
    for place, known in enumerate(ids):
        try:
            now = images.info(place).id
        except ImageError:
            continue
        if now != known:
            return f"image {place} was {known!r} then and is {now!r} now"
    same = "the same ids" if len(ids) == n_images else "as many images"
    return f"{same}, but sizes, times, labels or captions of some have changed"
