from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from activation_parts import BLOCK_0, BLOCK_1
from sparsight.activations import ActivationStore, Prefetcher, VectorStream, store
from sparsight.errors import SparsightError

CPU = torch.device("cpu")


class Counting:
    """Batches that hold their own number; one of them is an error."""

    vectors_per_epoch = 1000
    prefetch = True

    def __init__(self, bad: int | None = None) -> None:
        self.position = 0
        self.bad = bad
        self.threads: set[int] = set()

    def __next__(self) -> dict[str, Tensor]:
        self.threads.add(threading.get_ident())
        if self.position == self.bad:
            self.position += 1
            raise SparsightError(f"batch {self.bad} is broken")
        self.position += 1
        return {site: torch.full((2, 3), float(self.position - 1)) for site in ("here", "there")}

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def _number(batch: dict[str, Tensor]) -> int:
    return int(batch["here"][0, 0])


def _prefetch_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("prefetch")]


def _until_none_is_left() -> None:
    started = time.monotonic()
    while _prefetch_threads() and time.monotonic() - started < 10:
        time.sleep(0.01)
    assert not _prefetch_threads()


@pytest.fixture
def windowed(kept_store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> ActivationStore:
    monkeypatch.setattr(store, "WINDOW_BYTES", 4 * 5 * 2 * 32 * 4)
    monkeypatch.setattr(store, "BLOCK_BYTES", 3 * 5 * 32 * 4)
    return kept_store


def _stream(source: ActivationStore) -> VectorStream:
    return source.stream([BLOCK_0, BLOCK_1], 9, seed=2)


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_batches_and_positions_are_those_of_the_stream(
    windowed: ActivationStore, ahead: int
) -> None:
    plain = _stream(windowed)
    with Prefetcher(_stream(windowed), [BLOCK_0, BLOCK_1], CPU, ahead) as batches:
        assert batches.vectors_per_epoch == plain.vectors_per_epoch
        assert batches.state_dict() == plain.state_dict()
        for _ in range(30):
            mine, theirs = next(batches), next(plain)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[site], theirs[site]) for site in theirs)
            assert batches.state_dict() == plain.state_dict()


def test_a_position_continues_in_another_prefetcher_and_in_the_same(
    windowed: ActivationStore,
) -> None:
    batches = Prefetcher(_stream(windowed), [BLOCK_0], CPU)
    drawn, cursors = [], []
    for _ in range(20):
        cursors.append(batches.state_dict())
        drawn.append(next(batches)[BLOCK_0])
    for each in (batches, Prefetcher(_stream(windowed), [BLOCK_0], CPU)):
        each.load_state_dict(cursors[7])
        assert each.state_dict() == cursors[7]
        assert all(torch.equal(next(each)[BLOCK_0], x) for x in drawn[7:])
        each.close()


def test_a_thread_makes_batches_ahead_and_no_more_than_asked_for() -> None:
    stream = Counting()
    with Prefetcher(stream, ["here"], CPU) as batches:
        assert next(batches).keys() == {"here"}
        started = time.monotonic()
        while stream.position < 3 and time.monotonic() - started < 10:
            time.sleep(0.001)
        time.sleep(0.05)
        assert stream.position == 3 and batches.state_dict() == {"position": 1}
    assert threading.get_ident() not in stream.threads and len(stream.threads) == 1


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_is_raised_at_its_own_batch_and_again_after_it(ahead: int) -> None:
    batches = Prefetcher(Counting(bad=4), ["here"], CPU, ahead)
    assert [_number(next(batches)) for _ in range(4)] == [0, 1, 2, 3]
    for _ in range(3):
        with pytest.raises(SparsightError, match="batch 4 is broken"):
            next(batches)
    assert batches.state_dict() == {"position": 4}
    batches.close()


def test_a_stream_that_does_not_load_ahead_is_drawn_on_in_the_thread_that_asks() -> None:
    stream = Counting()
    stream.prefetch = False
    batches = Prefetcher(stream, ["here"], CPU)
    assert [_number(next(batches)) for _ in range(3)] == [0, 1, 2]
    assert stream.threads == {threading.get_ident()} and stream.position == 3


def test_the_thread_ends_with_the_block_whatever_ends_it() -> None:
    stream = Counting()
    with pytest.raises(KeyError), Prefetcher(stream, ["here"], CPU) as batches:
        next(batches)
        assert _prefetch_threads()
        raise KeyError
    assert not _prefetch_threads()
    assert stream.position == 1  # where the batches that were handed out end
    assert _number(next(batches)) == 1
    batches.close()


def test_the_thread_ends_when_the_prefetcher_is_dropped() -> None:
    batches = Prefetcher(Counting(), ["here"], CPU)
    next(batches)
    assert _prefetch_threads()
    del batches
    gc.collect()
    _until_none_is_left()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_numbers(windowed: ActivationStore) -> None:
    plain = _stream(windowed)
    with Prefetcher(_stream(windowed), [BLOCK_0, BLOCK_1], torch.device("cuda")) as batches:
        for _ in range(30):
            mine, theirs = next(batches), next(plain)
            assert all(mine[site].is_cuda for site in mine)
            assert all(torch.equal(mine[site].cpu(), theirs[site]) for site in theirs)
