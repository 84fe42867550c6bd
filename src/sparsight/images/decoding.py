"""From the bytes of a picture file to an upright 8-bit RGB image, or a reason why not."""

from __future__ import annotations

import io
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from sparsight.errors import SparsightError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may recognise. JPEG includes the MPO of phones; of many frames the first counts."""

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)
"""File name endings, in lower case, that are taken for pictures."""

MAX_PIXELS = 100_000_000
"""A header that declares more pixels than this is refused before anything is decoded."""

MAX_BYTES = 256 * 2**20
"""A larger file is refused before it is read."""

_ORIENTATION_TAG = 0x0112
_WHOLE_SIZE = "sparsight_whole_size"
_JPEG_FACTORS = (8, 4, 2)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(SparsightError):
    """One picture cannot be used; `reason` says why. Recorded and counted, never fatal."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def read_picture(path: Path) -> bytes:
    """The bytes of a picture file.

    Raises:
        ImageError: the file is missing, unreadable, not a regular file, or above `MAX_BYTES`.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise ImageError("not a regular file")
        check_bytes(status.st_size)
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror or error})") from error


def check_bytes(size: int) -> None:
    """Refuse an encoded picture of `size` bytes that is empty or above `MAX_BYTES`."""
    if size == 0:
        raise ImageError("the file is empty")
    if size > MAX_BYTES:
        raise ImageError(f"{size:,} bytes are over the limit of {MAX_BYTES:,}")


def decode_image(data: bytes, min_side: int | None = None) -> Image.Image:
    """Decode a picture to RGB, 8 bits a channel, turned upright as its EXIF says.

    With `min_side`, a JPEG is decoded at an eighth, a quarter or half of its size (libjpeg's scaled
    inverse DCT), which is several times faster, where its shorter side keeps so many pixels and the
    factor divides both sides: elsewhere a part of a pixel would be left over, and all others
    shifted. `whole_size` tells the size that it had.

    Transparent pictures are laid over white. 16-bit greyscale is scaled to 8 bits. CMYK and other
    colour models are converted by Pillow's formulas, without colour profiles.

    Raises:
        ImageError: empty, too large, declared above `MAX_PIXELS`, of no known format, truncated,
            or otherwise broken.
    """
    check_bytes(len(data))
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, and of sizes under the limit that is checked below.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > MAX_PIXELS:
                    raise _too_many_pixels(f"{width} × {height} pixels")
                if min_side is not None:
                    _scale_jpeg(opened, min_side)
                opened.load()
                picture = _upright(_to_rgb(opened), opened)
                if opened.size != (width, height):
                    turned = picture.size != opened.size and picture.size == opened.size[::-1]
                    picture.info[_WHOLE_SIZE] = (height, width) if turned else (width, height)
                return picture
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not a picture in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise _too_many_pixels("the declared size") from None
    except Exception as error:  # Pillow's plugins raise nearly anything on hostile bytes
        raise ImageError(f"cannot be decoded ({error or type(error).__name__})") from error


def whole_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height of an upright picture, before a JPEG was scaled."""
    width, height = picture.info.get(_WHOLE_SIZE, picture.size)
    return width, height


def _scale_jpeg(opened: Image.Image, min_side: int) -> None:
    """Have a JPEG that is not decoded yet decoded at the least size that is enough."""
    if opened.format not in ("JPEG", "MPO"):
        return
    width, height = opened.size
    for factor in _JPEG_FACTORS:
        fits = width % factor == 0 and height % factor == 0
        if fits and min(width, height) // factor >= min_side:
            opened.draft(None, (width // factor, height // factor))
            return


def _too_many_pixels(what: str) -> ImageError:
    return ImageError(f"{what} is over the limit of {MAX_PIXELS:,} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        sixteen_bits = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((sixteen_bits + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"{image.mode}-mode pixels (32 bits) have no agreed range")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image, opened: Image.Image) -> Image.Image:
    try:
        orientation = opened.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
