"""Plan the images and captions of each batch before any is loaded.

Everything is drawn from seeds alone, so that the batch at a given place of the run is always the
same, and a resumed run needs to know only its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sparsight.errors import UserError
from sparsight.finetuning.pairs import CaptionedImages

Duplicates = Literal["share", "avoid"]

_DATA, _ATTACK = range(2)


@dataclass(frozen=True)
class Pair:
    """An image and the caption drawn for it.

    Attributes:
        place: place of the image in its source.
        caption: one of its captions.
        attack: whether it is from the attack set.
    """

    place: int
    caption: str
    attack: bool


class PairSampler:
    """Endless batches of pairs, a fixed number of each from the attack set.

    Each pass over a set has a new order, so that all images of a set are seen equally often.

    Args:
        data: clean images with captions.
        attack: the attack set, if there is one.
        batch_size: pairs per batch.
        attack_share: share of each batch that comes from the attack set.
        duplicates: `share`: equal captions may meet in a batch (the loss lets them share their
            target); `avoid`: a pair whose caption is already in the batch waits for the next.
        seed: seed of orders and captions.

    Raises:
        UserError: the share leaves no pairs for one of the sets.
    """

    def __init__(
        self,
        data: CaptionedImages,
        attack: CaptionedImages | None,
        *,
        batch_size: int,
        attack_share: float,
        duplicates: Duplicates = "share",
        seed: int = 0,
    ) -> None:
        self.n_attack = round(attack_share * batch_size) if attack is not None else 0
        self.n_data = batch_size - self.n_attack
        if self.n_data < 1 or (attack is not None and self.n_attack < 1):
            raise UserError(
                f"attack_share is {attack_share}: a batch of {batch_size} would have {self.n_data} "
                f"images from the data and {self.n_attack} from the attack set."
            )
        self.data = data
        self.duplicates = duplicates
        self._walks = [_Walk(data, self.n_data, seed, _DATA)]
        if attack is not None:
            self._walks.append(_Walk(attack, self.n_attack, seed, _ATTACK))

    def batches(self) -> Iterator[list[Pair]]:
        """Yield the batches from the first on; in each, pairs of the data come before attacks.

        Raises:
            UserError: captions must differ, but there are too few distinct ones.
        """
        walks = [walk.pairs() for walk in self._walks]
        waiting: list[deque[_Drawn]] = [deque() for _ in walks]
        while True:
            used: set[str] = set()
            batch: list[Pair] = []
            for walk, pairs, behind in zip(self._walks, walks, waiting, strict=True):
                batch += self._fill(walk, pairs, behind, used)
            yield batch

    def _fill(
        self, walk: _Walk, pairs: Iterator[_Drawn], behind: deque[_Drawn], used: set[str]
    ) -> list[Pair]:
        if self.duplicates == "share":
            return [next(pairs).pair for _ in range(walk.share)]
        chosen: list[Pair] = []
        queue, still = deque(behind), list[_Drawn]()
        behind.clear()
        # One whole pass beyond the waiting pairs has met every image.
        for _ in range(len(queue) + 2 * len(walk.images)):
            if len(chosen) == walk.share:
                break
            drawn = queue.popleft() if queue else next(pairs)
            caption = next((text for text in drawn.captions if text not in used), None)
            if caption is None:
                still.append(drawn)
                continue
            used.add(caption)
            chosen.append(Pair(drawn.pair.place, caption, drawn.pair.attack))
        if len(chosen) < walk.share:
            raise UserError(
                f"{walk.images.source.spec}: there is no batch of {len(chosen) + 1:,} images with "
                "distinct captions. Let equal captions share their target "
                '(duplicates = "share"), or use smaller batches.'
            )
        behind.extend([*still, *queue])
        return chosen


@dataclass(frozen=True)
class _Drawn:
    """An image with all its captions, in the order of the draw."""

    pair: Pair
    captions: tuple[str, ...]


class _Walk:
    """Passes over a set of images, each in a new order."""

    def __init__(self, images: CaptionedImages, share: int, seed: int, number: int) -> None:
        self.images = images
        self.share = share
        self.seed = seed
        self.number = number

    def pairs(self) -> Iterator[_Drawn]:
        turn = 0
        while True:
            rng = np.random.default_rng([self.seed, self.number, turn])
            order = rng.permutation(len(self.images))
            for i, u in zip(order, rng.random((len(order), 2)), strict=True):
                captions = _ordered(self.images.captions[i], u)
                pair = Pair(self.images.places[i], captions[0], self.number == _ATTACK)
                yield _Drawn(pair, captions)
            turn += 1


def _ordered(groups: tuple[tuple[str, ...], ...], u: npt.NDArray[np.float64]) -> tuple[str, ...]:
    """Order all captions, the drawn one first: a random group, then a random caption of it."""
    group = int(u[0] * len(groups))
    texts = groups[group]
    first = int(u[1] * len(texts))
    others = (text for number, each in enumerate(groups) if number != group for text in each)
    return (*texts[first:], *texts[:first], *others)
