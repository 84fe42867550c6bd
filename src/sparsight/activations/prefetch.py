"""Batches made ahead of the steps that train on them, and brought to where they train."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, Self, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

AHEAD = 2
"""Batches that are made before they are asked for."""


@runtime_checkable
class Batches(Protocol):
    """What a prefetcher draws on; a `VectorStream` is such."""

    vectors_per_epoch: int
    prefetch: bool

    def __next__(self) -> dict[str, Tensor]:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON takes it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""


class _Made(NamedTuple):
    """A batch that is ready, or will be once the device has seen `arrived`."""

    batch: dict[str, Tensor]
    cursor: dict[str, Any]
    arrived: torch.cuda.Event | None


class Prefetcher(Iterator[dict[str, Tensor]]):
    """The batches of a stream on a device, the next ones made in a thread meanwhile.

    The thread ends with `close`, with the block that `with` opens, or when this object is dropped.
    What goes wrong in it is raised where the batch that it befell is asked for, and again after
    that. For a GPU, batches lie in pinned memory and are copied beside the work that is under way.

    Args:
        stream: where batches come from; not to be used otherwise meanwhile.
        sites: which of its sites are needed.
        device: where batches go.
        ahead: how many batches are made ahead; 0 makes each when it is asked for. By default none
            where the stream does not load ahead itself.
    """

    def __init__(
        self,
        stream: Batches,
        sites: Sequence[str],
        device: torch.device,
        ahead: int | None = None,
    ) -> None:
        self.vectors_per_epoch = stream.vectors_per_epoch
        self.ahead = (AHEAD if stream.prefetch else 0) if ahead is None else ahead
        self._maker = _Maker(stream, tuple(sites), device)
        self._cursor = stream.state_dict()
        self._pool: ThreadPoolExecutor | None = None
        self._made: deque[Future[_Made]] = deque()

    def __next__(self) -> dict[str, Float[Tensor, "batch d_in"]]:
        if self.ahead:
            self._fill()
            made = self._made[0].result()
            self._made.popleft()
        else:
            made = self._maker.make()
        self._cursor = made.cursor
        if made.arrived is not None:
            now = torch.cuda.current_stream(self._maker.device)
            now.wait_event(made.arrived)
            for x in made.batch.values():
                x.record_stream(now)
        return made.batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch that was handed out."""
        return dict(self._cursor)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; what was made ahead is thrown away.

        Raises:
            UserError: see `VectorStream.load_state_dict`.
        """
        self.close()
        self._maker.stream.load_state_dict(state)
        self._maker.error = None
        self._cursor = self._maker.stream.state_dict()

    def close(self) -> None:
        """End the thread, once the batch that it is at is made."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        if self._made:
            # The stream stands behind what was made ahead: back to what was handed out.
            self._made.clear()
            self._maker.stream.load_state_dict(self._cursor)

    def _fill(self) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "prefetch")
        while len(self._made) < 1 + self.ahead:
            self._made.append(self._pool.submit(self._maker.make))


class _Maker:
    """What the thread holds: not the prefetcher, which could not be dropped then."""

    def __init__(self, stream: Batches, sites: tuple[str, ...], device: torch.device) -> None:
        self.stream = stream
        self.sites = sites
        self.device = device
        self.error: BaseException | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def make(self) -> _Made:
        """The next batch; nothing more after an error, or else a batch would be left out."""
        if self.error is not None:
            raise self.error
        try:
            batch = next(self.stream)
            return self._moved({site: batch[site] for site in self.sites})
        except BaseException as error:
            self.error = error
            raise

    def _moved(self, batch: dict[str, Tensor]) -> _Made:
        cursor = self.stream.state_dict()
        if self._copies is None:
            return _Made({site: x.to(self.device) for site, x in batch.items()}, cursor, None)
        with torch.cuda.stream(self._copies):
            moved = {
                site: x.pin_memory().to(self.device, non_blocking=True) for site, x in batch.items()
            }
            arrived = cast(torch.cuda.Event, self._copies.record_event())
        return _Made(moved, cursor, arrived)
