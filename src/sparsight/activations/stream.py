"""A shuffled stream of vectors with a position that can be saved.

An epoch is a permutation of blocks (runs of images), cut into windows that fit in memory; the
vectors of each window are permuted again. Everything follows from seed, epoch and window, so the
position is a few numbers, and a restored stream gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.activations.statistics import all_finite
from sparsight.config import check_positive
from sparsight.errors import SparsightError, UserError


class Position(NamedTuple):
    """The number of a window, and of its epoch."""

    epoch: int
    window: int


Window = dict[str, Tensor]
LoadWindow = Callable[[Position, npt.NDArray[np.int64]], Window]
"""Maps a window's position and the numbers of its images to vectors [vectors, d_in] by site.

A window may be overwritten by the next but one.
"""


@dataclass(frozen=True)
class WindowPlan:
    """How images are grouped into blocks and windows.

    Attributes:
        n_images: number of images per epoch.
        block_images: number of images that stay neighbours when a window is filled.
        window_images: number of images that are mixed with one another.
    """

    n_images: int
    block_images: int
    window_images: int

    def __post_init__(self) -> None:
        if self.n_images < 1:
            raise UserError("There are no activations to stream: no images were read.")

    @property
    def n_windows(self) -> int:
        """The number of windows per epoch."""
        return -(-self.n_images // self.window_images)

    def images(self, seed: int, at: Position) -> npt.NDArray[np.int64]:
        """Return the images of a window, block after block."""
        if self.n_windows == 1:
            return np.arange(self.n_images)
        order = _epoch_order(self.n_images, self.block_images, seed, at.epoch)
        return order[at.window * self.window_images : (at.window + 1) * self.window_images]


@lru_cache(maxsize=2)
def _epoch_order(n_images: int, block_images: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    blocks = np.random.default_rng([seed, epoch]).permutation(-(-n_images // block_images))
    images = (blocks[:, None] * block_images + np.arange(block_images)).ravel()
    return images[images < n_images]


class VectorStream(Iterator[dict[str, Tensor]]):
    """Batches of vectors, each vector once per epoch; a batch may extend into the next epoch.

    `next` gives, for each site, float32 [batch_size, d_in]; row i is the same position of the same
    image at each site. Only one thread may use it at a time.

    Args:
        plan: the grouping of the images.
        load: returns the vectors of some images.
        sites: the sites in a batch.
        batch_size: number of vectors per batch.
        seed: seed of the order.
        vectors_per_epoch: total number of vectors.
        where: names the place of a vector that is not finite, for the error.
        prefetch: load the next window in a thread while this one is used; a `Prefetcher` then makes
            batches ahead as well.

    Raises:
        UserError: a number is out of range.
    """

    def __init__(
        self,
        plan: WindowPlan,
        load: LoadWindow,
        sites: Sequence[str],
        batch_size: int,
        *,
        seed: int,
        vectors_per_epoch: int,
        where: Callable[[npt.NDArray[np.int64], str], str],
        prefetch: bool,
    ) -> None:
        check_positive(batch_size=batch_size)
        if seed < 0:
            raise UserError(f"seed is {seed}; it must be 0 or more.")
        self.plan = plan
        self.sites = tuple(sites)
        self.batch_size = batch_size
        self.seed = seed
        self.vectors_per_epoch = vectors_per_epoch
        self.prefetch = prefetch
        self._load = load
        self._where = where
        self._pool = ThreadPoolExecutor(1) if prefetch and plan.n_windows > 1 else None
        self._ahead: tuple[Position, Future[Window]] | None = None
        self._at = Position(0, 0)
        self._offset = 0
        self._window: Window | None = None
        self._order = torch.empty(0, dtype=torch.int64)  # of the vectors of the window at `_at`
        self._ready = False

    def __next__(self) -> dict[str, Float[Tensor, "batch d_in"]]:
        parts: dict[str, list[Tensor]] = {site: [] for site in self.sites}
        missing = self.batch_size
        while missing:
            window = self._current()
            chosen = self._order[self._offset : self._offset + missing]
            for site in self.sites:
                parts[site].append(self._take(window, site, chosen))
            self._offset += len(chosen)
            missing -= len(chosen)
            if self._offset >= len(self._order):
                self._go_to(self._after(self._at), 0)
        return {site: p[0] if len(p) == 1 else torch.cat(p) for site, p in parts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as JSON-compatible values."""
        return {
            "seed": self.seed,
            "epoch": self._at.epoch,
            "window": self._at.window,
            "offset": self._offset,
            "n_images": self.plan.n_images,
            "block_images": self.plan.block_images,
            "window_images": self.plan.window_images,
            "vectors_per_epoch": self.vectors_per_epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position.

        Raises:
            UserError: the position belongs to other data, or to another order of them.
        """
        own = self.state_dict()
        for key in own:
            if not isinstance(state.get(key), int):
                raise UserError(f"The saved position is damaged: {key} is {state.get(key)!r}.")
        for key in sorted(own.keys() - {"epoch", "window", "offset"}):
            if state[key] != own[key]:
                raise UserError(
                    f"The saved position belongs to other activations: {key} is {state[key]}, "
                    f"but here it is {own[key]}."
                )
        at = Position(state["epoch"], state["window"])
        if at.epoch < 0 or not 0 <= at.window < self.plan.n_windows or state["offset"] < 0:
            raise UserError(f"The saved position is damaged: it is at {at}, {state['offset']}.")
        self._go_to(at, state["offset"])

    def _take(self, window: Window, site: str, chosen: Tensor) -> Tensor:
        x = window[site].index_select(0, chosen)
        if not all_finite(x):
            images = self.plan.images(self.seed, self._at)
            raise SparsightError(
                f"Activations at {site} are NaN or infinite in {self._where(images, site)}."
            )
        return x.float()

    def _go_to(self, at: Position, offset: int) -> None:
        self._at, self._offset = at, offset
        self._ready = False
        if self.plan.n_windows > 1:  # otherwise the one window serves every epoch
            self._window = None

    def _current(self) -> Window:
        """Return the window at `_at`, or the next one that has an image that can be read."""
        if self._ready and self._window is not None:
            return self._window
        for _ in range(self.plan.n_windows):
            window = self._window if self._window is not None else self._fetch(self._at)
            n = len(window[self.sites[0]])
            if n:
                break
            self._go_to(self._after(self._at), 0)
        else:
            raise SparsightError("Not a single image could be read in a whole epoch.")
        self._window, self._ready = window, True
        shuffle = np.random.default_rng([self.seed, *self._at, 1])
        self._order = torch.from_numpy(shuffle.permutation(n))
        if self._pool is not None:
            following = self._after(self._at)
            self._ahead = (following, self._pool.submit(self._read, following))
        return window

    def _fetch(self, at: Position) -> Window:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == at:
            return ahead[1].result()
        if ahead is not None:
            wait([ahead[1]])  # windows are loaded one after another
        return self._read(at)

    def _read(self, at: Position) -> Window:
        return self._load(at, self.plan.images(self.seed, at))

    def _after(self, at: Position) -> Position:
        if at.window + 1 < self.plan.n_windows:
            return Position(at.epoch, at.window + 1)
        return Position(at.epoch + 1, 0)
