"""What is known about images without opening them: ids, origins, labels, captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from sparsight.activations import ActivationSource, ActivationStore
from sparsight.latents.codes import CodeStore

_COLUMNS = ("id", "uri", "label", "caption")


@dataclass(frozen=True)
class ImageRecords:
    """The images of activations or codes.

    Attributes:
        spec: the argument of `open_images`.
        fingerprint: fingerprint of the source at that time.
        n_images: number of images in the source, failed ones included.
        table: function from places in the source to a table with one row per image: `image` (its
            place), `id`, `uri`, `label`, `caption`.
    """

    spec: str
    fingerprint: str
    n_images: int
    table: Callable[[Int64[np.ndarray, " images"]], pa.Table]


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

    def asked(places: Int64[np.ndarray, " images"]) -> pa.Table:
        infos = [source.known(place) for place in places.tolist()]
        columns = {name: [getattr(info, name) for info in infos] for name in _COLUMNS}
        return _table(places, columns)

    return ImageRecords(source.spec, source.fingerprint(), len(source), asked)


def _recorded(about: dict[str, Any], table: pa.Table) -> ImageRecords:
    def recorded(places: Int64[np.ndarray, " images"]) -> pa.Table:
        rows = table.take(pa.array(places))
        return _table(places, {name: rows[name].combine_chunks() for name in _COLUMNS})

    return ImageRecords(about["spec"], about["fingerprint"], about["n_images"], recorded)


def _table(places: Int64[np.ndarray, " images"], columns: dict[str, Any]) -> pa.Table:
    texts = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    return pa.table({"image": pa.array(places, pa.int64()), **texts})
