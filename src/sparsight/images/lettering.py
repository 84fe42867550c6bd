"""How words on an image look, and how they are drawn: everywhere the same with the same Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageColor, ImageDraw, ImageFont

from sparsight.config import check_types
from sparsight.errors import UserError
from sparsight.images.decoding import ImageError

Font = Literal["sans", "sans-bold", "serif", "serif-bold", "mono", "mono-bold"]
"""The DejaVu fonts that come with matplotlib."""

PLACES: dict[str, tuple[float, float]] = {
    f"{row}-{column}".removeprefix("centre-").removesuffix("-centre"): (x, y)
    for y, row in ((0.0, "top"), (0.5, "centre"), (1.0, "bottom"))
    for x, column in ((0.0, "left"), (0.5, "centre"), (1.0, "right"))
}
"""From `top-left` through `centre` to `bottom-right`: shares of the room that is left over."""

SMALLEST = 6
"""Pixels of the smallest font: below this, letters are illegible."""

_FILES: dict[Font, str] = {
    "sans": "DejaVuSans",
    "sans-bold": "DejaVuSans-Bold",
    "serif": "DejaVuSerif",
    "serif-bold": "DejaVuSerif-Bold",
    "mono": "DejaVuSansMono",
    "mono-bold": "DejaVuSansMono-Bold",
}
_Colour = tuple[int, int, int]


@dataclass(frozen=True)
class TextStyle:
    """How words look on images.

    A word that is too wide or too high is written smaller, down to `SMALLEST` pixels. If it still
    does not fit, or at once with `fit="refuse"`, the image is refused.
    """

    font: Font = "sans-bold"
    """A DejaVu font."""

    size: float = 0.14
    """Size of the font, as a share of the image's shorter side."""

    place: str = "random"
    """random; top-left, top, top-right, left, centre, right, bottom-left, bottom, bottom-right; or
    X,Y: the middle of the word, as shares of the image's width and height from the top left."""

    colour: str = "auto"
    """auto: black or white, whichever stands out more; or a colour that Pillow knows, by name or as
    #rrggbb."""

    opacity: float = 1.0
    """Opacity of the word and the band; above 0."""

    rotation: float = 0.0
    """Rotation in degrees, counter-clockwise."""

    tilt: float = 0.0
    """Largest random deviation from the rotation, in degrees, in either direction."""

    band: str = "none"
    """none; auto: a black or white band, in contrast to the letters; or the band's colour."""

    outline: str = "none"
    """none; auto: a black or white outline, in contrast to the letters; or the outline's colour."""

    fit: Literal["shrink", "refuse"] = "shrink"
    """What to do if the image has no room for the word: write it smaller, or refuse the image."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.size <= 1:
            raise UserError(f"size is {self.size}; it must be above 0 and at most 1 (a share).")
        if not 0 < self.opacity <= 1:
            raise UserError(f"opacity is {self.opacity}; it must be above 0 and at most 1.")
        if not 0 <= self.tilt <= 180:
            raise UserError(f"tilt is {self.tilt}; it must lie between 0 and 180 degrees.")
        if self.place != "random" and self.place not in PLACES:
            _explicit(self.place)
        for name, colour, also in (
            ("colour", self.colour, ("auto",)),
            ("band", self.band, ("auto", "none")),
            ("outline", self.outline, ("auto", "none")),
        ):
            if colour not in also:
                _rgb(colour, name, also)


def write_on_image(
    image: Image.Image, text: str, style: TextStyle, u: Sequence[float] | None = None
) -> Image.Image:
    """Return a copy of an image with a word on it.

    Args:
        image: RGB.
        text: one line.
        style: how it looks.
        u: numbers in [0, 1) that choose place (2) and tilt (1); by default the middle, untilted.

    Raises:
        UserError: the text is empty or has several lines.
        ImageError: the text does not fit the image.
    """
    if not text.strip() or "\n" in text:
        raise UserError(f"The text {text!r} cannot be written: one line of letters is needed.")
    u = (0.5, 0.5, 0.5) if u is None else u
    turn = style.rotation + (2 * u[2] - 1) * style.tilt
    letters, outline, box = _fitting(image, text, style, turn)
    x, y = _corner(style, image.size, letters.size, u)
    under = (x, y, x + letters.width, y + letters.height)
    ink, edge, paper = _colours(style, image, under)
    out = image.copy()
    for mask, colour in ((box, paper), (outline, edge), (letters, ink)):
        if colour is not None:
            faded = mask.point([round(level * style.opacity) for level in range(256)])
            out.paste(Image.new("RGB", mask.size, colour), (x, y), faded)
    return out


@cache
def known_letters(font: Font) -> frozenset[int]:
    """Return the code points that a font can write."""
    return frozenset(FT2Font(str(_font_file(font))).get_charmap())


def _fitting(
    image: Image.Image, text: str, style: TextStyle, turn: float
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Return the opacity of letters, outline and band, rotated, in the largest size that fits."""
    wanted = round(style.size * min(image.size))
    size = wanted
    while size >= SMALLEST:
        letters, outline, box = _letters(text, style.font, size)
        if turn % 360:
            letters, outline, box = (
                each.rotate(turn, Image.Resampling.BICUBIC, expand=True)
                for each in (letters, outline, box)
            )
        excess = max(letters.width / image.width, letters.height / image.height)
        if excess <= 1:
            return letters, outline, box
        if style.fit == "refuse":
            break
        size = min(size - 1, math.ceil(size / excess))
    raise ImageError(
        f"the text {text!r} does not fit {image.width} × {image.height} pixels at size "
        f"{wanted} px" + ("" if style.fit == "refuse" else f", nor down to {SMALLEST} px")
    )


