"""Images that could not be read: count them, and stop when there are too many."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsight.errors import SparsightError, UserError

_REASONS_KEPT = 5


@dataclass
class FailureTally:
    """How many of `n_images` images failed, and why the first ones did.

    Attributes:
        n_images: total number of images.
        max_failed: largest share of them that may fail, 0 to 1.
        count: number of images that failed.
        reasons: ids and reasons of the first five.
    """

    n_images: int
    max_failed: float
    count: int = 0
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.max_failed <= 1:
            raise UserError(f"max_failed is {self.max_failed}; it is a share, from 0 to 1.")

    def add(self, image_id: str, reason: str) -> None:
        """Count one failed image."""
        self.count += 1
        self.note(image_id, reason)

    def note(self, image_id: str, reason: str) -> None:
        """Keep the reason of an image that has already been counted."""
        if len(self.reasons) < _REASONS_KEPT:
            self.reasons.append(f"{image_id}: {reason}")

    def check(self, patience: int = 0) -> None:
        """Stop if more images failed than may fail, and more than `patience`.

        Raises:
            SparsightError: too many images failed; the message gives the first reasons.
        """
        if self.count > max(self.max_failed * self.n_images, patience):
            raise SparsightError(
                f"{self.count:,} of {self.n_images:,} images could not be read, more than "
                f"max_failed = {self.max_failed:g} allows. The first: {'; '.join(self.reasons)}. "
                "Repair or remove them, or raise max_failed."
            )
