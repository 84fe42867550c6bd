"""Check that everything works on a GPU, and how fast: tests, extraction, training, in 8 minutes.

    make gpu-check                      # on a machine with CUDA; installs what is missing
    python benchmarks/gpu_check.py [--budget 480] [--shapes S M] [--out FILE]

It writes GPU.md table by table. Measurements that fail or find no time are named there, and the
rest continues. Losses must agree with those of dense autograd, activations with those of the CPU.
The exit code is 1 if a test or a contender failed or something disagrees, 2 without CUDA.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cuda_driver
import torch
import tyro
from contenders import NO_TIME, SHAPES, Result, Shape, Task, race
from data import save_batches
from extract import save_model, save_photos
from tables import cores, keep
from turns import Job, take_turns

from sparsight.activations import extract
from sparsight.files import write_text
from sparsight.images import open_images
from sparsight.vision import load_model

GPU = Path(__file__).parent / "GPU.md"
ROOT = Path(__file__).parents[1]
HEAD = "# On a GPU\n\nWritten by `make gpu-check`. Compare what stands in one table.\n"

TRUTH, SECOND_TRUTH = "dense", "torch"
"""The kernels whose losses the others must match; dense codes of a large batch may not fit."""

AGREE = 1e-3
"""Largest relative difference of an FVU from the true one, after all steps."""

AGREE_ACTIVATIONS = {"float32": 1e-2, "bfloat16": 1e-1}
"""Largest distance of activations from the CPU's in float32, relative to the vectors' norm.

