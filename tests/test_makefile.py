from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
BENCHMARKS = MAKEFILE.with_name("benchmarks")
sys.path.insert(0, str(BENCHMARKS))

import cuda_driver  # noqa: E402

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not shutil.which("make"), reason="there is no make here"
)


def test_an_environment_that_fails_half_way_is_removed_and_the_missing_package_named(
    tmp_path: Path,
) -> None:
    """As on Debian without python3-venv: its python is there by then, its pip is not."""
    python = tmp_path / "python-without-venv"
    python.write_text(
        '#!/bin/sh\nif [ "$1 $2" != "-m venv" ]; then exec ' + sys.executable + ' "$@"; fi\n'
        'mkdir -p "$3/bin" && touch "$3/bin/python" && exit 1\n'
    )
    python.chmod(0o755)
    shutil.copy(MAKEFILE, tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    for _ in range(2):
        command = ["make", "demo", f"PYTHON={python}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert "apt install python3-venv" in done.stdout
        assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(cuda_driver.why_not() is None, reason="CUDA has a GPU here")
def test_without_a_gpu_the_check_of_one_says_so_and_installs_nothing(tmp_path: Path) -> None:
    shutil.copy(MAKEFILE, tmp_path)
    shutil.copytree(BENCHMARKS, tmp_path / "benchmarks")
    command = ["make", "gpu-check", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "CUDA has no GPU here" in done.stderr
    assert not (tmp_path / ".venv").exists()
