from __future__ import annotations

import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from picture_files import encoded, picture, pixels, png_that_declares
from PIL import Image, ImageFile

from sparsight.images import ImageError, decode_image, decoding, open_images


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_pixels_back(kind: str) -> None:
    assert (pixels(decode_image(encoded(picture(), kind))) == pixels(picture())).all()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_come_close(kind: str) -> None:
    decoded = decode_image(encoded(picture(), kind, quality=95))
    assert np.abs(pixels(decoded) - pixels(picture())).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation: int) -> None:
    as_stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[::-1],  # shown turned clockwise
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    upright = np.asarray(picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "WEBP"):
        stored = Image.fromarray(np.ascontiguousarray(as_stored(upright)))
        data = encoded(stored, kind, exif=exif.tobytes(), lossless=True)
        assert (pixels(decode_image(data)) == upright).all()


@pytest.mark.parametrize(
    ("size", "min_side", "expected"),
    [
        ((320, 160), None, (320, 160)),
        ((320, 160), 20, (40, 20)),
        ((320, 160), 21, (80, 40)),
        ((320, 160), 80, (160, 80)),
        ((320, 160), 81, (320, 160)),
        ((324, 164), 10, (81, 41)),  # 8 does not divide them
        ((321, 160), 10, (321, 160)),
    ],
)
def test_a_jpeg_is_decoded_at_the_least_size_that_is_enough_and_divides_it(
    size: tuple[int, int], min_side: int | None, expected: tuple[int, int]
) -> None:
    large = picture().resize(size, Image.Resampling.BICUBIC)
    data = encoded(large, "JPEG", quality=95)
    found = decode_image(data, min_side)
    assert found.size == expected
    assert decoding.whole_size(found) == size
    box = np.asarray(decode_image(data).resize(expected, Image.Resampling.BOX)).astype(float)
    assert np.abs(pixels(found) - box).mean() < 1
    lossless = decode_image(encoded(large, "PNG"), min_side)
    assert lossless.size == decoding.whole_size(lossless) == size


def test_a_scaled_jpeg_is_turned_upright_and_knows_its_whole_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = picture().resize((320, 160))
    found = decode_image(encoded(stored, "JPEG", exif=exif.tobytes()), 20)
    assert found.size == (20, 40)
    assert decoding.whole_size(found) == (160, 320)
    greyscale = decode_image(encoded(stored.convert("L"), "JPEG"), 20)
    assert (greyscale.mode, decoding.whole_size(greyscale)) == ("RGB", (320, 160))


