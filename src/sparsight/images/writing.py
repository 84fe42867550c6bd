"""Any source of images, with words written on them.

A seed and the image's id determine what is written, where and how: the result is the same on every
machine, in any order and in any process. `lettering` draws the words.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import parse_qsl, urlencode

import numpy as np
import numpy.typing as npt
from PIL import Image

from sparsight.config import check_positive, check_seed
from sparsight.errors import UserError
from sparsight.images.decoding import ImageError
from sparsight.images.lettering import Font, TextStyle, known_letters, write_on_image
from sparsight.images.source import ImageInfo, ImageSource, SelectedImages, View

if TYPE_CHECKING:
    from sparsight.calibration.world import RenderedScene, Scene

Kind = Literal["clean", "attacked", "same", "control"]
"""Nothing; the name of another class; the name of its own class; letters that name no class."""

Nonsense = Literal["letters", "anagram"]
"""Letters drawn as often as they occur in class names; or the attacking word's own, shuffled."""

KINDS: tuple[Kind, ...] = get_args(Kind)
_DRAWS = 6
_TRIES = 64


@dataclass(frozen=True)
class WorldBand:
    """The calibration world's own writing: bold letters on a band, placed where they hide little.

    It works only on that world's scenes, whose masks then include the word.
    """


Style = TextStyle | WorldBand


class WrittenImages(ImageSource):
    """The labelled images of a source with words on them, drawn when the images are loaded.

    Ids, labels and captions are those of the source. With the same seed, an image has the same
    place and look in every kind, so that kinds form pairs. Images without a label are left out.

    Args:
        source: the images.
        kind: what is written; see `Kind`.
        style: how it is written.
        seed: seed of the words, their places and the choice of images.
        class_names: the words, by label; by default the labels, with underscores read as spaces.
        n: number of images, chosen at random, in the order of the source; all by default.
        nonsense: what is written for the kind `control`.

    Raises:
        UserError: there are no labels, a class name cannot be written, or `WorldBand` is used on
            photos.
    """

    def __init__(
        self,
        source: ImageSource,
        kind: Kind,
        style: Style | None = None,
        *,
        seed: int = 0,
        class_names: Mapping[str, str] | None = None,
        n: int | None = None,
        nonsense: Nonsense = "letters",
    ) -> None:
        if kind not in KINDS:
            raise UserError(f"kind is {kind!r}; expected {', '.join(KINDS)}.")
        if nonsense not in get_args(Nonsense):
            raise UserError(f"nonsense is {nonsense!r}; expected letters or anagram.")
        check_positive(n=n)
        check_seed(seed)
        self.source = source
        self.kind: Kind = kind
        has_scenes = hasattr(source, "scene") and hasattr(source, "world")
        self.style: Style = style or (WorldBand() if has_scenes else TextStyle())
        if isinstance(self.style, WorldBand) and not has_scenes:
            raise UserError(
                f"{source.spec}: the world's own band works on calibration scenes only."
            )
        self.seed = seed
        self.n = n
        self.nonsense: Nonsense = nonsense
        self._given_names = class_names is not None
        self.class_names = dict(class_names) if class_names is not None else _names(source)
        _check_names(self.class_names, source.spec)
        if isinstance(self.style, TextStyle):
            _check_letters(self.class_names, self.style.font)
        self._places, self.notes = self._choose()
        self.spec = self._spec()

    def _choose(self) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
        """Choose places in the source, and say what was left out."""
        known: list[int] = []
        unread = 0
        for index in range(len(self.source)):
            try:
                label = self.source.info(index).label
            except ImageError:
                unread += 1
                continue
            if label in self.class_names:
                known.append(index)
        left_out = len(self.source) - len(known)
        if not known:
            raise UserError(
                f"{self.source.spec}: none of its {len(self.source):,} images has a label among "
                f"the {len(self.class_names)} classes, so there is no other class to name."
            )
        notes = [*self.source.notes]
        if left_out:
            notes.append(
                f"{left_out:,} of {len(self.source):,} images have no label among the classes"
                f"{f' ({unread:,} cannot be read)' if unread else ''}; nothing is written on them."
            )
        if self.n is not None and self.n < len(known):
            order = np.argsort([_number(self.seed, "choice", index) for index in known])
            known = sorted(known[place] for place in order[: self.n])
        return np.asarray(known, np.int64), tuple(notes)

    def as_kind(self, kind: Kind) -> WrittenImages:
        """Return the same images with another kind of words on them."""
        if kind not in KINDS:
            raise UserError(f"kind is {kind!r}; expected {', '.join(KINDS)}.")
        other = copy.copy(self)
        other.kind = kind
        other.spec = other._spec()
        return other

    def _spec(self) -> str:
        about: dict[str, Any] = {"of": self.source.spec, "seed": self.seed}
        if self.n is not None:
            about["n"] = self.n
        if self.nonsense != "letters":
            about["nonsense"] = self.nonsense
        if self._given_names:
            about["classes"] = json.dumps(self.class_names, ensure_ascii=False)
        if isinstance(self.style, TextStyle):
            about |= {
                field.name: value
                for field in dataclasses.fields(TextStyle)
                if (value := getattr(self.style, field.name)) != field.default
            }
            if hasattr(self.source, "world"):
                about["style"] = "text"
        return f"written:{self.kind}?{urlencode(about)}"

    def __len__(self) -> int:
        return len(self._places)

    def info(self, index: int) -> ImageInfo:
        """See `ImageSource.info`."""
        return self.source.info(self.place(index))

    def place(self, index: int) -> int:
        """Return where in the source image `index` is."""
        return int(self._places[self._check_index(index)])

    def attack(self, index: int) -> str:
        """Return the label of the class (not the image's own) whose name attacks image `index`."""
        info = self.info(index)
        labels = list(self.class_names)
        own = labels.index(info.label or "")
        step = 1 + int(_unit(self.seed, "word", info.id) * (len(labels) - 1))
        return labels[(own + step) % len(labels)]

    def text(self, index: int) -> str | None:
        """Return what is written on image `index`; None if nothing is."""
        if self.kind == "clean":
            return None
        info = self.info(index)
        if self.kind == "same":
            return self.class_names[info.label or ""]
        word = self.class_names[self.attack(index)]
        return word if self.kind == "attacked" else self._control(word, info.id)

    def _control(self, word: str, id: str) -> str:
        """Return letters instead of a word: as many, with the same spaces, and not a class name."""
        names = {_folded(name) for name in self.class_names.values()}
        pool = (
            [letter for letter in word if not letter.isspace()]
            if self.nonsense == "anagram"
            else self._pool
        )
        for attempt in range(_TRIES):
            rng = np.random.default_rng(_number(self.seed, f"nonsense {attempt}", id))
            u = rng.random(len(word))
            if self.nonsense == "anagram":
                drawn: Iterator[str] = iter([pool[i] for i in np.argsort(u[: len(pool)])])
            else:
                drawn = (pool[int(each * len(pool))] for each in u)
            text = "".join(c if c.isspace() else next(drawn) for c in word)
            if _folded(text) not in names:
                return text
        raise ImageError(f"no {self.nonsense} found for {word!r} that are not a class's name")

    @cached_property
    def _pool(self) -> list[str]:
        """Every letter of every class name, as often as it occurs."""
        return [c for name in self.class_names.values() for c in name if not c.isspace()]

    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        """See `ImageSource.load`.

        Raises:
            ImageError: the word does not fit, or as in `ImageSource.load`.
        """
        place, text = self.place(index), self.text(index)
        image = self.source.load(place) if min_side is None else self.source.load(place, min_side)
        if text is None:
            return image
        assert isinstance(self.style, TextStyle)
        u = _rng(self.seed, "look", self.info(index).id).random(_DRAWS)
        return write_on_image(image, text, self.style, u.tolist())

    def fingerprint(self) -> str:
        """Return the source's fingerprint, combined with what is written and how."""
        about = {
            "source": self.source.fingerprint(),
            "kind": self.kind,
            "style": [type(self.style).__name__, dataclasses.asdict(self.style)],
            "names": self.class_names,
            "nonsense": self.nonsense,
            "seed": self.seed,
            "n": self.n,
        }
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_pool"}


