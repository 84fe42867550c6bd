"""Contenders, each in a process of its own: all stay in memory, and a driver asks them in turn.

A contender does not share its allocator, threads or peak memory with another one, and slow minutes
of the machine affect all of them alike: rounds go A B C, then C B A. Requests and answers are lines
    of JSON on stdin and stdout; `serve` runs in the process. With VERBOSE=1 in the environment,
    what contenders print is shown.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GIB = 2**30
NO_TIME = "there was no time left"


@dataclass(frozen=True)
class Shape:
    """The shape of a batch and an SAE."""

    d_in: int
    n_latents: int
    batch_size: int
    k: int = 32

    def __str__(self) -> str:
        return f"d {self.d_in:,}, {self.n_latents:,} latents, batch {self.batch_size:,}, k {self.k}"


SHAPES = {
    "XS": Shape(64, 512, 64, 8),
    "S": Shape(768, 6144, 512),
    "M": Shape(768, 24576, 2048),
    "L": Shape(1024, 65536, 2048),
}


@dataclass(frozen=True)
class Task:
    """What all contenders of a benchmark work on."""

    shape: Shape
    data: str
    """File of the batches, `[batches, batch_size, d_in]` float32."""
    dictionary: str | None = None
    """File of rows for encoder and decoder, `[n_latents, d_in]`; None means each one's initial
    weights.
    """
    dead: float = 0.0
    """Share of the latents that count as dead in each step; above 0, AuxK is on."""
    precision: str = "auto"
    """Precision of our selection in training."""
    device: str = "cpu"
    threads: int = 1

    @property
    def k_aux(self) -> int:
        """Dead latents that AuxK uses per vector."""
        return self.shape.d_in // 2

    def dead_latents(self) -> Tensor:
        """Return the same random choice for all contenders."""
        n = self.shape.n_latents
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        return chosen[: round(self.dead * n)].to(self.device)

    def batches(self) -> Tensor:
        """The batches, on the device."""
        return torch.from_numpy(np.load(self.data)).to(self.device)


class Contender:
    """One implementation; a subclass says what a training step is, or how it encodes.

    Args:
        task: what to work on.
    """

    note = ""
    """A note on the times of training."""

    encode_note = ""
    """A note on the times of encoding."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.shape = task.shape

    def load(self, rows: Tensor, b_dec: Tensor) -> None:
        """Use these rows as encoder and decoder, with no bias but the decoder's."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make the dead latents dead again, before each step and outside the timing."""

    def step(self, x: Tensor) -> None:
        """Train on one batch."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Any:
        """Encode a batch without gradients, in the implementation's own format."""
        raise NotImplementedError

    def chosen(self, code: Any) -> Tensor:
        """Return the latents `[batch, k]` of a result of `encode`."""
        found: Tensor = code.topk(self.shape.k, dim=1).indices
        return found

    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstruct a batch."""
        raise NotImplementedError


class ContenderError(Exception):
    """A contender cannot be imported, fails, or died; the message says why."""


class Process:
    """A contender's process, as the driver sees it.

    Args:
        name: name of the contender.
        module: module with its class in `CONTENDERS`.
        task: what to work on.
        path: folder that comes first on the process's import path.
        deadline: latest time for the process to end, by `time.monotonic`.
    """

    def __init__(
        self,
        name: str,
        module: str,
        task: Task,
        path: Path | None = None,
        deadline: float = math.inf,
    ) -> None:
        if time.monotonic() >= deadline:
            raise ContenderError(NO_TIME)
        self.name = name
        self._deadline = deadline
        environment = dict(os.environ, OMP_NUM_THREADS=str(task.threads))
        if path is not None:
            environment["PYTHONPATH"] = os.pathsep.join(
                [str(path), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
        self._child = subprocess.Popen(
            [sys.executable, "-c", "import contenders; contenders.serve()"],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        try:
            self.facts = self._ask({"module": module, "name": name, "task": asdict(task)})
        except ContenderError:
            self.close()
            raise

    def time(self, what: str, times: int) -> list[float]:
        """Time `times` calls of "step" or "encode", in seconds each."""
        seconds: list[float] = self._ask({"do": what, "times": times})["seconds"]
        return seconds

    def finish(self) -> dict[str, Any]:
        """Return peak memory and results, and end the process."""
        found = self._ask({"do": "finish"})
        self.close()
        return found

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.communicate()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None and self._child.stdout is not None
        with suppress(BrokenPipeError):  # the process is dead and will not answer
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        with self._ending_in_time():
            line = self._child.stdout.readline()
        if not line:
            status = self._child.wait()
            late = time.monotonic() >= self._deadline
            raise ContenderError(NO_TIME if late else f"its process ended with status {status}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContenderError(answer["error"])
        return answer

    @contextmanager
    def _ending_in_time(self) -> Iterator[None]:
        """Kill the process at the deadline: a hanging kernel never answers."""
        if math.isinf(self._deadline):
            yield
            return
        timer = threading.Timer(self._deadline - time.monotonic(), self._child.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@dataclass
class Result:
    """The results of one contender."""

    name: str
    rounds: list[float] = field(default_factory=list)
    """Median seconds of a call, round by round."""
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """Return a row for JSON: milliseconds per call (median of the rounds, least, most)."""
        if self.error is not None:
            nothing = dict.fromkeys(("ms", "low", "high", "peak_gib", "loss"))
            return {"name": self.name, **nothing, "error": self.error}
        times = [1000 * each for each in self.rounds]
        return {
            "name": self.name,
            "ms": statistics.median(times),
            "low": min(times),
            "high": max(times),
            **self.facts,
        }


def race(
    contenders: Sequence[tuple[str, str]],
    task: Task,
    what: str,
    *,
    rounds: int,
    calls: int,
    warm_up: int = 2,
    path: Path | None = None,
    deadline: float = math.inf,
) -> list[Result]:
    """Start all contenders, ask them in turn, and stop them.

    Args:
        contenders: name and module of each.
        task: what they work on.
        what: "step" or "encode".
        rounds: how many times each is asked.
        calls: how many calls each time; the median of their times is the round's.
        warm_up: calls before the first round.
        path: folder that comes first on the import path of contenders in the module `peers`.
        deadline: by `time.monotonic`; unfinished contenders are stopped then, with a note.

    Returns:
        A result for each, in the order given; those that failed say how.
    """
    results = {name: Result(name) for name, _ in contenders}
    running: dict[str, Process] = {}

    @contextmanager
    def failing(name: str) -> Iterator[None]:
        try:
            yield
        except ContenderError as error:
            results[name].error = str(error)
            if name in running:
                running.pop(name).close()

    try:
        for name, module in contenders:
            print(f"starting {name}", file=sys.stderr)
            with failing(name):
                found_in = path if module == "peers" else None
                running[name] = Process(name, module, task, found_in, deadline)
                results[name].facts |= running[name].facts
                running[name].time(what, warm_up)
        for number in range(rounds):
            order = list(running)
            for name in order if number % 2 == 0 else reversed(order):
                with failing(name):
                    seconds = running[name].time(what, calls)
                    results[name].rounds.append(statistics.median(seconds))
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for name in list(running):
            with failing(name):
                results[name].facts |= running[name].finish()
    finally:
        for process in running.values():
            process.close()
    return list(results.values())


def check_memory(task: Task, names: Sequence[str], dense: Sequence[str]) -> None:
    """Stop if all contenders together would not fit into memory.

    This is a rough estimate: parameters, gradients and Adam's two moments for each; for those that
        keep
    `[batch, n_latents]` tensors, six of them, for the others two.

    Args:
        task: what they work on.
        names: all contenders.
        dense: those of them that keep such tensors.
    """
    if task.device != "cpu" or not Path("/proc/meminfo").exists():
        return
    shape = task.shape
    weights = 4 * 2 * shape.n_latents * shape.d_in * 4
    codes = shape.batch_size * shape.n_latents * 4
    need = sum(weights + (6 if name in dense else 2) * codes + GIB // 2 for name in names)
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if need > free:
        raise SystemExit(
            f"{len(names)} contenders of {shape} take about {need / GIB:.0f} GiB together; "
            f"{free / GIB:.0f} GiB are free. Take fewer at a time: --peers NAME …, --ours NAME …"
        )


def serve() -> None:
    """Run in the process: build a contender, then answer requests until there are none."""
    # Libraries print when they are imported; the pipe is only for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: Mapping[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    contender, batches, done = None, torch.empty(0), 0
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if contender is None:
                contender, batches = _build(request)
                training = contender.task.dictionary is None
                note = contender.note if training else contender.encode_note
                answer({"note": note, "built_gib": peak_gib("cpu")})
            elif request["do"] == "finish":
                answer(_outcome(contender, batches))
            else:
                seconds = []
                for _ in range(request["times"]):
                    seconds.append(_time(contender, request["do"], batches[done % len(batches)]))
                    done += 1
                answer({"seconds": seconds})
        except Exception as error:
            traceback.print_exc()
            kind = "" if isinstance(error, ContenderError) else f"{type(error).__name__}: "
            answer({"error": f"{kind}{error}"[:300]})


def _build(request: Mapping[str, Any]) -> tuple[Contender, Tensor]:
    stated = request["task"]
    task = Task(**(stated | {"shape": Shape(**stated["shape"])}))
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    contender = importlib.import_module(request["module"]).CONTENDERS[request["name"]](task)
    batches = task.batches()
    if task.dictionary is not None:
        rows = torch.from_numpy(np.load(task.dictionary)).to(task.device)
        with torch.no_grad():
            contender.load(rows, batches.mean(dim=(0, 1)))
    return contender, batches


def _time(contender: Contender, what: str, x: Tensor) -> float:
    contender.prepare()
    _synchronise(contender.task.device)
    start = time.perf_counter()
    if what == "step":
        contender.step(x)
    else:
        with torch.no_grad():
            contender.encode(x)
    _synchronise(contender.task.device)
    return time.perf_counter() - start


def _outcome(contender: Contender, batches: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {"peak_gib": peak_gib(contender.task.device)}
    x = batches[0]
    with torch.no_grad():
        if contender.task.dictionary is None:
            error = (x - contender.reconstruct(x)).double().square().sum()
            fvu = error / (x - x.mean(dim=0)).double().square().sum()
            return found | {"loss": fvu.item()}
        chosen = contender.chosen(contender.encode(x)).sort(dim=1).values
    return found | {"loss": None, "latents": chosen[:64].tolist()}


def peak_gib(device: str) -> float:
    """Return the peak memory of the process: on the GPU, or VmHWM.

    `getrusage` is unsuitable: its peak is inherited from the parent process.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / GIB
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / GIB


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
