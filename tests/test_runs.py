"""What every run stands on: a claimed folder, checkpoints in time, what is said of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from sparsight import pace
from sparsight.errors import UserError
from sparsight.files import write_text
from sparsight.interruption import postponed
from sparsight.pace import Pace
from sparsight.runs import checkpoint_files
from sparsight.runs.folder import claimed
from sparsight.runs.loop import CheckpointedLoop
from sparsight.runs.same_run import damaged_if, refuse_difference, refuse_other_checkpoint


class Counting(CheckpointedLoop):
    """Counts to ten; a checkpoint is the number so far."""

    def __init__(self, folder: Path, seconds: float | None = None) -> None:
        super().__init__(folder, Pace(seconds))
        self.told: list[str] = []

    def save(self) -> None:
        def write(partial: Path) -> list[str]:
            write_text(partial / "number", str(self.step))
            return ["number"]

        checkpoint_files.write(self.checkpoints, self.step, {}, write)

    def tell(self, text: str) -> None:
        self.told.append(text)

    def count(self, every: int = 4, wanted: bool = True, stop_at: int | None = None) -> None:
        with postponed() as stop:
            while self.step < 10:
                with self.kept_when_stopped():
                    stop.check()
                self.step += 1
                if self.step == stop_at:
                    os.kill(os.getpid(), signal.SIGINT)
                if self.is_due(every, wanted):
                    self.keep()


def steps(folder: Path) -> list[int]:
    return [int(path.name) for path in checkpoint_files.found(folder)]


def test_a_loop_keeps_every_n_steps_and_the_step_at_which_it_is_stopped(
    tmp_path: Path,
) -> None:
    loop = Counting(tmp_path)
    assert loop.what_stays() == "there is no checkpoint yet"
    with pytest.raises(KeyboardInterrupt):
        loop.count(stop_at=7)
    assert (loop.step, loop.kept_step, steps(tmp_path)) == (7, 7, [4, 7])
    assert loop.what_stays() == f"the last good checkpoint is {tmp_path / '000000007'}"


def test_a_step_that_is_kept_is_not_written_again_when_the_loop_is_stopped(tmp_path: Path) -> None:
    loop = Counting(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        loop.count(stop_at=8)
    before = (tmp_path / "000000008").stat().st_mtime_ns
    with pytest.raises(KeyboardInterrupt), loop.kept_when_stopped():
        raise KeyboardInterrupt
    assert (tmp_path / "000000008").stat().st_mtime_ns == before


def test_a_loop_keeps_by_time_too_and_says_once_that_writing_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Counting(tmp_path, seconds=1e-9)
    loop.count(every=1000)
    assert 1 in steps(tmp_path) and len(loop.told) == 1
    assert "rather than every 1e-09 s" in loop.told[0]
    monkeypatch.setattr(pace, "LARGEST_SHARE", 1e9)
    Counting(tmp_path / "cheap", seconds=1e-9).count(every=1000)
    assert steps(tmp_path / "cheap") == [9, 10]


def test_a_number_of_steps_that_nobody_asked_for_waits_until_writing_is_cheap(
    tmp_path: Path,
) -> None:
    Counting(tmp_path / "asked").count(every=1)
    assert steps(tmp_path / "asked") == [9, 10]
    loop = Counting(tmp_path / "free")
    loop.count(every=1, wanted=False)
    assert steps(tmp_path / "free")[0] == 1 and loop.kept_step < 10


def test_a_folder_is_claimed_by_one_process_at_a_time(tmp_path: Path) -> None:
    with claimed(tmp_path / "run", "counting in"):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with claimed(tmp_path / "run", "counting in"):
                    pass
            except UserError as error:
                code = 0 if "another process is counting in it" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list((tmp_path / "run").iterdir()) == []


def test_what_differs_is_named_and_a_field_that_says_nothing_is_no_difference(
    tmp_path: Path,
) -> None:
    own = {"train": {"lr": 1.0, "ema": None}}
    refuse_difference(tmp_path, {"train": {"lr": 1.0}}, own)
    refuse_other_checkpoint(tmp_path, {"train": {"lr": 1.0}}, own)  # of a version without `ema`
    refuse_other_checkpoint(tmp_path, None, own)
    with pytest.raises(UserError, match=r"a run that differs in 'train\.lr' \(2\.0 there, 1\.0 no"):
        refuse_difference(tmp_path, {"train": {"lr": 2.0}}, own)
    with pytest.raises(UserError, match=r"checkpoints of a run that differs in 'train\.ema' \(0"):
        refuse_other_checkpoint(tmp_path, {"train": {"lr": 1.0, "ema": 0.9}}, own)


def test_a_configuration_that_contradicts_the_checkpoints_counts_as_damaged(
    tmp_path: Path,
) -> None:
    told = pytest.warns(UserWarning, match="config says otherwise.*counts as damaged")
    with told, damaged_if(begun=True):
        raise UserError("config says otherwise.")
    with pytest.raises(UserError, match="says otherwise"), damaged_if(begun=False):
        raise UserError("config says otherwise.")
