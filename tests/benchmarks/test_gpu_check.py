"""The GPU check, run on the CPU: what it measures and reports."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_check
from contenders import NO_TIME, SHAPES, Result, Task, race
from gpu_check import Options, Reading, Report
from PIL import Image
from turns import take_turns

FACTS = {"peak_gib": 1.0, "loss": 0.25, "note": "", "built_gib": 0.5}


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "GPU.md", {"driver": "580.1"})


def options(report: Report, **more: Any) -> Options:
    return Options(
        shapes=("XS",), batch_sizes=(64,), ours=("torch", "dense"), rounds=1, steps=1, n_images=4,
        batch_size=2, workers=0, device="cpu", tests=False, out=report.out, **more,
    )  # fmt: skip


def results(**facts: dict[str, Any]) -> list[Result]:
    found = {"triton": FACTS, "torch": FACTS, "dense": FACTS} | facts
    seconds = {"triton": 0.002, "torch": 0.004, "dense": 0.01}
    return [Result(f"sparsight-{name}", [seconds[name]], each) for name, each in found.items()]


def test_steps_are_compared_with_dense_autograd_and_must_have_its_losses() -> None:
    rows = gpu_check.step_rows("XS", SHAPES["XS"], results(triton=FACTS | {"loss": 0.2501}))
    assert [row["times dense"] for row in rows] == ["5.00", "2.50", "1.00"]
    assert [row["note"] for row in rows] == ["", "", ""]
    for loss in (0.26, float("nan")):
        rows = gpu_check.step_rows("XS", SHAPES["XS"], results(triton=FACTS | {"loss": loss}))
        assert "FVU is off that of sparsight-dense" in rows[0]["note"]
        assert [row["note"] for row in rows[1:]] == ["", ""]


def test_without_dense_autograd_losses_are_compared_with_plain_torch() -> None:
    found = results(triton=FACTS | {"loss": 0.3})
    found[2].error = "OutOfMemoryError: CUDA out of memory | 4 GiB"
    rows = gpu_check.step_rows("XS", SHAPES["XS"], found)
    assert "off that of sparsight-torch" in rows[0]["note"]
    assert rows[2]["note"] == "not measured: OutOfMemoryError: CUDA out of memory / 4 GiB"


def test_failures_count_but_missing_time_or_memory_does_not(report: Report) -> None:
    for note in (NO_TIME, "OutOfMemoryError: CUDA out of memory"):
        report.fail("dense", gpu_check.MISSING + note)
    assert not report.failed
    report.fail("triton", gpu_check.MISSING + "its process ended with status -6")
    assert len(report.failed) == 1


def test_points_without_time_left_are_named(report: Report) -> None:
    gpu_check.measure_steps(report, options(report), time.monotonic() - 1)
    text = report.out.read_text()
    for kernels in ("torch", "dense"):
        assert f"| XS | 64 | {kernels} | – | – | – | – | not measured: {NO_TIME} |" in text
    assert "driver 580.1" in text and not report.failed


def hang(work: None) -> dict[str, Any]:
    time.sleep(600)
    return {}


def test_a_hanging_process_is_stopped_at_the_deadline(tmp_path: Path) -> None:
    started = time.monotonic()
    (result,) = take_turns({"hangs": hang}, None, 1, deadline=started + 0.5)
    task = Task(SHAPES["XS"], data=str(tmp_path / "none.npy"))
    found = race([("sparsight-torch", "ours"), ("sparsight-dense", "ours")], task, "step",
                 rounds=1, calls=1, deadline=time.monotonic() + 0.5)  # fmt: skip
    assert [each.error for each in (result, *found)] == [NO_TIME] * 3
    assert time.monotonic() - started < 300


def test_activations_are_read_at_a_rate_and_compared_with_the_cpu(
    report: Report, tmp_path: Path
) -> None:
    for i in range(4):
        Image.new("RGB", (64, 48), (60 * i, 90, 30)).save(tmp_path / f"{i}.png")
    work = Reading(Path("calibration"), tmp_path, tmp_path / "out", options(report))
    found = gpu_check.read_in_bfloat16(work)
    assert found["seconds"] > 0 and found["forward_ms"] > 0
    assert 0 < found["off"] < gpu_check.AGREE_ACTIVATIONS["bfloat16"]
    row = gpu_check.extraction_row(Result("bfloat16", [0.5], found | {"note": ""}), 4)
    assert row["images/s"] == "8" and row["note"] == ""
    far = found | {"note": "", "off": float("nan")}
    row = gpu_check.extraction_row(Result("bfloat16", [0.5], far), 4)
    assert row["note"] == "activations are not those of the CPU"


def test_tests_that_fail_are_counted_and_named(report: Report, tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n\ndef test_good(): pass\n\ndef test_bad(): assert False\n\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
    )
    gpu_check.run_tests(report, time.monotonic() + 100, [str(file)])
    assert "| 1 | 1 | 1 |" in report.out.read_text()
    assert report.failed == ["tests: failed: test_bad"]


def test_endless_tests_are_stopped(report: Report, tmp_path: Path) -> None:
    file = tmp_path / "test_endless.py"
    file.write_text("import time\n\ndef test_endless(): time.sleep(600)\n")
    gpu_check.run_tests(report, time.monotonic() + 0.5, [str(file)])
    assert report.failed == ["tests: not finished within 0 s"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_cuda_it_says_so_and_writes_nothing(report: Report, capsys) -> None:
    assert gpu_check.main(Options(out=report.out)) == 2
    assert "CUDA has no GPU here" in capsys.readouterr().err
    assert not report.out.exists()


@pytest.mark.slow
def test_the_whole_check_on_a_cpu(report: Report) -> None:
    assert gpu_check.main(options(report)) == 0
    text = report.out.read_text()
    for cells in ("| float32 |", "| bfloat16 |", "| XS | 64 | torch |", "| XS | 64 | dense |"):
        assert cells in text
    assert gpu_check.MISSING not in text
