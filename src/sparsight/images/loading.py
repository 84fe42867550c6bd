"""Batches of decoded, transformed images, in order, prepared by worker processes."""

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
    """Consecutive images, transformed and stacked."""

    indices: list[int]
    """Places in the source of the images that loaded, one per row of `pixels`."""
    pixels: Shaped[Tensor, "batch ..."]
    """The transform's outputs, stacked; of shape [0] if no image loaded."""
    sizes: list[tuple[int, int]]
    """Width and height, in pixels, of the upright images before the transform."""
    failures: list[tuple[int, str]]
    """Place in the source, and reason, for each image that did not load."""


def default_workers() -> int:
    """Return the number of processors that this process may use minus one, at most 8."""
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
    """Load images in order, `batch_size` at a time; the last batch may be smaller.

    An image that does not load, or on which the transform fails, goes into its batch's `failures`.
    Decoding and transform run in worker processes with one torch thread each; pixels come back
    through shared memory.

    Args:
        source: where the images come from.
        transform: maps an RGB image to a tensor, always of the same shape and dtype; picklable.
        batch_size: images per batch, including those that fail.
        indices: places in the source, in the order wanted; all by default.
        workers: number of processes; 0 loads images in this one. By default `default_workers()`, or
            0 if there are too few images for starting a process to pay off.
        min_side: shortest side, in pixels, down to which a JPEG may be scaled while it is decoded
            (see `decode_image`); None decodes it in full.
        prefetch: number of batches that each worker prepares ahead.
        start_method: how workers start; by default as Python does on this platform.

    Raises:
        UserError: a number is below its range, or the source has no such index.
        SparsightError: the transform gave no tensor, or tensors of different shapes or dtypes; or a
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
    """An exception on its way out of a worker, as text, because not every exception pickles."""

    message: str
    traceback: str
    by_user: bool


@dataclass(frozen=True)
class _Batches(Dataset[ImageBatch | _Fault]):
    """The batches as a map-style data set, so that a worker makes a whole batch at a time."""

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
                image = (
                    self.source.load(index)
                    if self.min_side is None
                    else self.source.load(index, self.min_side)
                )
                size = whole_size(image)
                tensors.append(self._transformed(image))
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
        except Exception as error:  # from others' code, on an image that nobody has seen before
            reason = f"the transform failed ({type(error).__name__}: {error})"
            raise ImageError(reason) from error
        if not isinstance(tensor, Tensor):
            raise SparsightError(f"The transform gave a {type(tensor).__name__}, not a tensor.")
        return tensor


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Limit torch to one thread: on a busy machine, several make small copies 100 × slower."""
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
    """Start the workers from a separate thread.

    From the main thread, torch would install a signal handler that raises in the middle of the
    caller's code when a worker dies. Without it, `next` notices the death within seconds.
    """
    started: list[Iterator[ImageBatch | _Fault]] = []
    errors: list[BaseException] = []
    done = threading.Event()  # `join`, interrupted by a signal, believes that the thread has ended

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
    except BaseException:  # the user stops the run
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
