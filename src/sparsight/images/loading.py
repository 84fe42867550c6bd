"""Batches of decoded, transformed pictures, in order, prepared by worker processes."""

from __future__ import annotations

import math
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Shaped
from PIL import Image
from torch import Tensor, empty, get_num_threads, set_num_threads
from torch.utils.data import DataLoader, Dataset, default_collate

from sparsight.config import check_positive
from sparsight.errors import SparsightError, UserError
from sparsight.images.decoding import ImageError, whole_size
from sparsight.images.source import ImageSource
from sparsight.images.workers import deaf_children, end_workers, watch_parent

MAX_DEFAULT_WORKERS = 8

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class ImageBatch:
    """Some pictures that follow each other, transformed and stacked."""

    indices: list[int]
    """Places in the source of the pictures that loaded; one a row of `pixels`."""
    pixels: Shaped[Tensor, "batch ..."]
    """The transform's outputs, stacked; of shape [0] where not one picture loaded."""
    sizes: list[tuple[int, int]]
    """Width and height, in pixels, of the upright pictures before the transform."""
    failures: list[tuple[int, str]]
    """Place in the source, and reason, of each picture that did not load."""


def default_workers() -> int:
    """One worker a processor that this process may use but one, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    return min(MAX_DEFAULT_WORKERS, processors - 1)


def load_batches(
    source: ImageSource,
    transform: Transform,
    batch_size: int,
    *,
    indices: Sequence[int] | None = None,
    workers: int | None = None,
    min_side: int | None = None,
    prefetch: int = 2,
    start_method: Literal["fork", "spawn", "forkserver"] | None = None,
) -> Iterator[ImageBatch]:
    """Load pictures in order, `batch_size` at a time; the last batch may be smaller.

    An image that does not load, or that the transform fails on, goes into its batch's `failures`.
    Decoding and transform run in worker processes with one torch thread each; pixels come back
    through shared memory.

    Args:
        source: where the pictures come from.
        transform: maps an RGB picture to a tensor, always of the same shape and type; picklable.
        batch_size: pictures a batch, failed ones included.
        indices: places in the source, in the order wanted; all by default.
        workers: processes; 0 works in this one. By default `default_workers()`, and 0 where
            there are too few pictures to be worth the start of a process.
        min_side: pixels that the shorter side of a JPEG may be scaled down to while it is decoded;
            see `decode_image`. By default none is scaled.
        prefetch: batches that each worker prepares ahead.
        start_method: how workers start; Python's default for the platform by default.

    Raises:
        UserError: a number below its range, or an index that the source lacks.
        SparsightError: the transform gave no tensor, or tensors of several shapes or types; or a
            worker died.
    """
    check_positive(batch_size=batch_size, prefetch=prefetch)
    if workers is not None and workers < 0:
        raise UserError(f"workers is {workers}; it must be 0 (this process) or more.")
    chosen = range(len(source)) if indices is None else [int(index) for index in indices]
    for index in chosen if indices is not None else ():
        if not 0 <= index < len(source):
            raise UserError(f"{source.spec}: no image {index}; it has {len(source):,} (0 based).")
    batches = _Batches(source, transform, batch_size, chosen, min_side)
    if workers is None:
        workers = default_workers() if len(batches) > 1 and len(chosen) > 64 else 0
    workers = min(workers, len(batches))
    if workers == 0:
        return (_unwrapped(batches[number]) for number in range(len(batches)))
    loader = DataLoader(
        batches,
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=prefetch,
        multiprocessing_context=start_method,
        worker_init_fn=watch_parent,
    )
    return _from_workers(loader)


@dataclass(frozen=True)
class _Fault:
    """An exception on its way out of a worker, as text: not every exception can be pickled."""

    message: str
    traceback: str
    by_user: bool


@dataclass(frozen=True)
class _Batches(Dataset[ImageBatch | _Fault]):
    """The batches as a map-style data set: a worker makes a whole batch at a time."""

    source: ImageSource
    transform: Transform
    batch_size: int
    indices: Sequence[int]
    min_side: int | None = None

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __getitem__(self, number: int) -> ImageBatch | _Fault:
        start = number * self.batch_size
        try:
            with _one_torch_thread():
                return self._load(self.indices[start : start + self.batch_size])
        except Exception as error:
            return _Fault(_describe(error), traceback.format_exc(), isinstance(error, UserError))

    def _load(self, indices: Sequence[int]) -> ImageBatch:
        loaded: list[int] = []
        tensors: list[Tensor] = []
        sizes: list[tuple[int, int]] = []
        failures: list[tuple[int, str]] = []
        for index in indices:
            try:
                picture = (
                    self.source.load(index)
                    if self.min_side is None
                    else self.source.load(index, self.min_side)
                )
                size = whole_size(picture)
                tensors.append(self._transformed(picture))
            except ImageError as error:
                failures.append((index, error.reason))
                continue
            loaded.append(index)
            sizes.append(size)
        kinds = {(tuple(tensor.shape), tensor.dtype) for tensor in tensors}
        if len(kinds) > 1:
            raise SparsightError(
                "The transform must give tensors of one shape and type; it gave "
                + " and ".join(sorted(f"{list(shape)} {dtype}" for shape, dtype in kinds))
            )
        # In a worker, default_collate stacks straight into shared memory.
        pixels = default_collate(tensors) if tensors else empty(0)
        return ImageBatch(loaded, pixels, sizes, failures)

    def _transformed(self, image: Image.Image) -> Tensor:
        try:
            tensor = self.transform(image)
        except SparsightError:
            raise
        except Exception as error:  # of others' code, on an image that nobody has seen before
            reason = f"the transform failed ({type(error).__name__}: {error})"
            raise ImageError(reason) from error
        if not isinstance(tensor, Tensor):
            raise SparsightError(f"The transform gave a {type(tensor).__name__}, not a tensor.")
        return tensor


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Threads that wait for one another make small copies 100 times slower on a busy machine."""
    threads = get_num_threads()
    set_num_threads(1)
    try:
        yield
    finally:
        set_num_threads(threads)


