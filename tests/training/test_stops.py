"""Ctrl-C, SIGTERM, checkpoints by time, damaged files: what is kept, and what messages say."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_resume import CONFIG, SITES, _assert_same, _interrupt, _resume

from memory_activations import MemoryStream, sparse_mixtures
from sparsight import pace
from sparsight.errors import UserError
from sparsight.interruption import Terminated, postponed
from sparsight.latents.run_files import find_runs
from sparsight.pace import Pace
from sparsight.training import Run, checkpoint, train
from sparsight.training.trainer import SiteTraining

TOTAL = f"{CONFIG.n_steps * CONFIG.batch_size:,}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return the run that was never stopped."""
    return _resume(tmp_path_factory.mktemp("whole"))


def _send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def stop_in_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Send signals by step; each arrives after the first site has taken half of the step."""
    wanted: list[tuple[int, int]] = []
    step = SiteTraining.step

    def step_then_stop(self, x, number, factor, target) -> None:
        step(self, x, number, factor, target)
        if wanted and self.sae.metadata["site"] == SITES[0] and wanted[0][0] == number:
            _send(wanted.pop(0)[1])

    monkeypatch.setattr(SiteTraining, "step", step_then_stop)
    yield wanted


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_stopped_run_keeps_every_step_says_so_and_ends_with_the_same_bits(
    number: int, raised: type[BaseException], stop_in_step, tmp_path: Path, whole: Run
) -> None:
    for at, kept in ((4, 5), (21, 22), (38, 39)):
        stop_in_step.append((at, number))
        with pytest.raises(raised) as stopped:
            _resume(tmp_path)
        (told,) = stopped.value.__notes__
        assert told == f"Kept {kept * 32:,} of {TOTAL} vectors; the same command goes on."
        assert checkpoint.newest_step(tmp_path / "checkpoints") == kept
    _assert_same(_resume(tmp_path), whole)


def test_a_stop_at_the_last_step_leaves_a_finished_run(stop_in_step, tmp_path: Path) -> None:
    stop_in_step.append((CONFIG.n_steps - 1, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as stopped:
        _resume(tmp_path)
    assert stopped.value.__notes__ == ["Training was already finished, so nothing is lost."]
    assert all(Run(tmp_path, SITES).is_finished(site) for site in SITES)


def test_a_second_signal_stops_the_writing_and_leaves_a_whole_run(
    stop_in_step, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_in_step.append((21, signal.SIGINT))
    save = checkpoint.write_safetensors

    def save_and_stop(tensors, path: Path) -> None:
        if "000000022" in str(path):
            _send()
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_safetensors", save_and_stop)
        with pytest.raises(KeyboardInterrupt) as stopped:
            _resume(tmp_path)
    assert f"Kept 512 of {TOTAL} vectors" in stopped.value.__notes__[0]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "000000008", "000000016",
    ]  # fmt: skip
    _assert_same(_resume(tmp_path), whole)


def test_a_run_that_waits_for_data_stops_at_once_and_keeps_its_work(
    tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch may take a minute if a model computes it."""
    draw = MemoryStream.__next__

    def draw_slowly(self):
        if self.position == 11 * 32:
            _send()
            time.sleep(20)
        return draw(self)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryStream, "prefetch", False)
        patch.setattr(MemoryStream, "__next__", draw_slowly)
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt) as stopped:
            _resume(tmp_path)
    assert time.monotonic() - begun < 15
    assert f"Kept 352 of {TOTAL}" in stopped.value.__notes__[0]
    _assert_same(_resume(tmp_path), whole)


def test_a_run_that_is_stopped_before_its_first_step_says_that_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SiteTraining, "__init__", lambda *_, **options: _send())
    with pytest.raises(KeyboardInterrupt) as stopped:
        _resume(tmp_path)
    assert stopped.value.__notes__ == ["Nothing is kept yet; the same command begins again."]


def test_checkpoints_by_time_change_no_bits_and_may_differ_between_resumes(
    tmp_path: Path, whole: Run, stop_in_step, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "LARGEST_SHARE", 1e9)
    stop_in_step.append((12, signal.SIGINT))
    data, steps = sparse_mixtures(SITES), []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given: steps.append(given[1]) or save(*given))
    with pytest.raises(KeyboardInterrupt):
        train(data, CONFIG, out=tmp_path, checkpoint_seconds=1e-9, quiet=True)
    assert steps == list(range(1, 14))
    assert "checkpoint_seconds" not in (tmp_path / "here" / "config.toml").read_text()
    run = train(data, CONFIG, out=tmp_path, checkpoint_seconds=None, quiet=True)
    assert steps[13:] == [16, 24, 32]
    _assert_same(run, whole)


def test_slow_checkpoints_are_written_less_often_with_a_message() -> None:
    found = Pace(0.01)
    assert not found.due() and found.affordable() and found.stretched() is None
    with found.writing():
        time.sleep(0.02)
    assert found.interval is not None and found.interval >= 0.02 / pace.LARGEST_SHARE
    assert not found.affordable()
    assert "rather than every 0.01 s" in str(found.stretched())
    assert found.stretched() is None  # once
    assert not Pace(None).due()
    with pytest.raises(UserError, match="checkpoint_seconds is 0"):
        Pace(0)


