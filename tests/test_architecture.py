"""The rules of the house that no single room can check."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparsight

ROOT = Path(__file__).parent.parent


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout


def test_imports_run_downwards_only():
    # In a process of its own: import-linter's configuration of logging silences other tests.
    linter = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    done = subprocess.run(
        [*linter, "--config", str(ROOT / "pyproject.toml"), "--no-cache"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_package_loads_no_heavy_library():
    loaded = run_python("import sparsight, sys; print(*sys.modules)").split()
    assert "sparsight" in loaded
    assert not {"torch", "transformers", "pyarrow", "matplotlib", "rich"} & set(loaded)


@pytest.mark.parametrize("name", sparsight.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(sparsight, name).__doc__
    assert name in dir(sparsight)


def test_public_names_and_their_homes_agree():
    assert sorted(sparsight.__all__) == sorted(sparsight._HOME_OF)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sparsight.nonsense  # noqa: B018


def test_files_name_no_index_and_no_machine():
    for name in ("constraints.txt", "pyproject.toml", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        assert "://" not in text, name
