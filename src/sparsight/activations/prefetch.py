"""Batches made ahead of the training steps that need them, and moved to the training device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, Self, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

AHEAD = 2
"""Number of batches made before they are asked for."""


@runtime_checkable
class Batches(Protocol):
    """What a prefetcher draws batches from, such as a `VectorStream`."""

    vectors_per_epoch: int
    prefetch: bool

    def __next__(self) -> dict[str, Tensor]:
        """Return the next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as JSON-compatible values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""


class _Made(NamedTuple):
    """A batch that is ready, or will be once the device has reached `arrived`."""

    batch: dict[str, Tensor]
    cursor: dict[str, Any]
    arrived: torch.cuda.Event | None


class Prefetcher(Iterator[dict[str, Tensor]]):
    """A stream's batches on a device; a thread makes the next ones in the meantime.

    The thread ends with `close`, with the end of a `with` block, or when this object is dropped. An
    error in the thread is raised when the batch in which it occurred is asked for, and on every
    later call. For a GPU, batches lie in pinned memory and are copied while other work is under
    way.

    Args:
        stream: source of the batches; nothing else may use it in the meantime.
        sites: which of its sites are needed.
        device: where the batches go.
        ahead: number of batches made ahead; 0 makes each one when it is asked for. By default 0 if
            the stream does not load ahead itself.
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
            ready = self._made[0].result()
            self._made.popleft()
        else:
            ready = self._maker.make()
        self._cursor = ready.cursor
        if ready.arrived is not None:
            now = torch.cuda.current_stream(self._maker.device)
            now.wait_event(ready.arrived)
            for x in ready.batch.values():
                x.record_stream(now)
        return ready.batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was handed out."""
        return dict(self._cursor)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; batches that were made ahead are discarded.

        Raises:
            UserError: as in `VectorStream.load_state_dict`.
        """
        self.close()
        self._maker.stream.load_state_dict(state)
        self._maker.error = None
        self._cursor = self._maker.stream.state_dict()

    def close(self) -> None:
        """End the thread, once it has finished the batch that it is making."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        if self._made:
            # The stream is ahead of what was handed out: take it back.
            self._made.clear()
            self._maker.stream.load_state_dict(self._cursor)

    def _fill(self) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "prefetch")
        while len(self._made) < 1 + self.ahead:
            self._made.append(self._pool.submit(self._maker.make))


class _Maker:
    """The state of the thread. It must not hold the prefetcher, or that could never be dropped."""

    def __init__(self, stream: Batches, sites: tuple[str, ...], device: torch.device) -> None:
        self.stream = stream
        self.sites = sites
        self.device = device
        self.error: BaseException | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def make(self) -> _Made:
        """Make the next batch; after an error, make none, so that no batch is skipped."""
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
