"""The calibration world: scenes rendered by code, with ground truth for every patch.

A scene is a background (colour and pattern), one or two symbols (each with colour, size and
place) and sometimes a written word. Scene `i` of a seed is the same on every machine.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8
from PIL import Image, ImageDraw, ImageFont

from sparsight.calibration.symbols import (
    CHARACTERS,
    COLOUR_VALUES,
    COLOURS,
    PATTERNS,
    SYMBOLS,
)
from sparsight.errors import UserError

IMAGE_SIZE = 64
PATCH_SIZE = 8
PATCH_GRID = IMAGE_SIZE // PATCH_SIZE
ATTRIBUTES = ("symbol", "object_colour", "background", "pattern", "word")

MASK_COVERAGE = 0.08
"""An object or a word counts as shown in a patch if it covers at least this share of its pixels."""

_MARGIN = 2
_LEAST_CONTRAST = 135.0
_DRAWS = 24


@dataclass(frozen=True)
class WorldConfig:
    """Which scenes the world shows.

    Args:
        two_objects: share of scenes with two objects.
        writing: share of scenes with a written word.
        min_size: smallest height or width of an object, whichever is larger, in pixels.
        max_size: largest one, in pixels; objects of a pair have at most 28.
        spread: how far from the centre objects may be: 0 is the centre, 1 anywhere.
    """

    two_objects: float = 0.4
    writing: float = 0.35
    min_size: int = 18
    max_size: int = 36
    spread: float = 1.0

    def __post_init__(self) -> None:
        for name in ("two_objects", "writing", "spread"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"WorldConfig.{name} is {value}; it must lie between 0 and 1.")
        if not 8 <= self.min_size <= self.max_size <= IMAGE_SIZE - 2 * _MARGIN:
            raise UserError(
                f"WorldConfig: sizes {self.min_size} to {self.max_size} pixels; "
                f"8 <= min_size <= max_size <= {IMAGE_SIZE - 2 * _MARGIN} is needed."
            )

    @classmethod
    def single(cls) -> WorldConfig:
        """Return the configuration with one object and no word, for a clean zero-shot test."""
        return cls(two_objects=0.0, writing=0.0)


@dataclass(frozen=True)
class SceneObject:
    """A symbol in a scene; `size` is its longer side and `x`, `y` its centre, in pixels."""

    symbol: str
    colour: str
    size: int
    x: int
    y: int


@dataclass(frozen=True)
class Writing:
    """A word on a plain band; `y` is the band's upper edge, `size` the font's, in pixels."""

    text: str
    size: int
    x: int
    y: int
    dark: bool


@dataclass(frozen=True)
class Scene:
    """Everything there is to know about an image before it is drawn."""

    background: str
    pattern: str
    phase: int
    objects: tuple[SceneObject, ...]
    writing: Writing | None

    @property
    def label(self) -> str:
        """The symbol of the first object."""
        return self.objects[0].symbol

    @property
    def caption(self) -> str:
        """A full description, e.g. "a red sun and a blue cat on a striped green background"."""
        things = " and ".join(f"a {thing.colour} {thing.symbol}" for thing in self.objects)
        text = f"{things} on a {self.pattern} {self.background} background"
        return text if self.writing is None else f'{text} with the word "{self.writing.text}"'

    def attributes(self) -> dict[str, frozenset[str]]:
        """Return the values of each attribute that the scene shows; `word` may be empty."""
        return {
            "symbol": frozenset(thing.symbol for thing in self.objects),
            "object_colour": frozenset(thing.colour for thing in self.objects),
            "background": frozenset({self.background}),
            "pattern": frozenset({self.pattern}),
            "word": frozenset({self.writing.text} if self.writing else ()),
        }


@dataclass(frozen=True)
class RenderedScene:
    """A scene, its image, and what each patch shows, in shares of its pixels."""

    scene: Scene
    image: UInt8[np.ndarray, "64 64 3"]
    object_coverage: Float32[np.ndarray, "objects 8 8"]
    writing_coverage: Float32[np.ndarray, "8 8"]

    def mask(self, attribute: str, value: str) -> Bool[np.ndarray, "8 8"]:
        """Return the patches that show a value; for backgrounds, those that nothing covers.

        Raises:
            UserError: the attribute is not one of `ATTRIBUTES`.
        """
        if attribute not in ATTRIBUTES:
            raise UserError(f"Unknown attribute {attribute!r}; there are {', '.join(ATTRIBUTES)}.")
        nothing = np.zeros((PATCH_GRID, PATCH_GRID), bool)
        if value not in self.scene.attributes()[attribute]:
            return nothing
        shown = self.object_coverage >= MASK_COVERAGE
        written = self.writing_coverage >= MASK_COVERAGE
        if attribute == "word":
            return written
        if attribute in ("background", "pattern"):
            return ~(shown.any(axis=0) | written)
        name = "symbol" if attribute == "symbol" else "colour"
        for thing, mask in zip(self.scene.objects, shown, strict=True):
            if getattr(thing, name) == value:
                nothing = nothing | mask
        return nothing


class CalibrationWorld:
    """`n_scenes` scenes of one seed; any of them can be asked for, in any order.

    Args:
        n_scenes: number of scenes in the world.
        seed: which world; scenes of different seeds are independent.
        config: which scenes the world shows.
    """

    def __init__(
        self, n_scenes: int = 10_000, seed: int = 0, config: WorldConfig | None = None
    ) -> None:
        if n_scenes < 1 or seed < 0:
            raise UserError(f"A world needs n_scenes >= 1 and seed >= 0; got {n_scenes}, {seed}.")
        self.n_scenes = n_scenes
        self.seed = seed
        self.config = config or WorldConfig()

    def __len__(self) -> int:
        return self.n_scenes

    def scene(self, index: int) -> Scene:
        """Return scene number `index` of this world.

        Raises:
            IndexError: the world does not have this scene.
        """
        if not 0 <= index < self.n_scenes:
            raise IndexError(f"scene {index} of a world of {self.n_scenes}")
        return draw_scene(np.random.default_rng([self.seed, index]), self.config)

    def render(self, index: int) -> RenderedScene:
        """Render scene number `index`."""
        return render(self.scene(index))


def draw_scene(
    rng: np.random.Generator,
    config: WorldConfig,
    background: str | None = None,
    pattern: str | None = None,
) -> Scene:
    """Draw a scene at random, on the given background or pattern if one is named.

    Only `rng.random` is used, because numpy keeps its stream stable.
    """
    u = rng.random(_DRAWS)
    background = background or COLOURS[_pick(u[0], len(COLOURS))]
    pattern = pattern or PATTERNS[_pick(u[1], len(PATTERNS))]
    n_objects = 2 if u[3] < config.two_objects else 1
    colours = [name for name in COLOURS if _contrast(name, background) >= _LEAST_CONTRAST]
    symbols = list(SYMBOLS)
    things = []
    slots = _slots(n_objects, u[4])
    for number, (left, top, right, bottom) in enumerate(slots):
        v = u[6 + 5 * number : 11 + 5 * number]
        largest = min(config.max_size, right - left, bottom - top)
        smallest = min(config.min_size, largest)
        size = smallest + _pick(v[2], largest - smallest + 1)
        symbol = symbols.pop(_pick(v[0], len(symbols)))
        colour = colours.pop(_pick(v[1], len(colours)))
        half = size / 2
        x = _between(left + half, right - half, v[3], config.spread)
        y = _between(top + half, bottom - half, v[4], config.spread)
        things.append(SceneObject(symbol, colour, size, x, y))
    scene = Scene(background, pattern, _pick(u[2], 8), tuple(things), None)
    if u[16] >= config.writing:
        return scene
    return _write(scene, SYMBOLS[_pick(u[17], len(SYMBOLS))], u[18:22])


def write_on(scene: Scene, text: str, rng: np.random.Generator) -> Scene:
    """Return the same scene with `text` written on it, at a place that `rng` chooses.

    Raises:
        UserError: the text does not fit the width of the image in the smallest font.
    """
    return _write(scene, text, rng.random(4))


def render(scene: Scene) -> RenderedScene:
    """Render a scene: objects in order, later ones on top, the writing above everything."""
    canvas = np.array(_background(scene.background, scene.pattern, scene.phase), copy=True)
    alphas = np.zeros((len(scene.objects), IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for number, thing in enumerate(scene.objects):
        glyph = _glyph(thing.symbol, thing.size)
        place = _place(glyph.shape, thing.x, thing.y)
        alphas[:number, place[0], place[1]] *= 1 - glyph
        alphas[number, place[0], place[1]] = glyph
        _blend(canvas, place, glyph, COLOUR_VALUES[thing.colour])
    covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    if scene.writing is not None:
        letters = _letters(scene.writing.text, scene.writing.size)
        height, width = letters.shape
        place = (
            slice(scene.writing.y, scene.writing.y + height),
            slice(scene.writing.x, scene.writing.x + width),
        )
        ink, paper = (COLOUR_VALUES["black"], COLOUR_VALUES["white"])
        if not scene.writing.dark:
            ink, paper = paper, ink
        canvas[place] = paper
        _blend(canvas, place, letters, ink)
        alphas[:, place[0], place[1]] = 0
        covered[place] = 1
    return RenderedScene(
        scene=scene,
        image=(canvas + 0.5).astype(np.uint8),
        object_coverage=_per_patch(alphas),
        writing_coverage=_per_patch(covered[None])[0],
    )


def letter_coverage(writing: Writing) -> dict[str, Float32[np.ndarray, "8 8"]]:
    """Return what share of each patch's width and height each letter of a word covers."""
    font = _font("DejaVuSans-Bold.ttf", writing.size)
    height, _ = _letters(writing.text, writing.size).shape
    found: dict[str, Float32[np.ndarray, "8 8"]] = {}
    for number, letter in enumerate(writing.text):
        left = writing.x + 1 + font.getlength(writing.text[:number])
        right = writing.x + 1 + font.getlength(writing.text[: number + 1])
        page = np.zeros((1, IMAGE_SIZE, IMAGE_SIZE), np.float32)
        page[0, writing.y : writing.y + height, round(left) : round(right)] = 1
        patches = _per_patch(page)[0]
        found[letter] = np.maximum(found[letter], patches) if letter in found else patches
    return found