def _corner(
    style: TextStyle, size: tuple[int, int], letters: tuple[int, int], u: Sequence[float]
) -> tuple[int, int]:
    """Return the upper left corner of the word's box, which lies wholly inside the image."""
    room = (size[0] - letters[0], size[1] - letters[1])
    if style.place in PLACES or style.place == "random":
        share = (u[0], u[1]) if style.place == "random" else PLACES[style.place]
        return round(share[0] * room[0]), round(share[1] * room[1])
    middle = _explicit(style.place)
    x, y = (
        min(max(0, round(middle[axis] * size[axis] - letters[axis] / 2)), room[axis])
        for axis in (0, 1)
    )
    return x, y


def _colours(
    style: TextStyle, image: Image.Image, box: tuple[int, int, int, int]
) -> tuple[_Colour, _Colour | None, _Colour | None]:
    """Return the colours of the letters and, if there are any, of their outline and band."""
    black, white = (0, 0, 0), (255, 255, 255)
    light = np.asarray(image.crop(box).convert("L"), np.float32).mean() >= 128
    paper = None
    if style.band != "none":
        paper = (black if light else white) if style.band == "auto" else _rgb(style.band)
        light = np.dot(paper, (0.299, 0.587, 0.114)) >= 128
    ink = (black if light else white) if style.colour == "auto" else _rgb(style.colour)
    edge = None
    if style.outline != "none":
        dark = np.dot(ink, (0.299, 0.587, 0.114)) < 128
        edge = (white if dark else black) if style.outline == "auto" else _rgb(style.outline)
    return ink, edge, paper


@lru_cache(maxsize=64)  # nonsense words hardly ever repeat
def _letters(text: str, font: Font, size: int) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Return the opacity of a word, of its outline and of its band (a box with a small margin)."""
    face = _font(font, size)
    left, top, right, bottom = face.getbbox(text)
    _, high, _, low = face.getbbox("bdfghklpqty")
    top, bottom = min(top, high), max(bottom, low)
    air = max(1, size // 8)
    page = Image.new("L", (int(right - left) + 2 * air, int(bottom - top) + 2 * air))
    edged = page.copy()
    at = (air - left, air - top)
    ImageDraw.Draw(page).text(at, text, font=face, fill=255)
    ImageDraw.Draw(edged).text(at, text, font=face, fill=255, stroke_width=max(1, size // 14))
    return page, edged, Image.new("L", page.size, 255)


@cache
def _font(name: Font, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout engine is always available; Raqm, which kerns differently, is not.
    return ImageFont.truetype(_font_file(name), size, layout_engine=ImageFont.Layout.BASIC)


def _font_file(name: Font) -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{_FILES[name]}.ttf"


def _explicit(place: str) -> tuple[float, float]:
    try:
        x, y = (float(each) for each in place.split(","))
    except ValueError:
        x = y = math.nan
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise UserError(
            f"place is {place!r}; expected random, {', '.join(PLACES)}, or X,Y between 0 and 1."
        )
    return x, y


def _rgb(colour: str, name: str = "colour", also: Sequence[str] = ()) -> tuple[int, int, int]:
    try:
        found = ImageColor.getrgb(colour)
    except ValueError:
        raise UserError(
            f"{name} is {colour!r}; expected {', '.join([*also, 'a colour name'])} or #rrggbb."
        ) from None
    return (found[0], found[1], found[2])