def test_a_postponed_signal_is_raised_at_once_if_nothing_is_under_way() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), postponed() as stop:
        _send()
        reached.append("held back")
        with stop.at_once():
            reached.append("not reached")
    with pytest.raises(Terminated), postponed() as stop, stop.at_once():
        _send(signal.SIGTERM)
        time.sleep(5)
    assert reached == ["held back"]


def _flip(path: Path, after: bytes) -> None:
    """Change one digit after some text."""
    data = bytearray(path.read_bytes())
    place = data.index(after) + len(after)
    place = next(at for at in range(place, len(data)) if chr(data[at]).isdigit())
    data[place] = ord("7") if data[place] != ord("7") else ord("6")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "after", "told"),
    [
        ("checkpoints/000000016/state.json", b'"position":', "damaged checkpoint: .*000000016"),
        ("checkpoints/000000016/state.json", b'"step":', "damaged checkpoint: .*000000016"),
        ("checkpoints/000000016/here/metrics.jsonl", b'"fvu":', "damaged checkpoint: .*000000016"),
        ("here/metrics.jsonl", b'"fvu":', r"metrics\.jsonl: is damaged or was changed"),
        ("there/config.toml", b"log_every", r"log_every.*counts as damaged"),
        ("here/config.toml", b"activations", r"other activations.*counts as damaged"),
    ],
)
def test_a_changed_byte_is_detected_and_does_no_harm(
    file: str, after: bytes, told: str, tmp_path: Path, whole: Run, monkeypatch
) -> None:
    _interrupt(tmp_path, monkeypatch)
    _flip(tmp_path / file, after)
    with pytest.warns(UserWarning, match=told):
        run = _resume(tmp_path)
    _assert_same(run, whole)
    assert (run.folder("here") / "config.toml").read_text().count("log_every = 96") == 1


def test_a_checkpoint_that_was_skipped_does_not_come_back(
    tmp_path: Path, stop_in_step, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is reported as kept must be what the run finds again."""
    _interrupt(tmp_path, monkeypatch)
    _flip(tmp_path / "checkpoints/000000016/state.json", b'"position":')
    stop_in_step.append((9, signal.SIGINT))
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(KeyboardInterrupt) as stopped:
        _resume(tmp_path)
    assert f"Kept 320 of {TOTAL}" in stopped.value.__notes__[0]
    assert checkpoint.newest_step(tmp_path / "checkpoints") == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _assert_same(_resume(tmp_path), whole)


def test_checkpoints_of_another_run_are_refused_even_without_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(tmp_path, monkeypatch)
    for site in SITES:
        (tmp_path / site / "config.toml").unlink()
    other = dataclasses.replace(CONFIG, lr=1e-3)
    with pytest.raises(UserError, match=r"differs in 'train\.lr' \(0\.003 there, 0\.001 now\)"):
        train(sparse_mixtures(SITES), other, out=tmp_path, quiet=True)


def test_the_next_run_removes_what_a_killed_process_left(
    tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave() -> None:
        for place in (".lock", "here/.sae.safetensors.abc.tmp", "checkpoints/.000000016.tmp/x"):
            (tmp_path / place).parent.mkdir(exist_ok=True)
            (tmp_path / place).write_text("half")

    _interrupt(tmp_path, monkeypatch)
    others = tmp_path / "here" / ".index.tmp"  # which `index` may be writing now
    others.mkdir()
    for _ in range(2):  # an unfinished run, then a finished one
        leave()
        _assert_same(_resume(tmp_path), whole)
        assert list(tmp_path.rglob(".*")) == [others]


def test_no_run_begins_in_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    (tmp_path / ".hidden").write_text("of no account")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".lock").write_text("")
    with pytest.raises(UserError, match=r"holds other files \(photo\.jpg\) and no run"):
        train(sparse_mixtures(), CONFIG, out=tmp_path, quiet=True)
    with pytest.raises(UserError, match="is a file"):
        train(sparse_mixtures(), CONFIG, out=tmp_path / "photo.jpg", quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "begun", "photo.jpg"]


def test_an_unfinished_run_is_reported_with_the_command_to_continue_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _interrupt(tmp_path / "cut", monkeypatch)
    told = rf"cut: training is unfinished: 512 of {TOTAL} vectors\. .*`sparsight train --config "
    for folder in (tmp_path, tmp_path / "cut", tmp_path / "cut" / "here"):
        with pytest.raises(UserError, match=told):
            find_runs(folder)
    train(sparse_mixtures(), CONFIG, out=tmp_path / "done", quiet=True)
    caplog.set_level("INFO", logger="sparsight")
    assert find_runs(tmp_path) == [tmp_path / "done"]
    assert "Left out:" in caplog.text and "training is unfinished" in caplog.text


def _stop_at_random(tmp_path: Path, what: str, n: int, seed: int) -> None:
    script = Path(__file__).with_name("stopped_runs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, what, str(n), str(seed), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="commands run in forks")
def test_commands_that_are_stopped_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    _stop_at_random(tmp_path, "train", 1, seed=3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="commands run in forks")
@pytest.mark.parametrize(("what", "n"), [("train", 30), ("sweep", 20), ("finetune", 20)])
def test_many_commands_that_are_stopped_or_killed_lose_nothing(
    what: str, n: int, tmp_path: Path
) -> None:
    _stop_at_random(tmp_path, what, n, seed=1)
