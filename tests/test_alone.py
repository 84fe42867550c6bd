from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fcntl", reason="there are no locks here")

TESTS = """
import time
import pytest

def busy(name):
    with open("spans", "a") as file:
        start = time.monotonic()
        time.sleep(0.05)
        file.write(f"{name} {start} {time.monotonic()}\\n")

@pytest.mark.parametrize("number", range(12))
def test_of_many(number):
    busy("together")

@pytest.mark.alone
@pytest.mark.parametrize("number", range(2))
def test_with_the_machine_for_itself(number):
    busy("alone")
"""


def test_a_test_marked_alone_runs_beside_no_other_and_the_rest_do(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent / "parts" / "alone.py", tmp_path)
    (tmp_path / "conftest.py").write_text("from alone import pytest_runtest_protocol\n")
    (tmp_path / "test_many.py").write_text(TESTS)
    (tmp_path / "Makefile").touch()
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["alone"]\n')
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    spans = [line.split() for line in (tmp_path / "spans").read_text().splitlines()]
    assert len(spans) == 14
    pairs = {
        frozenset((one[0], other[0]))
        for number, one in enumerate(spans)
        for other in spans[:number]
        if float(one[1]) < float(other[2]) and float(other[1]) < float(one[2])
    }
    assert pairs == {frozenset(["together"])}