PyTorch convolves in TF32 on GPUs even in float32.
"""

TESTS = ("-m", "gpu", "tests", "tests/kernels/triton_step_cases.py")
TESTS_SECONDS, POINT_SECONDS = 200.0, 100.0
"""Largest share of time for the tests and for each shape, so that a hang leaves time for the rest.
"""

SITE = "blocks.-3.resid_post"
COMPARED = 8
"""Images whose activations are compared."""

MISSING = "not measured: "


@dataclass(frozen=True)
class Options:
    """Run the tests that need a GPU, then time extraction and training steps on it."""

    budget: float = 480.0
    """Seconds for everything."""

    shapes: tuple[str, ...] = ("S", "M", "L")
    """Sizes of SAEs, as in `train_step.py`."""

    batch_sizes: tuple[int, ...] = (2048, 16384)
    """Vectors per training step."""

    ours: tuple[str, ...] = ("triton", "torch", "dense")
    """Names of the kernels."""

    rounds: int = 3
    """Number of rounds."""

    steps: int = 5
    """Steps per round."""

    n_images: int = 1024
    """Number of images to extract from; decoding is slow compared with a GPU."""

    batch_size: int = 128
    """Images per forward pass."""

    workers: int | None = None
    """Processes that decode."""

    device: str = "cuda"
    """Where to measure; "cpu" is for a quick trial."""

    tests: bool = True
    """Run the tests."""

    out: Path = GPU
    """File for the tables."""


@dataclass
class Report:
    """The file of tables, and the failures."""

    out: Path
    facts: Mapping[str, str]
    failed: list[str] = field(default_factory=list)

    def keep(self, title: str, rows: Sequence[dict[str, Any]], name: str) -> None:
        keep(title, rows, self.out, self.facts, name)

    def fail(self, what: str, note: str) -> None:
        if NO_TIME not in note and not out_of_memory(note):
            self.failed.append(f"{what}: {note}")


def main(options: Options) -> int:
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        why = cuda_driver.why_not() or f"torch {torch.__version__} does not find one"
        print(cuda_driver.NO_DEVICE.format(why=why), file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.budget
    report = Report(options.out, versions(options.device))
    write_text(options.out, HEAD)
    if options.tests:
        run_tests(report, deadline)
    measure_extraction(report, options, deadline)
    measure_steps(report, options, deadline)
    for each in report.failed:
        print(f"failed: {each}", file=sys.stderr)
    print(f"The tables are in {options.out}.", file=sys.stderr)
    return 1 if report.failed else 0


def versions(device: str) -> dict[str, str]:
    """Return facts about the GPU, and the versions of relevant software."""
    found: dict[str, str] = {}
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        found["capability"] = f"{card.major}.{card.minor}"
        found["gpu_memory_gib"] = f"{card.total_memory / 2**30:.0f}"
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = driver_version()
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = "not installed"
    return found


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


def run_tests(report: Report, deadline: float, arguments: Sequence[str] = TESTS) -> None:
    """Run all tests that need a GPU, in a process that is stopped when its time is up."""
    seconds = min(TESTS_SECONDS, deadline - time.monotonic())
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={file}", "-p", "no:cacheprovider"]
        child = subprocess.Popen([*command, *arguments], cwd=ROOT, start_new_session=True)
        try:
            status = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            counts, note = {}, f"not finished within {seconds:.0f} s"
        else:
            counts, note = counted(file, status)
    if note:
        report.failed.append(f"tests: {note}")
    columns = dict.fromkeys(("passed", "failed", "skipped"), "–") | counts
    row = {**columns, "seconds": round(time.monotonic() - begin), "note": note}
    report.keep("Tests that need a GPU", [row], "gpu-tests")


def counted(file: Path, status: int) -> tuple[dict[str, int], str]:
    """Count the results of the tests in a JUnit file, and say what is wrong."""
    if not file.exists():
        return {}, f"pytest ended with status {status}"
    cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    failed = [
        case.get("name", "")
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
    }
    if failed:
        return counts, "failed: " + ", ".join(failed)
    return counts, "" if status == 0 else f"pytest ended with status {status}"


@dataclass(frozen=True)
class Reading:
    """What is extracted."""

    model: Path
    images: Path
    out: Path
    options: Options


def read_in_float32(work: Reading) -> dict[str, Any]:
    return read(work, "float32")


def read_in_bfloat16(work: Reading) -> dict[str, Any]:
    return read(work, "bfloat16")


READERS: dict[str, Job] = {"float32": read_in_float32, "bfloat16": read_in_bfloat16}


def read(work: Reading, dtype: str) -> dict[str, Any]:
    """Extract one site of all images, and compare a few images' activations with the CPU's."""
    options = work.options
    model = load_model(str(work.model), device=options.device, dtype=dtype)
    images = open_images(str(work.images))
    n_compared = min(COMPARED, len(images))
    pixels = torch.stack([model.transform(images.load(i)) for i in range(n_compared)])
    mine = model.read(pixels, [SITE])[SITE].float().cpu()
    truth = load_model(str(work.model), device="cpu", dtype="float32").read(pixels, [SITE])[SITE]
    store = extract(
        model,
        images,
        sites=[SITE],
        out=work.out / dtype,
        batch_size=options.batch_size,
        workers=options.workers,
        quiet=True,
    )
    summary = store.summary
    assert summary is not None
    off = (mine - truth).norm(dim=-1).max() / truth.norm(dim=-1).mean()
    return {
        "seconds": summary.seconds,
        "forward_ms": 1000 * summary.seconds_in_forward / summary.images,
        "off": float(off),
    }


def measure_extraction(report: Report, options: Options, deadline: float) -> None:
    options = replace(options, workers=cores() if options.workers is None else options.workers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model")
        images = save_photos(folder / "photos", options.n_images)
        work = Reading(folder / "model", images, folder / "out", options)
        results = take_turns(READERS, work, 1, min(deadline, time.monotonic() + POINT_SECONDS))
    rows = [extraction_row(result, options.n_images) for result in results]
    for row in rows:
        if row["note"]:
            report.fail(f"extraction in {row['model in']}", row["note"])
    title = f"Extraction, ViT-B/32 shapes, all tokens of block 9, {options.n_images:,} JPEGs"
    report.keep(title, rows, "gpu-extraction")


def extraction_row(result: Result, n_images: int) -> dict[str, Any]:
    columns = ("images/s", "ms an image in forward", "off the CPU's activations by")
    if result.error is not None:
        note = MISSING + cell(result.error)
        return {"model in": result.name, **dict.fromkeys(columns, "–"), "note": note}
    off = result.facts["off"]
    forward = f"{result.facts['forward_ms']:.3g}"
    figures = (f"{n_images / result.rounds[0]:,.0f}", forward, f"{off:.1e}")
    agrees = off <= AGREE_ACTIVATIONS[result.name]  # False where it is not a number
    note = result.facts["note"] if agrees else "activations are not those of the CPU"
    return {"model in": result.name, **dict(zip(columns, figures, strict=True)), "note": note}


def measure_steps(report: Report, options: Options, deadline: float) -> None:
    """Measure each shape and batch size in turn; the table always lists every point."""
    points = list(points_of(options))
    rows = {point: nothing(point, options.ours) for point in points}
    for name, shape in points:
        left = min(deadline, time.monotonic() + POINT_SECONDS)
        if time.monotonic() < deadline:
            rows[name, shape] = step_rows(name, shape, race_at(shape, options, left))
        for row in rows[name, shape]:
            if row["note"]:
                report.fail(f"{row['kernels']}, {name}, batch {row['batch']}", row["note"])
        keep_steps(report, options, [row for each in rows.values() for row in each])


def keep_steps(report: Report, options: Options, rows: Sequence[dict[str, Any]]) -> None:
    names = [name for name in options.shapes if name in SHAPES]
    sizes = "; ".join(
        f"{name}: d {SHAPES[name].d_in:,}, {SHAPES[name].n_latents:,} latents" for name in names
    )
    title = f"Training step, TopK {SHAPES[names[0]].k}, {options.device}: {sizes}"
    report.keep(title, rows, "gpu-steps")


def points_of(options: Options) -> Iterator[tuple[str, Shape]]:
    """Yield small batches first, so that every shape is measured even if the time runs out."""
    for name in options.shapes:
        if name not in SHAPES:
            raise SystemExit(f"No shape is called {name!r}; there are: {', '.join(SHAPES)}.")
    for batch_size in options.batch_sizes:
        for name in options.shapes:
            yield name, replace(SHAPES[name], batch_size=batch_size)


def race_at(shape: Shape, options: Options, deadline: float) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            shape=shape,
            data=save_batches("mixture", shape, Path(folder)),
            device=options.device,
            threads=cores(),
        )
        return race(
            [(f"sparsight-{name}", "ours") for name in options.ours],
            task,
            "step",
            rounds=options.rounds,
            calls=options.steps,
            deadline=deadline,
        )


STEP_COLUMNS = ("ms a step", f"times {TRUTH}", "peak GiB", "FVU")


def step_rows(name: str, shape: Shape, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Make the rows of one shape: times, speed-up over dense autograd, memory, agreement."""
    found = [result.row() for result in results]
    measured = {row["name"].removeprefix("sparsight-"): row for row in found if row["ms"]}
    dense = measured.get(TRUTH)
    truth = dense or measured.get(SECOND_TRUTH)
    rows = []
    for row in found:
        start = row_start((name, shape), row["name"].removeprefix("sparsight-"))
        if "error" in row:
            note = MISSING + cell(row["error"])
            rows.append({**start, **dict.fromkeys(STEP_COLUMNS, "–"), "note": note})
            continue
        figures = (
            f"{row['ms']:.2f} [{row['low']:.2f} … {row['high']:.2f}]",
            "–" if dense is None else f"{dense['ms'] / row['ms']:.2f}",
            f"{row['peak_gib']:.2f}",
            f"{row['loss']:.5f}",
        )
        note = disagreement(row, truth) or row["note"]
        rows.append({**start, **dict(zip(STEP_COLUMNS, figures, strict=True)), "note": note})
    return rows


def disagreement(row: Mapping[str, Any], truth: Mapping[str, Any] | None) -> str:
    """Say how far an FVU is off the true one if it is too far; else ""."""
    if truth is None:
        return "" if math.isfinite(row["loss"]) else "the FVU is not finite"
    off = abs(row["loss"] / truth["loss"] - 1)
    return "" if off <= AGREE else f"FVU is off that of {truth['name']} by {off:.1e} of it"


def nothing(point: tuple[str, Shape], ours: Sequence[str]) -> list[dict[str, Any]]:
    empty = dict.fromkeys(STEP_COLUMNS, "–")
    return [{**row_start(point, name), **empty, "note": MISSING + NO_TIME} for name in ours]


def row_start(point: tuple[str, Shape], kernels: str) -> dict[str, Any]:
    return {"shape": point[0], "batch": f"{point[1].batch_size:,}", "kernels": kernels}


def out_of_memory(note: str) -> bool:
    """Return whether a contender failed only because the GPU is too small."""
    return "OutOfMemoryError" in note


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options)))
