"""Specs of views: which images a view shows of its source, as a short text, and back.

`[0:100,250,300:400:2]`, `?sample=1000&seed=0`, `?sample=1000&by=label&seed=0`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsight.config import check_positive, check_seed
from sparsight.errors import UserError

SELECTION_FORM = "[0:100], [::4], [-100:] or [0:10,25,300:400:2]"
SAMPLE_FORM = "?sample=1000&seed=0, or ?sample=1000&by=label&seed=0"

_BRACKETS = re.compile(r"^(?P<rest>.+)\[(?P<parts>[^\[\]]*)\]\s*$", re.DOTALL)
_NUMBER = re.compile(r"-?[0-9]{1,18}")
_PARAMETER = r"(?:sample|seed|by)=[^&?\[\]]*"
_LAST = re.compile(rf"^(?P<rest>.+?)(?P<mark>[?&])(?P<query>{_PARAMETER}(?:&{_PARAMETER})*)$", re.S)
_BEFORE_TABLE = re.compile(
    rf"^(?P<rest>.+?)\?(?P<query>{_PARAMETER}(?:&{_PARAMETER})*)&(?=table=)", re.S
)


@dataclass(frozen=True)
class Sample:
    """A seeded random sample; with the same seed, a smaller sample is a subset of a larger one.

    Attributes:
        n: number of images; all of them if the source has no more.
        seed: seed of the draw.
        by_label: draw a stratified sample: the labels (images without a label are a class of their
            own) have the shares that they have in the source.
    """

    n: int
    seed: int = 0
    by_label: bool = False

    def __post_init__(self) -> None:
        check_positive(sample=self.n)
        check_seed(self.seed)

    def __str__(self) -> str:
        return f"sample={self.n}{'&by=label' * self.by_label}&seed={self.seed}"


def sample_places(n_images: int, n: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Draw `n` of the places 0 … `n_images` − 1 (all if there are no more) at random; ascending."""
    return np.sort(_random_order(n_images, seed)[:n])