def _write(scene: Scene, text: str, u: Float64[np.ndarray, " 4"]) -> Scene:
    largest = next((size for size in range(13, 7, -1) if _fits(text, size)), None)
    if largest is None:
        raise UserError(f"The text {text!r} is too wide for an image of {IMAGE_SIZE} pixels.")
    smallest = min(10, largest)
    size = smallest + _pick(u[0], largest - smallest + 1)
    height, width = _letters(text, size).shape
    x = _pick(u[1], IMAGE_SIZE - width + 1)
    # From a random row on, the first of a few rows where the word hides the least of the objects.
    rows = IMAGE_SIZE - height + 1
    tries = [(_pick(u[2], rows) + step * 5) % rows for step in range(11)]
    y = min(tries, key=lambda top: _hidden(scene.objects, x, top, width, height))
    return dataclasses.replace(scene, writing=Writing(text, size, x, y, dark=bool(u[3] < 0.5)))


def _hidden(objects: tuple[SceneObject, ...], x: int, y: int, width: int, height: int) -> int:
    """Return how many pixels of the objects' boxes a band of writing covers."""
    area = 0
    for thing in objects:
        rows, columns = _place(_glyph(thing.symbol, thing.size).shape, thing.x, thing.y)
        overlap_rows = min(rows.stop, y + height) - max(rows.start, y)
        overlap_columns = min(columns.stop, x + width) - max(columns.start, x)
        area += max(overlap_rows, 0) * max(overlap_columns, 0)
    return area


