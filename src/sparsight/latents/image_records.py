"""What is known about images without opening them: ids, origins, labels, captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sparsight.activations import ActivationSource, ActivationStore
from sparsight.images import ImageInfo
from sparsight.latents.codes import CodeStore


@dataclass(frozen=True)
class ImageRecords:
    """The images of activations or codes.

    Attributes:
        spec: the argument of `open_images`.
        fingerprint: fingerprint of the source at that time.
        n_images: number of images in the source, failed ones included.
        info: function from an image's place in the source to what is known about it.
    """

    spec: str
    fingerprint: str
    n_images: int
    info: Callable[[int], ImageInfo]


def image_records(given: ActivationSource | CodeStore) -> ImageRecords:
    """Return what a store recorded about its images, which may be gone; else ask the images.

    Raises:
        UserError: nothing was recorded, and the images no longer exist.
    """
    if isinstance(given, ActivationStore):
        return _recorded(given.manifest.images, given.images)
    if isinstance(given, CodeStore) and given.images is not None:
        return _recorded(given.manifest.images, given.images)
    source = given.source()
    return ImageRecords(source.spec, source.fingerprint(), len(source), source.known)


def _recorded(about: dict[str, Any], table: pa.Table) -> ImageRecords:
    def info(image: int) -> ImageInfo:
        row = table.slice(image, 1).to_pylist()[0]
        return ImageInfo(row["id"], row["uri"], row["label"], row["caption"])

    return ImageRecords(about["spec"], about["fingerprint"], about["n_images"], info)
