from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from picture_files import encoded, picture, pixels, png_that_declares
from PIL import Image

from sparsight.images import ImageError, decode_image, decoding, open_images


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_pixels_back(kind: str) -> None:
    assert (pixels(decode_image(encoded(picture(), kind))) == pixels(picture())).all()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
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


def test_greyscale_with_alpha_and_one_bit_pictures_become_rgb() -> None:
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_picture_is_an_image_error_at_any_cut(kind: str) -> None:
    data = encoded(picture(width=64, height=64), kind)
    for cut in range(0, len(data) - 20, max(1, len(data) // 40)):
        with pytest.raises(ImageError):
            decode_image(data[:cut])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_flipped_bits_give_a_picture_or_an_image_error_and_nothing_else(kind: str) -> None:
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


def test_formats_off_the_list_are_not_opened() -> None:
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
