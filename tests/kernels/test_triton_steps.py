"""The step in Triton: its cases in the interpreter or on a GPU, its compilation, its refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsight import kernels
from sparsight.errors import UserError
from sparsight.kernels import choose

HERE = Path(__file__).parent


def _run(arguments: list[str], interpreted: bool) -> None:
    """Run Python with Triton's interpreter on or off, and show its output if it fails."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted))}
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=HERE.parents[1], env=environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_steps_match_dense_autograd() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    cases = HERE / "triton_step_cases.py"
    options = ["-m", "pytest", "-p", "no:cacheprovider", str(cases)]
    _run(options, interpreted=not torch.cuda.is_available())


def test_kernels_compile_for_gpus() -> None:
    pytest.importorskip("triton", minversion="3.4", reason="compiles in another way before 3.4")
    _run([str(HERE / "compile_triton_kernels.py")], interpreted=False)


def test_triton_is_refused_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_step = pytest.importorskip("sparsight.kernels.triton_step")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(triton_step, "INTERPRETED", True)
    assert choose("triton", "bfloat16", cpu) == ("triton", "bfloat16")
    monkeypatch.setattr(triton_step, "INTERPRETED", False)
    with pytest.raises(UserError, match="run on CUDA, not on cpu"):
        choose("triton", "auto", cpu)
    assert choose("auto", "float32", cpu)[0] != "triton"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose("auto", "float32", cuda) == ("torch", "float32")
    with pytest.raises(UserError, match=r"8\.0 or more, but An old GPU has less"):
        choose("triton", "float32", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose("triton", "float32", cuda) == ("triton", "float32")
    assert choose("triton", "float8", cuda) == ("triton", "float8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(UserError, match=r"'float8' needs .* 8\.9 or more, but these are 'triton'"):
        choose("triton", "float8", cuda)
    with pytest.raises(UserError, match=r"'float8' needs .* these are 'torch' on cpu"):
        choose("torch", "float8", cpu)
    monkeypatch.delitem(sys.modules, "sparsight.kernels.triton_step")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert kernels._load_triton() is None
    with pytest.raises(UserError, match="which is not installed"):
        choose("triton", "auto", cpu)
    assert choose("auto", "float32", cuda) == ("torch", "float32")
