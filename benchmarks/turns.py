"""Contenders that do a whole job at a time, each time in a process of its own, one after the other.

Rounds go A B C, then C B A. A job is a function of what it works on; it gives the seconds that it
took, and whatever else it found. Peak memory is that of its process, with all that it imported, and
without the workers that it started.
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
    """Let all do the work in turn, so many times.

    Args:
        jobs: of the contenders.
        work: what they work on.
        rounds: how many times each does it.
        deadline: by `time.monotonic`; whoever has not finished then is stopped, and says so.

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
    """Ours and the named.

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
    """Rows for people: rates, the time relative to the quickest that is not ours, peak memory.

    Args:
        results: of the contenders.
        what: the amount is counted in, e.g. "images".
        amount: done in one go.
        ours: how the names of our own contenders begin.
        memory: tell it; of no use where pages of mapped files count, too.
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
    # A spawned process would spawn its own workers, too: seconds that users do not wait for.
    multiprocessing.set_start_method(None, force=True)
    try:
        pipe.send({"note": ""} | job(work) | {"peak_gib": peak_gib("cpu")})
    except Exception as error:
        traceback.print_exc()
        pipe.send({"error": f"{type(error).__name__}: {error}"[:300]})
