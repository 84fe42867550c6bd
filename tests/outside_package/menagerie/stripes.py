"""An image source: `stripes:N`, N images of stripes that get wider."""

from __future__ import annotations

import hashlib

from PIL import Image

from sparsight.errors import UserError
from sparsight.images import ImageInfo, ImageSource

SIDE = 64


class Stripes(ImageSource):
    """Black and white stripes, `index + 1` pixels wide."""

    def __init__(self, n_images: int) -> None:
        self.n_images = n_images
        self.spec = f"stripes:{n_images}"

    def __len__(self) -> int:
        return self.n_images

    def info(self, index: int) -> ImageInfo:
        """Its label says how wide the stripes are."""
        width = self._check_index(index) + 1
        return ImageInfo(id=f"{width}", uri=f"{self.spec}/{width}", label=f"{width} wide")

    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        """Draw the image; it is small, so `min_side` changes nothing."""
        width = self._check_index(index) + 1
        row = bytes(255 * (x // width % 2) for x in range(SIDE))
        return Image.frombytes("L", (SIDE, SIDE), row * SIDE).convert("RGB")

    def fingerprint(self) -> str:
        """The same for the same number of images."""
        return hashlib.sha256(self.spec.encode()).hexdigest()


def open_stripes(spec: str) -> Stripes:
    """Open `stripes:N`."""
    number = spec.removeprefix("stripes:")
    if not number.isdecimal() or int(number) == 0:
        raise UserError(f"{spec!r}: expected stripes:N, N the number of images.")
    return Stripes(int(number))
