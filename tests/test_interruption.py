from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from sparsight.interruption import Stop, Terminated, postponed

RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals work otherwise on Windows")


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """A parent in the background may ignore interrupts, and its children inherit that."""
    before = {number: signal.getsignal(number) for number in RAISED}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", RAISED)
def test_a_signal_waits_for_the_check(number: int) -> None:
    done = []
    with pytest.raises(RAISED[number]), postponed() as stop:
        send(number)
        done.append("the step under way")
        stop.check()
        done.append("the next step")
    assert done == ["the step under way"]


@pytest.mark.parametrize("number", RAISED)
def test_a_signal_is_raised_at_the_end_of_a_block_that_never_asked(number: int) -> None:
    done = []
    with pytest.raises(RAISED[number]), postponed():
        send(number)
        done.append("everything")
    assert done == ["everything"]


def test_a_second_signal_stops_at_once() -> None:
    done = []
    with pytest.raises(Terminated), postponed():
        send(signal.SIGINT)
        done.append("the step under way")
        send(signal.SIGTERM)
        done.append("its end")
    assert done == ["the step under way"]


@pytest.mark.parametrize("number", RAISED)
def test_a_signal_ends_a_wait_at_once(number: int) -> None:
    done = []
    with pytest.raises(RAISED[number]), postponed() as stop, stop.at_once():
        send(number)
        done.append("the end of the wait")
    assert done == []


def test_a_signal_from_before_a_wait_ends_it_too_and_a_finished_wait_lets_none_through() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), postponed() as stop:
        with stop.at_once():
            done.append("a wait")
        send(signal.SIGINT)
        done.append("a step")
        with stop.at_once():
            done.append("another wait")
    assert done == ["a wait", "a step"]


def test_handlers_are_those_of_before_once_the_block_ends() -> None:
    with postponed():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_a_program_that_ignores_or_handles_a_signal_keeps_doing_so(
    handler: Callable[..., None],
) -> None:
    signal.signal(signal.SIGINT, handler)
    with postponed() as stop:
        send(signal.SIGINT)
        stop.check()


def test_outside_the_main_thread_nothing_is_held_back() -> None:
    found: list[Stop] = []

    def work() -> None:
        with postponed() as stop:
            stop.check()
            found.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].signal is None