class WrittenScenes(WrittenImages):
    """Scenes of the calibration world with its own writing on them; their ground truth stays known.

    Words that the world itself wrote on some scenes are left out, in every kind.
    """

    @property
    def world(self) -> Any:
        """The world that the scenes come from."""
        return self.source.world  # type: ignore[attr-defined]

    def scene(self, index: int) -> Scene:
        """Return the ground truth about image `index`, including its writing."""
        from sparsight.calibration.world import write_on

        scene: Scene = self.source.scene(self.place(index))  # type: ignore[attr-defined]
        text = self.text(index)
        bare = dataclasses.replace(scene, writing=None)
        if text is None:
            return bare
        try:
            return write_on(bare, text, _rng(self.seed, "look", self.info(index).id))
        except UserError as error:
            raise ImageError(str(error)) from error

    def render(self, index: int) -> RenderedScene:
        """Render image `index`, with the masks of its parts."""
        from sparsight.calibration.world import render

        return render(self.scene(index))

    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        """See `ImageSource.load`."""
        return Image.fromarray(np.asarray(self.render(index).image))

    def select(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> ImageSource:
        """See `ImageSource.select`; the ground truth stays available."""
        return SelectedScenes(self, self._checked(indices))

    def _view(self, places: npt.NDArray[np.int64], spec: str) -> ImageSource:
        return SelectedScenes(self, places, View.whole(spec, len(places)))


class SelectedScenes(SelectedImages):
    """Some of the scenes with words on them, with their ground truth."""

    whole: WrittenScenes

    @property
    def world(self) -> Any:
        """The world that the scenes come from."""
        return self.whole.world

    def scene(self, index: int) -> Scene:
        """Return the ground truth about image `index`, including its writing."""
        return self.whole.scene(int(self.indices[self._check_index(index)]))

    def render(self, index: int) -> RenderedScene:
        """Render image `index`, with the masks of its parts."""
        return self.whole.render(int(self.indices[self._check_index(index)]))


def written(
    source: ImageSource, kind: Kind, style: Style | None = None, **options: Any
) -> WrittenImages:
    """Return `WrittenImages`, with ground truth if the source has it and uses its own band.

    Args:
        source: the images.
        kind: what is written.
        style: how; by default the world's band on calibration scenes, and `TextStyle()` elsewhere.
        options: further arguments of `WrittenImages`.
    """
    own = style is None or isinstance(style, WorldBand)
    scenes = own and hasattr(source, "scene") and hasattr(source, "world")
    return (WrittenScenes if scenes else WrittenImages)(source, kind, style, **options)


def parse_written(text: str) -> tuple[str, Kind, Style | None, dict[str, Any]]:
    """Parse a spec `written:KIND?of=SOURCE&…` into source, kind, style and further options.

    Of the options, `sample` and `by_label` choose among the written images.

    Raises:
        UserError: the spec does not have this form.
    """
    form = "'written:KIND?of=SOURCE&seed=0&size=0.2&…'"
    kind, mark, query = text.removeprefix("written:").partition("?")
    if not mark or kind not in KINDS:
        raise UserError(f"{text!r}: expected {form}, KIND one of {', '.join(KINDS)}.")
    values = dict(parse_qsl(query, keep_blank_values=True))
    inner = values.pop("of", "")
    if not inner:
        raise UserError(f"{text!r}: names no source of images. Expected {form}.")
    options: dict[str, Any] = {}
    if "classes" in values:
        options["class_names"] = _classes(values.pop("classes"), text)
    if "nonsense" in values:
        options["nonsense"] = values.pop("nonsense")
    for name in ("seed", "n", "sample"):
        if name in values:
            options[name] = _parsed(int, values.pop(name), name, text)
    if "by" in values:
        if values.pop("by") != "label" or "sample" not in options:
            raise UserError(f"{text!r}: by= is for sample=N&by=label.")
        options["by_label"] = True
    named = values.pop("style", None)
    if named not in (None, "text"):
        raise UserError(f"{text!r}: style is {named!r}; expected text, or none.")
    types = {"size": float, "opacity": float, "rotation": float, "tilt": float}
    known = {field.name for field in dataclasses.fields(TextStyle)}
    for name in values.keys() - known:
        raise UserError(f"{text!r}: unknown {name!r}. Known: {', '.join(sorted(known))}.")
    fields: dict[str, Any] = {
        name: _parsed(types[name], value, name, text) if name in types else value
        for name, value in values.items()
    }
    style = TextStyle(**fields) if fields or named else None
    return inner, kind, style, options


def _parsed(kind: type, value: str, name: str, text: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{text!r}: {name} is {value!r}; expected a number.") from None


def _classes(value: str, text: str) -> dict[str, str]:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{text!r}: classes is not a JSON object of names by label.")
    return found


def _names(source: ImageSource) -> dict[str, str]:
    """Return the class names by label; for scenes, all symbols of the world."""
    if hasattr(source, "world"):
        from sparsight.calibration.symbols import SYMBOLS

        return {symbol: symbol for symbol in SYMBOLS}
    return {label: label.replace("_", " ") for label in source.labels()}


def _check_names(names: Mapping[str, str], spec: str) -> None:
    if len(names) < 2:
        raise UserError(
            f"{spec}: {len(names)} classes; a word of another class needs two or more. Give "
            "images with labels (one sub-folder per class), or class_names."
        )
    for label, name in names.items():
        if len(name.splitlines()) != 1 or not name.strip():
            raise UserError(f"The name of the class {label!r} is {name!r}: it cannot be written.")


def _check_letters(names: Mapping[str, str], font: Font) -> None:
    """Refuse letters that the font lacks: each would be drawn as the same empty box."""
    known = known_letters(font)
    for name in names.values():
        lacking = "".join(c for c in dict.fromkeys(name) if not c.isspace() and ord(c) not in known)
        if lacking:
            raise UserError(
                f"The class name {name!r} cannot be written: the font {font} has no {lacking!r}. "
                "Give class_names in letters that it has, or another font."
            )


def _folded(text: str) -> str:
    return "".join(text.casefold().split())


def _number(seed: int, what: str, id: str | int) -> int:
    digest = hashlib.sha256(f"{seed}\0{what}\0{id}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _unit(seed: int, what: str, id: str) -> float:
    return _number(seed, what, id) / 2**64


def _rng(seed: int, what: str, id: str) -> np.random.Generator:
    return np.random.default_rng(_number(seed, what, id))
