"""Decode the bytes of an image file to an upright 8-bit RGB image, or say why that fails."""

from __future__ import annotations

import io
import stat
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from sparsight.errors import SparsightError
from sparsight.text import without_surrogates

_AVIF = features.check("avif")

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *(("AVIF",) if _AVIF else ()))
"""Formats that Pillow may recognise. JPEG includes phones' MPO, of which the first frame counts."""

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", *((".avif",) if _AVIF else ())}
)
"""File name endings, in lower case, of files that are taken for images."""

MAX_PIXELS = 100_000_000
"""An image whose header declares more pixels is refused before anything is decoded."""

MAX_BYTES = 256 * 2**20
"""A larger file is refused before it is read."""

MAX_DECODED_BYTES = 2**30
"""Decoding one image never takes more memory than this, in addition to the file."""

SMALL_DECODED_BYTES = 256 * 2**20
"""The limit if `MAX_RATIO` times the file is less: a file of a few kB must not unfold to a
gigabyte, but a photo of 100 million pixels may."""

MAX_RATIO = 400

_STRIP_PIXELS = 2**20
"""Larger images are converted in strips of about this many pixels, to keep intermediates small."""

_DECODER_BYTES = {"WEBP": 12, "AVIF": 8}
"""Bytes per pixel that a decoder keeps in addition to the pixels that it returns."""

_SCANS_BYTES = 6
"""Bytes per pixel of the coefficients of a JPEG in several scans, kept until the last scan."""

_TIFF_TILE, _TIFF_STRIP, _TIFF_BITS = (322, 323), 278, 258
_START_OF_SCAN = b"\xff\xda"
_PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
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
_SIDEWAYS = (5, 6, 7, 8)


class ImageError(SparsightError):
    """An image cannot be used; `reason` says why. It is recorded and counted, never fatal."""

    def __init__(self, reason: str) -> None:
        reason = without_surrogates(reason)
        super().__init__(reason)
        self.reason = reason


def read_image_file(path: Path) -> bytes:
    """Read the bytes of an image file.

    Raises:
        ImageError: the file is missing, unreadable, not a regular file, or above `MAX_BYTES`.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait forever
            raise ImageError("not a regular file")
        check_bytes(status.st_size)
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror or error})") from error


def check_bytes(size: int) -> None:
    """Refuse an encoded image of `size` bytes if it is empty or above `MAX_BYTES`."""
    if size == 0:
        raise ImageError("the file is empty")
    if size > MAX_BYTES:
        raise ImageError(f"{size:,} bytes are over the limit of {MAX_BYTES:,}")


def decode_image(data: bytes, min_side: int | None = None) -> Image.Image:
    """Decode an image to RGB with 8 bits per channel, turned upright according to its EXIF tag.

    With `min_side`, a JPEG is decoded at an eighth, a quarter or half of its size (libjpeg's scaled
    inverse DCT), which is several times faster, if its shorter side keeps at least `min_side`
    pixels and the factor divides both sides; otherwise a fraction of a pixel would be left over and
    all others shifted. `whole_size` returns the original size.

    Transparent images are composited over white. 16-bit greyscale is scaled to 8 bits. CMYK and
    other
    colour models are converted by Pillow's formulas, without colour profiles.

    In addition to the file, decoding takes at most `MAX_RATIO` times the size of the file, or
    `SMALL_DECODED_BYTES` if that is more, and never more than `MAX_DECODED_BYTES`.

    Raises:
        ImageError: the image is empty, too large, declared above `MAX_PIXELS`, of an unknown
            format, truncated or otherwise broken; or decoding would take too much memory.
    """
    check_bytes(len(data))
    try:
        with warnings.catch_warnings():
            # Pillow warns about odd metadata, and about sizes below the limit that is checked here.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > MAX_PIXELS:
                    raise _too_many_pixels(f"{width} × {height} pixels")
                if min_side is not None:
                    _scale_jpeg(opened, min_side)
                _check_memory(opened, data, (width, height))
                opened.load()
                image, orientation = _to_rgb(opened), _orientation(opened)
                scaled = opened.size != (width, height)
            # The file's own pixels are freed here.
            del opened
            turned = orientation in _UPRIGHT
            image = image.transpose(_UPRIGHT[orientation]) if turned else image
            if scaled:
                sideways = orientation in _SIDEWAYS
                image.info[_WHOLE_SIZE] = (height, width) if sideways else (width, height)
            return image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not an image in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise _too_many_pixels("the declared size") from None
    except Exception as error:  # Pillow's plugins raise nearly anything on hostile bytes
        raise ImageError(f"cannot be decoded ({error or type(error).__name__})") from error


def whole_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an upright image, before a JPEG was scaled."""
    width, height = image.info.get(_WHOLE_SIZE, image.size)
    return width, height