def _from_workers(loader: DataLoader[Any]) -> Iterator[ImageBatch]:
    batches = _started(loader)
    wanted = True
    try:
        while True:
            try:
                result = next(batches)
            except StopIteration:
                wanted = False
                return
            except (RuntimeError, OSError, EOFError) as error:
                raise SparsightError(_workers_failed(error)) from error
            yield _unwrapped(result)
    finally:
        if wanted:
            end_workers(batches)
        del batches  # its workers end with it


def _started(loader: DataLoader[Any]) -> Iterator[ImageBatch | _Fault]:
    """Start the workers from a thread of its own.

    From the main thread, torch would install a signal handler that raises, wherever the caller
    then is, when a worker dies. Without it the death is noticed, within seconds, in `next`.
    """
    started: list[Iterator[ImageBatch | _Fault]] = []
    errors: list[BaseException] = []
    done = threading.Event()  # a `join` that a signal interrupts takes the thread for ended

    def start() -> None:
        try:
            with deaf_children():
                started.append(iter(loader))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=start, name="sparsight-start-workers").start()
    try:
        done.wait()
    except BaseException:  # a stop
        done.wait()
        if started:
            end_workers(started[0])
        raise
    if errors:
        raise SparsightError(
            f"Image workers could not be started ({errors[0]}). Use workers=0."
        ) from errors[0]
    return started[0]


def _workers_failed(error: Exception) -> str:
    return (
        f"The processes that load images failed ({str(error).strip() or type(error).__name__}). "
        "If memory or /dev/shm is short, use fewer workers, a smaller batch, or workers=0."
    )


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, SparsightError) else f"{type(error).__name__}: {error}"


def _unwrapped(result: ImageBatch | _Fault) -> ImageBatch:
    if not isinstance(result, _Fault):
        return result
    error = (UserError if result.by_user else SparsightError)(result.message)
    error.add_note(result.traceback)
    raise error


def _as_is(batch: Any) -> Any:
    return batch