def stratified_places(labels: Sequence[str | None], n: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Draw `n` places at random so that each label keeps its share; ascending.

    The remainder from rounding down goes to the labels with the largest fractions, and among equal
    ones to those that come first.
    """
    numbers = {
        label: i for i, label in enumerate(sorted({*labels}, key=lambda x: (x is None, x or "")))
    }
    group = np.fromiter((numbers[label] for label in labels), np.int64, len(labels))
    counts = np.bincount(group, minlength=len(numbers))
    n = min(n, len(labels))
    quota, remainders = np.divmod(counts * n, max(1, len(labels)))
    left = n - int(quota.sum())
    quota[np.argsort(-remainders, kind="stable")[:left]] += 1
    order = _random_order(len(labels), seed)
    order = order[np.argsort(group[order], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(order[rank < np.repeat(quota, counts)])


def _random_order(n: int, seed: int) -> npt.NDArray[np.int64]:
    """Order the places by a hash of place and seed, which is the same in every version of NumPy."""
    place = np.arange(n, dtype=np.uint64)
    order: npt.NDArray[np.int64] = np.argsort(
        _mixed(place + _mixed(np.full(1, seed, dtype=np.uint64))), kind="stable"
    )
    return order


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply SplitMix64, which scatters neighbouring numbers."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def format_selection(indices: npt.NDArray[np.int64]) -> str:
    """Write places as `[…]`, with ascending runs of equal step as `start:stop:step`."""
    parts: list[str] = []
    steps = np.diff(indices)
    start, n = 0, len(indices)
    while start < n:
        end = start  # the run is indices[start … end]
        if start < n - 1 and steps[start] > 0:
            changes = np.flatnonzero(steps[start : start + 64] != steps[start])
            if not changes.size:
                changes = np.flatnonzero(steps[start:] != steps[start])
            end = start + int(changes[0]) if changes.size else n - 1
        if end - start < 2:
            parts.append(str(indices[start]))
            start += 1
            continue
        step = int(steps[start])
        parts.append(f"{indices[start]}:{indices[end] + 1}" + (f":{step}" if step > 1 else ""))
        start = end + 1
    return f"[{','.join(parts)}]"


def split_selection(spec: str) -> tuple[str, str | None]:
    """Split `"photos[0:3,9]"` into `("photos", "0:3,9")`; None if no brackets end the text."""
    match = _BRACKETS.match(spec)
    return (spec, None) if match is None else (match["rest"], match["parts"])


def parse_selection(parts: str, n_images: int, spec: str) -> list[int]:
    """Return the places that a selection names; syntax as in Python slices, but bounds must exist.

    Args:
        parts: the text in the brackets.
        n_images: number of images of the source, from which open ends and negative numbers count.
        spec: the whole spec, for messages.

    Raises:
        UserError: the text is not a selection, or names an image that does not exist.
    """
    places: list[int] = []
    for part in parts.split(",") if parts.strip() else ():
        numbers = [number.strip() for number in part.split(":")]
        if len(numbers) > 3 or not all(
            _NUMBER.fullmatch(number) or (len(numbers) > 1 and not number) for number in numbers
        ):
            raise UserError(
                f"{spec}: {part.strip()!r} is not a selection. Expected e.g. {SELECTION_FORM}; "
                "steps and ends as in a Python slice."
            )
        start, stop, step = (*(int(number) if number else None for number in numbers), None, None)[
            :3
        ]
        if step is not None and step < 1:
            raise UserError(f"{spec}: the step in {part.strip()!r} must be 1 or more.")
        first, last = (_from_start(end, n_images) for end in (start, stop))
        if len(numbers) == 1:
            assert first is not None
            _check_end(first, first, n_images, spec)
            places.append(first)
            continue
        chosen = range(first or 0, n_images if last is None else last, step or 1)
        if chosen:
            _check_end(chosen[0], chosen[-1], n_images, spec)
        places += chosen
    return places


def split_sample(spec: str, marks: str = "?&") -> tuple[str, Sample | None]:
    """Split `"photos?sample=100&seed=3"` into `("photos", Sample(100, 3))`; None without a sample.

    The sample may stand before or after `table=`.

    Args:
        spec: what `open_images` takes.
        marks: characters that may begin a sample.

    Raises:
        UserError: `seed` or `by` is given without `sample`, or a value is wrong.
    """
    match = _LAST.match(spec)
    if match is not None and match["mark"] in marks and "?" in spec[: match.start("query")]:
        return match["rest"], _parse_sample(match["query"], spec)
    match = _BEFORE_TABLE.match(spec)
    if match is not None:
        return f"{match['rest']}?{spec[match.end() :]}", _parse_sample(match["query"], spec)
    return spec, None


def whole_spec(spec: str) -> str:
    """Return a spec without the selections and samples at its end, and without a table."""
    rest, marks = spec, "?" if spec.startswith("written:") else "?&"
    while True:
        before, rest = rest, split_selection(rest)[0]
        if marks == "?&" or rest.count("?") > 1:
            rest = split_sample(rest, marks)[0]
        if rest == before:
            return rest.partition("?table=")[0]


def _parse_sample(query: str, spec: str) -> Sample:
    values: dict[str, str] = {}
    for name, _, value in (each.partition("=") for each in query.split("&")):
        if name in values:
            raise UserError(f"{spec}: {name}= is given twice. Expected {SAMPLE_FORM}.")
        values[name] = value.strip()
    if "sample" not in values:
        raise UserError(f"{spec}: {' and '.join(values)} without sample=. Expected {SAMPLE_FORM}.")
    for name in ("sample", "seed"):
        value = values.get(name, "1")
        if not re.fullmatch("[0-9]{1,20}", value) or (name == "sample" and not int(value)):
            least = 1 if name == "sample" else 0
            raise UserError(
                f"{spec}: {name}={value}; expected a whole number, {least} or more: {SAMPLE_FORM}."
            )
    if values.get("by", "label") != "label":
        by = values["by"]
        raise UserError(f"{spec}: by={by}; only by=label is known. Expected {SAMPLE_FORM}.")
    return Sample(int(values["sample"]), int(values.get("seed", "0")), "by" in values)


def _from_start(place: int | None, n_images: int) -> int | None:
    return place if place is None or place >= 0 else place + n_images


def _check_end(first: int, last: int, n_images: int, spec: str) -> None:
    """Check the bounds before a selection of billions is written out."""
    for place in (first, last):
        if not 0 <= place < n_images:
            raise UserError(f"{spec}: no image {place}; it has {n_images:,} (0 based).")
