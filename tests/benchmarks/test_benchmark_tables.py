from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_training_step_is_timed_and_written_as_promised(tmp_path: Path) -> None:
    rows, table = tmp_path / "rows.json", tmp_path / "results.md"
    arguments = ["--shape", "XS", "--peers", "none", "--ours", "dense", "torch"]
    arguments += ["--rounds", "2", "--steps", "1", "--json", str(rows), "--out", str(table)]
    done = run("train_step.py", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(rows.read_text())["rows"]
    assert [row["name"] for row in found] == ["sparsight-dense", "sparsight-torch"]
    for row in found:
        assert 0 < row["low"] <= row["ms"] <= row["high"]
        assert row["note"] == ""
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert "| sparsight-dense |" in table.read_text()


def test_a_contender_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from train_step import Options, main

    with pytest.raises(SystemExit, match="No contender is called 'nobody'"):
        main(Options(shape="XS", peers=("nobody",), ours=("none",)))


def test_a_table_replaces_one_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from tables import keep

    out = tmp_path / "results.md"
    keep("The first", [{"a": 1}], out)
    keep("The second", [{"a": 2}], out)
    keep("The first", [{"a": 3}], out)
    text = out.read_text()
    assert "| 1 |" not in text
    assert text.index("| 3 |") < text.index("### The second") < text.index("| 2 |")
    assert text.count("[start:the-first]") == 1
