"""What one call of `extract` did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExtractionSummary:
    """What one call of `extract` did; a continued extraction counts only its own part.

    Attributes:
        images: number of images that went through the model.
        failed: number of images that could not be read, including those of earlier calls.
        seconds: wall time.
        seconds_in_forward: wall time of the model's forward pass.
    """

    images: int
    failed: int
    seconds: float
    seconds_in_forward: float

    @property
    def forward_share(self) -> float:
        """The share of the wall time that the model's forward pass took."""
        return self.seconds_in_forward / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        text = (
            f"{self.images:,} images in {self.seconds:,.1f} s, {self.forward_share:.0%} of it in "
            "the model"
        )
        if self.failed:
            text += f" · {self.failed:,} could not be read, see images.parquet for the reasons"
        return text