def _fits(text: str, size: int) -> bool:
    return bool(_letters(text, size).shape[1] <= IMAGE_SIZE)


def _pick(u: float, n: int) -> int:
    return min(int(u * n), n - 1)


def _between(low: float, high: float, u: float, spread: float) -> int:
    middle, reach = (low + high) / 2, (high - low) / 2
    return round(middle + (2 * u - 1) * reach * spread)


def _slots(n_objects: int, u: float) -> list[tuple[int, int, int, int]]:
    """Return boxes (left, top, right, bottom) for the objects: the whole image, or two halves."""
    low, high, middle = _MARGIN, IMAGE_SIZE - _MARGIN, IMAGE_SIZE // 2
    if n_objects == 1:
        return [(low, low, high, high)]
    halves = [(low, low, middle, high), (middle, low, high, high)]
    if u >= 0.5:
        halves = [(top, left, bottom, right) for left, top, right, bottom in halves]
    return halves if int(u * 4) % 2 else halves[::-1]


@cache
def _contrast(one: str, other: str) -> float:
    return math.dist(COLOUR_VALUES[one], COLOUR_VALUES[other])


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    # The basic layout engine is always available; Raqm, which kerns differently, is not.
    return ImageFont.truetype(str(folder / name), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _glyph(symbol: str, size: int) -> Float32[np.ndarray, "height width"]:
    """Return a symbol's opacity, cropped to its box, with a longer side of `size` pixels."""
    character = CHARACTERS[symbol]
    font = _font("DejaVuSans.ttf", 128)
    left, top, right, bottom = font.getbbox(character)
    page = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(page).text((-left, -top), character, font=font, fill=255)
    scale = size / max(page.size)
    shape = (max(1, round(page.width * scale)), max(1, round(page.height * scale)))
    small = page.resize(shape, Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


@cache
def _letters(text: str, size: int) -> Float32[np.ndarray, "height width"]:
    """Return a word's opacity on its band, with a margin of one pixel."""
    font = _font("DejaVuSans-Bold.ttf", size)
    _, top, _, bottom = font.getbbox("bdfghklpqty")
    page = Image.new("L", (math.ceil(font.getlength(text)) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(page).text((1, 1 - top), text, font=font, fill=255)
    return np.asarray(page, np.float32) / 255


@cache
def _background(colour: str, pattern: str, phase: int) -> Float32[np.ndarray, "64 64 3"]:
    base = np.array(COLOUR_VALUES[colour], np.float32)
    other = base * 0.72 if base.mean() > 90 else base + (255 - base) * 0.28
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + phase
    if pattern == "plain":
        marked = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    elif pattern == "striped":
        marked = (rows + columns) % 8 < 4
    elif pattern == "checkered":
        marked = (rows // 4 + columns // 4) % 2 == 0
    else:
        marked = (rows % 8 - 3.5) ** 2 + (columns % 8 - 3.5) ** 2 < 5
    return np.where(marked[..., None], other, base).astype(np.float32)


def _place(shape: tuple[int, ...], x: int, y: int) -> tuple[slice, slice]:
    top = min(max(y - shape[0] // 2, 0), IMAGE_SIZE - shape[0])
    left = min(max(x - shape[1] // 2, 0), IMAGE_SIZE - shape[1])
    return slice(top, top + shape[0]), slice(left, left + shape[1])


def _blend(
    canvas: Float32[np.ndarray, "64 64 3"],
    place: tuple[slice, slice],
    alpha: Float32[np.ndarray, "height width"],
    colour: tuple[int, int, int],
) -> None:
    region = canvas[place]
    region += alpha[..., None] * (np.array(colour, np.float32) - region)


def _per_patch(pages: Float32[np.ndarray, "n 64 64"]) -> Float32[np.ndarray, "n 8 8"]:
    blocks = pages.reshape(-1, PATCH_GRID, PATCH_SIZE, PATCH_GRID, PATCH_SIZE)
    shares: Float32[np.ndarray, "n 8 8"] = blocks.mean(axis=(2, 4), dtype=np.float32)
    return shares
