"""A shuffled stream of vectors with a cursor that can be saved.

An epoch is a permutation of blocks (runs of images), cut into windows that fit in memory; the
vectors of a window are permuted again. Everything follows from seed, epoch and window, so that the
cursor is three numbers, and a restored stream gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.errors import SparsightError, UserError

Window = dict[str, Tensor]
LoadWindow = Callable[[np.ndarray], Window]
"""From the numbers of the images of a window to its vectors [vectors, d_in] at each site."""


@dataclass(frozen=True)
class WindowPlan:
    """How images are grouped.

    Attributes:
        n_images: images an epoch.
        block_images: images that stay neighbours on the way into a window.
        window_images: images that are mixed with one another.
    """

    n_images: int
    block_images: int
    window_images: int

    def __post_init__(self) -> None:
        if self.n_images < 1:
            raise UserError("There are no activations to stream: not one image was read.")

    @property
    def n_windows(self) -> int:
        """Windows an epoch."""
        return -(-self.n_images // self.window_images)

    def images(self, seed: int, epoch: int, window: int) -> np.ndarray:
        """The images of a window, block after block."""
        n_blocks = -(-self.n_images // self.block_images)
        order = np.random.default_rng([seed, epoch]).permutation(n_blocks)
        images = (order[:, None] * self.block_images + np.arange(self.block_images)).ravel()
        images = images[images < self.n_images]
        return images[window * self.window_images : (window + 1) * self.window_images]


class VectorStream(Iterator[dict[str, Tensor]]):
    """Batches of vectors, each vector once an epoch; a batch may reach into the next epoch.

    Args:
        plan: the grouping.
        load: gives the vectors of some images.
        sites: what a batch holds.
        batch_size: vectors a batch.
        seed: of the order.
        vectors_per_epoch: how many vectors there are.
        where: names the place of a vector that is not finite, for the error.
        prefetch: load the next window in a thread while this one is consumed.
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
        where: Callable[[np.ndarray, str], str],
        prefetch: bool,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1.")
        self.plan = plan
        self.sites = tuple(sites)
        self.batch_size = batch_size
        self.seed = seed
        self.vectors_per_epoch = vectors_per_epoch
        self._load = load
        self._where = where
        self._pool = ThreadPoolExecutor(1) if prefetch else None
        self._ahead: tuple[tuple[int, int], Future[Window]] | None = None
        self._at = (0, 0)
        self._offset = 0
        self._window: Window | None = None
        self._order = torch.empty(0, dtype=torch.int64)
        self._empty_windows = 0

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
                self._advance()
        return {site: p[0] if len(p) == 1 else torch.cat(p) for site, p in parts.items()}

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON takes it."""
        return {
            "seed": self.seed,
            "epoch": self._at[0],
            "window": self._at[1],
            "offset": self._offset,
            "n_images": self.plan.n_images,
            "window_images": self.plan.window_images,
            "block_images": self.plan.block_images,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position.

        Raises:
            UserError: the position is one in other data, or in another order of them.
        """
        own = self.state_dict()
        for key in ("seed", "n_images", "window_images", "block_images"):
            if state.get(key) != own[key]:
                raise UserError(
                    f"The saved position belongs to other activations: {key} is {state.get(key)}, "
                    f"here {own[key]}."
                )
        self._at = (state["epoch"], state["window"])
        self._offset = state["offset"]
        self._window = None

    def _take(self, window: Window, site: str, chosen: Tensor) -> Tensor:
        x = window[site].index_select(0, chosen).float()
        # A sum is not finite as soon as one entry is not, and is far cheaper to look at.
        if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
            images = self.plan.images(self.seed, *self._at)
            raise SparsightError(
                f"Activations at {site} are NaN or infinite in {self._where(images, site)}."
            )
        return x

    def _current(self) -> Window:
        if self._window is None:
            while True:
                self._window = self._fetch(self._at)
                n = len(self._window[self.sites[0]])
                if n:
                    break
                self._empty_windows += 1
                if self._empty_windows > self.plan.n_windows:
                    raise SparsightError("Not one image of a whole epoch could be read.")
                self._at = self._after(self._at)
            self._empty_windows = 0
            shuffle = np.random.default_rng([self.seed, *self._at, 1])
            self._order = torch.from_numpy(shuffle.permutation(n))
            if self._pool is not None:
                following = self._after(self._at)
                self._ahead = (following, self._pool.submit(self._read, following))
        return self._window

    def _fetch(self, at: tuple[int, int]) -> Window:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == at:
            return ahead[1].result()
        return self._read(at)

    def _read(self, at: tuple[int, int]) -> Window:
        return self._load(self.plan.images(self.seed, *at))

    def _after(self, at: tuple[int, int]) -> tuple[int, int]:
        epoch, window = at
        return (epoch, window + 1) if window + 1 < self.plan.n_windows else (epoch + 1, 0)

    def _advance(self) -> None:
        self._at = self._after(self._at)
        self._offset = 0
        self._window = None