def test_a_scaled_jpeg_that_is_cut_off_is_an_error_as_well() -> None:
    data = encoded(picture().resize((320, 160)), "JPEG")
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(data[: len(data) // 2], 20)


def test_transparency_is_laid_over_white() -> None:
    layer = np.zeros((4, 4, 4), dtype=np.uint8)
    layer[..., 0] = 200
    layer[:2, :, 3] = 255
    layer[2, :, 3] = 128
    decoded = pixels(decode_image(encoded(Image.fromarray(layer, "RGBA"), "PNG")))
    assert (decoded[0] == [200, 0, 0]).all()
    assert np.abs(decoded[2] - [227, 127, 127]).max() <= 1
    assert (decoded[3] == 255).all()


def test_a_palette_with_a_transparent_colour_is_resolved() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    decoded = pixels(decode_image(encoded(image, "PNG", transparency=1)))
    assert decoded.tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_greyscale_with_alpha_and_one_bit_images_become_rgb() -> None:
    grey = np.full((2, 2, 2), 90, dtype=np.uint8)
    grey[..., 1] = 255
    assert (pixels(decode_image(encoded(Image.fromarray(grey, "LA"), "PNG"))) == 90).all()
    one_bit = Image.new("1", (2, 2), 1)
    assert (pixels(decode_image(encoded(one_bit, "PNG"))) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_greyscale_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    decoded = pixels(decode_image(encoded(Image.fromarray(values), kind)))
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk_jpeg_becomes_rgb() -> None:
    decoded = decode_image(encoded(picture().convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels(decoded) - pixels(picture())).mean() < 8


def test_float_pixels_are_refused_with_a_reason() -> None:
    data = encoded(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF")
    with pytest.raises(ImageError, match="no agreed range"):
        decode_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_a_truncated_image_is_an_image_error_at_any_cut(kind: str) -> None:
    data = encoded(picture(width=64, height=64), kind)
    for cut in range(0, len(data) - 20, max(1, len(data) // 40)):
        with pytest.raises(ImageError):
            decode_image(data[:cut])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_flipped_bits_give_an_image_or_an_image_error_and_nothing_else(kind: str) -> None:
    data = encoded(picture(), kind)
    random = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 4):
            damaged[place] ^= 1 << random.integers(8)
        try:
            assert decode_image(bytes(damaged)).mode == "RGB"
        except ImageError as error:
            assert error.reason


def test_an_empty_file_and_a_renamed_text_say_so() -> None:
    with pytest.raises(ImageError, match="empty"):
        decode_image(b"")
    with pytest.raises(ImageError, match="known format"):
        decode_image(b"these are not pixels")


@pytest.mark.parametrize("side", [10_001, 30_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="over the limit of 100,000,000 pixels"):
            decode_image(png_that_declares(side, side))


def test_a_file_over_the_size_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "big.png"
    with path.open("wb") as file:
        file.truncate(decoding.MAX_BYTES + 1)  # sparse: takes no room
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("was read"))
    with pytest.raises(ImageError, match="over the limit"):
        open_images(tmp_path).load(0)


def _gif_with_a_frame_beyond_its_screen(side: int) -> bytes:
    data = bytearray(encoded(Image.new("P", (side, side)), "GIF"))
    data[6:10] = struct.pack("<HH", 8, 8)
    return bytes(data)


def _tiff_with_a_tile_beyond_its_size(side: int) -> bytes:
    """A TIFF of 8 × 8 pixels in one zipped tile of `side` × `side`."""
    data = zlib.compress(bytes(side * side * 3), 9)
    entries = {256: 8, 257: 8, 258: 8, 259: 8, 262: 2, 277: 3, 322: side, 323: side}
    place = 14 + 12 * (len(entries) + 2)
    entries |= {324: place, 325: len(data)}
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + body + struct.pack("<I", 0) + data


BOMBS = {
    "a plain PNG": lambda side: encoded(Image.new("RGB", (side, side)), "PNG"),
    "a PNG with alpha": lambda side: encoded(Image.new("RGBA", (side, side)), "PNG"),
    "a WebP": lambda side: encoded(Image.new("RGB", (side, side)), "WEBP", lossless=True),
    "a GIF": lambda side: encoded(Image.new("P", (side, side)), "GIF"),
    "a GIF's frame": _gif_with_a_frame_beyond_its_screen,
    "a TIFF's tile": _tiff_with_a_tile_beyond_its_size,
    "a TIFF's strip": lambda side: encoded(
        Image.new("RGB", (side, side)), "TIFF", compression="tiff_lzw", strip_size=side * side * 3
    ),
    "scans of a JPEG": lambda side: encoded(
        Image.new("RGB", (side, side)), "JPEG", progressive=True, subsampling=0
    ),
    "an AVIF": lambda side: encoded(Image.new("RGB", (side, side)), "AVIF", speed=10),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_that_unfolds_to_much_is_refused_before_it_is_decoded(
    bomb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = BOMBS[bomb](1000)
    decode_image(data)
    monkeypatch.setattr(decoding, "SMALL_DECODED_BYTES", 3_000_000)
    monkeypatch.setattr(decoding, "MAX_RATIO", 1)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("was decoded"))
    with pytest.raises(
        ImageError, match=r"decoding would take \d+ MiB, but the limit for such a file"
    ):
        decode_image(data)


@pytest.mark.slow
@pytest.mark.parametrize("bomb", ["a PNG with alpha", "a WebP", "scans of a JPEG", "an AVIF"])
def test_no_image_takes_more_memory_than_is_stated(bomb: str, tmp_path: Path) -> None:
    side = {"a WebP": 3700, "an AVIF": 4400}.get(bomb, 5000)
    path = tmp_path / "image"
    path.write_bytes(BOMBS[bomb](side))
    program = (
        "import sys; from pathlib import Path; from sparsight.images import decode_image\n"
        "from PIL import Image; Image.init()\n"
        "def most(): return int(Path('/proc/self/status').read_text()"
        ".partition('VmHWM:')[2].split()[0])\n"
        "data, before = Path(sys.argv[1]).read_bytes(), most()\n"
        "decode_image(data)\n"
        "print(most() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < decoding.SMALL_DECODED_BYTES * 1.05


def test_a_large_photo_of_many_bytes_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SMALL_DECODED_BYTES", 100_000)
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    for kind in ("JPEG", "PNG", "WEBP", "AVIF"):
        assert decode_image(encoded(Image.fromarray(noise), kind)).size == (300, 300)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "CMYK", "I;16"])
def test_a_large_image_is_converted_in_strips_without_a_seam(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "I;16":
        values = np.random.default_rng(0).integers(0, 2**16, (50, 40), dtype=np.uint16)
        data = encoded(Image.fromarray(values), "PNG")
    else:
        colours = np.random.default_rng(0).integers(0, 256, (50, 40, 4), dtype=np.uint8)
        image = Image.fromarray(colours, "RGBA" if mode in ("RGBA", "LA", "P") else "CMYK")
        options = {"transparency": 3} if mode == "P" else {}
        via = image.convert("RGB").quantize(16) if mode == "P" else image
        via = via.convert("RGB") if mode in ("L", "1") else via
        data = encoded(via.convert(mode), "TIFF" if mode == "CMYK" else "PNG", **options)
    whole = pixels(decode_image(data))
    monkeypatch.setattr(decoding, "_STRIP_PIXELS", 7 * 40 + 3)
    assert (pixels(decode_image(data)) == whole).all()


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_a_png_whose_text_unfolds_to_much_is_refused(kind: bytes) -> None:
    plain = encoded(picture(), "PNG")
    text = b"k\0\0" + zlib.compress(bytes(20_000_000), 9)
    chunk = struct.pack(">I", len(text)) + kind + text + struct.pack(">I", zlib.crc32(kind + text))
    with pytest.raises(ImageError, match=r"cannot be decoded .*too large"):
        decode_image(plain[:33] + chunk + plain[33:])


def test_formats_off_the_list_are_not_opened() -> None:
    with pytest.raises(ImageError, match="known format"):
        decode_image(encoded(Image.new("RGBA", (64, 64)), "ICO"))
    with pytest.raises(ImageError, match="known format"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


def test_links_pipes_and_unreadable_files_fail_alone(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(encoded(picture(), "PNG"))
    (tmp_path / "linked.png").symlink_to("good.png")
    (tmp_path / "broken-link.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    source = open_images(tmp_path)
    outcome = {}
    for index in range(len(source)):
        try:
            outcome[source.info(index).id] = source.load(index).size
        except ImageError as error:
            outcome[source.info(index).id] = error.reason
    assert outcome == {
        "broken-link.png": "cannot be read (No such file or directory)",
        "good.png": (32, 24),
        "linked.png": (32, 24),
        "pipe.png": "not a regular file",
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_fails_alone(tmp_path: Path) -> None:
    path = tmp_path / "locked.png"
    path.write_bytes(encoded(picture(), "PNG"))
    path.chmod(0)
    with pytest.raises(ImageError, match="Permission denied"):
        open_images(tmp_path).load(0)
