"""Pair images with themselves: as they are, and with three kinds of words on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from sparsight.errors import UserError
from sparsight.images import ImageSource, TextStyle, WorldBand, WrittenImages, written
from sparsight.images.writing import KINDS, Kind, Nonsense
from sparsight.vision import names_by_label


@dataclass(frozen=True)
class AttackPairs:
    """Pairs of images; number i is the same image in every source, with its true label.

    Attributes:
        clean: images without words.
        attacked: with the name of another class.
        same: with the name of their own class, in the same place and style.
        control: with nonsense as long as the other class's name, in the same place and style.
        words: for each image, the label of the class that attacks it.
        labels: for each image, its own label.
        class_names: the name of each class, which is written and classified, by label.
        notes: what was left out, for the user.
        about: how the words were made: style, seed, source.
    """

    clean: ImageSource
    attacked: ImageSource
    same: ImageSource
    control: ImageSource
    words: list[str]
    labels: list[str]
    class_names: dict[str, str]
    notes: tuple[str, ...]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.labels)

    def source(self, kind: str) -> ImageSource:
        """Return the images of a kind.

        Raises:
            UserError: the kind does not exist.
        """
        if kind not in KINDS:
            raise UserError(f"Unknown kind of images {kind!r}; choose {', '.join(KINDS)}.")
        found: ImageSource = getattr(self, kind)
        return found

    def select(self, indices: Sequence[int]) -> AttackPairs:
        """Return the pairs with these indices, in that order.

        Raises:
            UserError: an index is out of range.
        """
        chosen = [int(index) for index in indices]
        views = {kind: self.source(kind).select(chosen) for kind in KINDS}
        return replace(
            self,
            **views,  # type: ignore[arg-type]
            words=[self.words[i] for i in chosen],
            labels=[self.labels[i] for i in chosen],
        )

    def halves(self, seed: int = 0) -> tuple[AttackPairs, AttackPairs]:
        """Split the pairs at random: find latents on one half, and measure on the other.

        Args:
            seed: seed of the split.

        Raises:
            UserError: there are fewer than two pairs.
        """
        if len(self) < 2:
            raise UserError(f"{len(self)} images cannot be split in two; give at least two.")
        order = np.argsort(np.random.default_rng(seed).random(len(self)), kind="stable").tolist()
        middle = len(self) // 2
        return self.select(sorted(order[:middle])), self.select(sorted(order[middle:]))


def make_pairs(
    source: ImageSource,
    class_names: Sequence[str] | Mapping[str, str] | None = None,
    style: TextStyle | WorldBand | None = None,
    n: int | None = None,
    seed: int = 0,
    *,
    nonsense: Nonsense = "letters",
) -> AttackPairs:
    """Pair the labelled images of a source with themselves under a typographic attack.

    Args:
        source: images with labels.
        class_names: the classes: labels, or a mapping from label to the name that is written;
            default: the labels of `source` with spaces instead of underscores; for the calibration
            world, all of its symbols.
        style: how words look; default: the world's own band on its scenes, otherwise `TextStyle()`.
        n: number of images, chosen at random; default: all.
        seed: seed of the words and their places, and of the choice.
        nonsense: what `control` shows: letters drawn with their frequencies in class names, or the
            attacking word's own letters in another order. (A model that reads letters rather than
            words mistakes an anagram for the word.)

    Raises:
        UserError: there are no labels, fewer than two classes, or a name that cannot be written.
    """
    names = None if class_names is None else names_by_label((), class_names)
    attacked = written(
        source, "attacked", style, class_names=names, n=n, seed=seed, nonsense=nonsense
    )
    kinds: dict[Kind, WrittenImages] = {kind: attacked.as_kind(kind) for kind in KINDS}
    return AttackPairs(
        **kinds,
        words=[attacked.attack(i) for i in range(len(attacked))],
        labels=[attacked.known(i).label or "" for i in range(len(attacked))],
        class_names=attacked.class_names,
        notes=attacked.notes,
        about={
            "source": source.spec,
            "style": {"kind": type(attacked.style).__name__, **asdict(attacked.style)},
            "seed": seed,
            "n": n,
            "nonsense": nonsense,
            "classes": len(attacked.class_names),
        },
    )