def _scale_jpeg(opened: Image.Image, min_side: int) -> None:
    """Make Pillow decode a JPEG at the smallest size that is enough."""
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


def _check_memory(opened: Image.Image, data: bytes, whole: tuple[int, int]) -> None:
    """Refuse an image whose decoding would take more memory than its file allows.

    Args:
        opened: not decoded yet; a JPEG may already be set to be scaled.
        data: the file.
        whole: width and height before scaling.

    Raises:
        ImageError: it would take more.
    """
    width, height = opened.size
    per_pixel = _PIXEL_BYTES.get(opened.mode, 4) + (0 if opened.mode == "RGB" else 4)
    if _may_be_turned(opened):
        per_pixel = max(per_pixel, 8)
    needed = width * height * (per_pixel + _DECODER_BYTES.get(str(opened.format), 0))
    if opened.format in ("JPEG", "MPO") and data.count(_START_OF_SCAN) > 1:
        needed += whole[0] * whole[1] * _SCANS_BYTES
    needed += _tiff_block(opened)
    by_file = 0 if _beyond_screen(opened, data) else MAX_RATIO * len(data)
    allowed = min(MAX_DECODED_BYTES, max(SMALL_DECODED_BYTES, by_file))
    if needed > allowed:
        raise ImageError(
            f"{width} × {height} pixels in {len(data):,} bytes: decoding would take "
            f"{needed / 2**20:,.0f} MiB, but the limit for such a file is "
            f"{allowed / 2**20:,.0f} MiB"
        )


def _beyond_screen(opened: Image.Image, data: bytes) -> bool:
    """Return whether a GIF's frame is larger than the screen that its header declares."""
    if opened.format != "GIF":
        return False
    width, height = struct.unpack_from("<HH", data, 6)
    return bool(opened.width > width or opened.height > height)


def _may_be_turned(opened: Image.Image) -> bool:
    if opened.format == "TIFF":
        return _tags(opened).get(_ORIENTATION_TAG) in _UPRIGHT
    return "exif" in opened.info


def _tiff_block(opened: Image.Image) -> int:
    """Return the bytes of the strip or tile that libtiff unpacks at once."""
    if opened.format != "TIFF":
        return 0
    tags, (width, height) = _tags(opened), opened.size
    across, down = (tags.get(tag) for tag in _TIFF_TILE)
    if not across or not down:
        across, down = width, min(height, int(tags.get(_TIFF_STRIP) or height))
    bits = tags.get(_TIFF_BITS) or (8,)
    return int(across) * int(down) * max(4, sum(bits) // 8)


def _tags(opened: Image.Image) -> Mapping[int, Any]:
    return getattr(opened, "tag_v2", {})


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image._new(image.im)  # the pixels themselves, without the file that they came from
    if image.mode in ("I", "F") and not (image.mode == "I" and image.format in ("PNG", "PPM")):
        raise ImageError(f"{image.mode}-mode pixels (32 bits) have no agreed range")
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // max(1, width))
    if rows >= height:
        return _converted(image)
    whole = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        whole.paste(_converted(image.crop(box)), box)
    whole.info = image.info.copy()
    return whole


def _converted(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        sixteen_bits = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((sixteen_bits + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _orientation(opened: Image.Image) -> int:
    """Return the EXIF orientation of the image; 1 if there is none."""
    try:
        return int(opened.getexif().get(_ORIENTATION_TAG) or 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1
