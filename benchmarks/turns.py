"""Run contenders that do a whole job at a time, each time in a new process, one after another.

Rounds go A B C, then C B A. A job is a function of its input; it returns the seconds that it took,
and other facts. Peak memory is that of its process, including imports but not the workers that it
started.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from contenders import NO_TIME, Result, peak_gib

Job = Callable[[Any], dict[str, Any]]


def take_turns(
    jobs: Mapping[str, Job], work: Any, rounds: int, deadline: float = math.inf
) -> list[Result]:
    """Let all contenders do the work in turn, `rounds` times.

    Args:
        jobs: jobs of the contenders.
        work: what they work on.
        rounds: number of rounds.
        deadline: by `time.monotonic`; unfinished contenders are stopped then, with a note.

    Returns:
        A result for each, in the order given; those that failed say how.
    """
    results = {name: Result(name) for name in jobs}
    for number in range(rounds):
        order = list(jobs)
        for name in order if number % 2 == 0 else reversed(order):
            result = results[name]
            if result.error is not None:
                continue
            found = _do(jobs[name], work, deadline)
            if "error" in found:
                result.error = found["error"]
                continue
            result.rounds.append(found.pop("seconds"))
            peak = max(found.pop("peak_gib"), result.facts.get("peak_gib", 0.0))
            result.facts |= found | {"peak_gib": peak}
            print(f"round {number + 1}: {name} {result.rounds[-1]:.1f} s", file=sys.stderr)
    return list(results.values())


def chosen(jobs: Mapping[str, Job], names: Sequence[str], ours: str) -> dict[str, Job]:
    """Return our jobs and those of the named contenders.

    Raises:
        SystemExit: one of them is unknown.
    """
    for name in names:
        if name not in jobs:
            known = ", ".join(each for each in jobs if not each.startswith(ours))
            raise SystemExit(f"No contender is called {name!r}; there are: {known}.")
    return {name: job for name, job in jobs.items() if name in names or name.startswith(ours)}


def told(
    results: Sequence[Result], what: str, amount: float, ours: str, *, memory: bool
) -> list[dict[str, Any]]:
    """Make rows: rates, time relative to the quickest contender that is not ours, peak memory.

    Args:
        results: results of the contenders.
        what: unit of the amount, e.g. "images".
        amount: amount of work per round.
        ours: prefix of the names of our own contenders.
        memory: whether to show peak memory; it is misleading if pages of mapped files count too.
    """
    rows = [result.row() for result in results]
    others = [row["ms"] for row in rows if row["ms"] and not row["name"].startswith(ours)]
    columns = [f"{what}/s", "time, of the quickest other's", *(["peak GiB"] if memory else [])]
    table = []
    for row in rows:
        if "error" in row:
            note = row["error"].replace("|", "/").replace("\n", " ")
            table.append({"": row["name"], **dict.fromkeys(columns, "–"), "note": note})
            continue
        rate, low, high = (1000 * amount / row[each] for each in ("ms", "high", "low"))
        cells = [
            f"{rate:,.3g} [{low:,.3g} … {high:,.3g}]",
            f"{row['ms'] / min(others):.2f}" if others else "–",
        ]
        if memory:
            cells.append(f"{row['peak_gib']:.2f}")
        named = dict(zip(columns, cells, strict=True))
        table.append({"": row["name"], **named, "note": row["note"]})
    return table


def _do(job: Job, work: Any, deadline: float) -> dict[str, Any]:
    if time.monotonic() >= deadline:
        return {"error": NO_TIME}
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    child = context.Process(target=_answer, args=(theirs, job, work))
    child.start()
    theirs.close()
    try:
        if not mine.poll(None if math.isinf(deadline) else deadline - time.monotonic()):
            child.kill()
            child.join()
            return {"error": NO_TIME}
        found: dict[str, Any] = mine.recv()
    except EOFError:
        child.join()
        found = {"error": f"its process ended with status {child.exitcode}"}
    child.join()
    return found


def _answer(pipe: Connection, job: Job, work: Any) -> None:
    # A spawned process would spawn workers too, which costs seconds that users do not wait for.
    multiprocessing.set_start_method(None, force=True)
    try:
        pipe.send({"note": ""} | job(work) | {"peak_gib": peak_gib("cpu")})
    except Exception as error:
        traceback.print_exc()
        pipe.send({"error": f"{type(error).__name__}: {error}"[:300]})
