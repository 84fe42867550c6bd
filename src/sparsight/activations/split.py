"""Images that are held out of training, so that an SAE can be measured on unseen images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
from jaxtyping import Int64

from sparsight.activations.source import ActivationSource
from sparsight.config import check_seed
from sparsight.errors import UserError
from sparsight.images import whole_spec

_SCENES = re.compile(r"(?<=^calibration:)\d+:")
"""Matches the number of scenes of a calibration world: a larger world contains a smaller one."""


@runtime_checkable
class Selectable(Protocol):
    """Activations that can be restricted to some images, as stores and live activations can."""

    image_indices: Any
    """The place in the source of each image here, in order."""

    @property
    def n_listed(self) -> int:
        """The number of images of the whole source, including those that could not be read."""

    def select(self, image_indices: Sequence[int] | npt.NDArray[np.int64]) -> Self:
        """Return a view of some images, given by their places in the source."""


@dataclass(frozen=True)
class HeldOut:
    """Which images are held out; from the same source, always the same ones.

    Attributes:
        share: share of all images that is held out, between 0 and 1.
        seed: seed of the random choice.
        n_images: number of images that the source must have; None accepts any.

    Raises:
        UserError: a number is out of range.
    """

    share: float
    seed: int = 0
    n_images: int | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed, "held_out_seed")
        if not 0 < self.share < 1:
            raise UserError(
                f"held_out is {self.share}; it is a share of the images, above 0 and below 1."
            )

    @classmethod
    def of(cls, given: HeldOut | float | None) -> HeldOut | None:
        """Turn a share into a `HeldOut`; return anything else unchanged."""
        return cls(given) if isinstance(given, int | float) else given

    def places(self, n_images: int) -> Int64[np.ndarray, " held_out"]:
        """Return the places of the held-out images in a source of `n_images`, in order.

        They follow from share, seed and number of images alone.

        Raises:
            UserError: there are fewer than two images.
        """
        if n_images < 2:
            raise UserError(f"held_out: {n_images} images are too few to hold some out.")
        n = min(max(1, round(self.share * n_images)), n_images - 1)
        return np.sort(np.random.default_rng(self.seed).permutation(n_images)[:n])

    def split(self, source: ActivationSource) -> tuple[ActivationSource, ActivationSource]:
        """Return two views of some activations: one to train on, and one that is held out.

        Raises:
            UserError: the activations cannot be split by images, one part would be empty, or the
                source does not have `n_images` images.
        """
        if not isinstance(source, Selectable):
            raise UserError("held_out: these activations cannot be split by images; leave it out.")
        if self.n_images not in (None, source.n_listed):
            raise UserError(
                f"held_out: the images were chosen among {self.n_images:,}, but this source has "
                f"{source.n_listed:,}, so it is unknown which of them were held out. Leave it "
                "out, or give the same images."
            )
        there = np.asarray(source.image_indices)
        held = np.isin(there, self.places(source.n_listed))
        if held.all() or not held.any():
            raise UserError(
                f"held_out is {self.share}: of {len(there):,} images {held.sum():,} would be held "
                "out. Give another share, or more images."
            )
        views = source.select(there[~held]), source.select(there[held])
        return cast(tuple[ActivationSource, ActivationSource], views)

    def to_metadata(self, source: ActivationSource) -> dict[str, Any]:
        """Return what an SAE's metadata say: `share`, `seed` and the whole source's `n_images`."""
        assert isinstance(source, Selectable)
        return {"share": self.share, "seed": self.seed, "n_images": source.n_listed}


def held_out_of(metadata: Mapping[str, Any]) -> HeldOut | None:
    """Return what was held out of an SAE's training according to its metadata; None if nothing."""
    about = metadata.get("held_out")
    return None if about is None else HeldOut(about["share"], about["seed"], about["n_images"])


def seen_in_training(metadata: Mapping[str, Any], source: ActivationSource) -> bool | None:
    """Return whether an SAE was trained on images on which it is to be measured.

    Args:
        metadata: the SAE's metadata.
        source: the activations on which it is to be measured.

    Returns:
        True if images of this source were among those trained on; False if all of them were held
        out or belong to another source; None if this cannot be known, e.g. for two different
        selections from one source.
    """
    trained, own = metadata.get("images"), source.model_info.get("images")
    if not trained or not own:
        return None
    held_out = held_out_of(metadata)
    if trained != own:
        wholes = whole_spec(trained), whole_spec(own)
        if len({_SCENES.sub("", whole) for whole in wholes}) > 1:
            return False
        return True if held_out is None and {trained} == {*wholes} else None
    if held_out is None:
        return True
    if not isinstance(source, Selectable) or source.n_listed != held_out.n_images:
        return None
    places = held_out.places(source.n_listed)
    return not np.isin(np.asarray(source.image_indices), places).all()
