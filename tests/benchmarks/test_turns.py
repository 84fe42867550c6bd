"""Whole jobs in turn, each in a new process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from data_path import READERS
from turns import chosen, take_turns, told


def quick(folder: Path) -> dict[str, Any]:
    with (folder / "order").open("a") as file:
        file.write("a")
    return {"seconds": 0.5, "note": str(os.getpid())}


def slow(folder: Path) -> dict[str, Any]:
    with (folder / "order").open("a") as file:
        file.write("b")
    return {"seconds": 2.0}


def broken(folder: Path) -> dict[str, Any]:
    raise ValueError(f"no | {folder.name}")


def test_jobs_run_in_alternating_order_in_their_own_processes_and_report_failures(
    tmp_path: Path,
) -> None:
    jobs = {"ours": quick, "theirs": slow, "none": broken}
    results = take_turns(jobs, tmp_path, rounds=2)
    assert (tmp_path / "order").read_text() == "abba"
    assert results[0].facts["note"] != str(os.getpid())
    assert results[0].facts["peak_gib"] > 0
    rows = told(results, "images", 10, "ours", memory=False)
    assert [row["images/s"] for row in rows] == ["20 [20 … 20]", "5 [5 … 5]", "–"]
    assert [row["time, of the quickest other's"] for row in rows] == ["0.25", "1.00", "–"]
    assert rows[2]["note"] == f"ValueError: no / {tmp_path.name}"
    assert all("peak GiB" in row for row in told(results, "images", 10, "ours", memory=True))


def test_unknown_contenders_are_named() -> None:
    assert list(chosen(READERS, ["saev"], "sparsight")) == ["sparsight", "saev"]
    with pytest.raises(SystemExit, match="No contender is called 'me'; there are: by hand, saev"):
        chosen(READERS, ["me"], "sparsight")
