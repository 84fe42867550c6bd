"""One place chooses the device; what is not there is refused in one line, everywhere alike."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sparsight as sp
from sparsight.cli import main
from sparsight.devices import choose_device
from sparsight.errors import UserError


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda: int = 0, xpu: int = 0, mps: bool = False):
    """Let torch find these devices, and no others."""
    for module, count in ((torch.cuda, cuda), (torch.xpu, xpu)):
        monkeypatch.setattr(module, "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(module, "device_count", lambda count=count: count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_nothing_but_one_module_looks_for_a_device_to_take():
    package = Path(sp.__file__).parent
    pattern = r"torch\.(cuda|xpu|mps|accelerator|backends\.mps)\.is_available"
    looking = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(pattern, path.read_text())
    }
    # Fine-tuning asks which random numbers there are to be put back, not where to run.
    assert looking == {"devices.py", "finetuning/loop.py"}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, "cpu"),
        ({"cuda": 1, "xpu": 1}, "cuda"),
        ({"xpu": 2}, "xpu"),
        ({"mps": True}, "cpu"),  # it has no float64, in which running sums are kept
    ],
)
def test_the_best_device_with_float64_is_the_default(found, expected, monkeypatch):
    machine(monkeypatch, **found)
    properties = SimpleNamespace(has_fp64=True)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    assert choose_device().type == expected


def test_a_device_is_taken_by_name_where_it_is_there(monkeypatch):
    machine(monkeypatch, cuda=2, mps=True)
    for name in ("cuda", "cuda:1", "mps", "cpu"):
        assert choose_device(name) == choose_device(torch.device(name)) == torch.device(name)
    with pytest.raises(UserError, match=r"'cuda:7': torch finds 2 CUDA devices here: 'cuda:0'"):
        choose_device("cuda:7")
    with pytest.raises(UserError, match="MPS has no float64"):
        choose_device("mps", float64=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "finds no CUDA device here. Use 'cpu'"),
        ("mps", "finds no MPS device here"),
        ("xpu", "finds no XPU device here"),
        ("gpu", "'gpu' is not a device"),
        ("", "'' is not a device"),
        ("meta", "'meta' is not a device"),
        ("cpu:3", "one CPU device"),
    ],
)
def test_a_device_that_is_not_there_is_refused_by_every_function(
    name, message, monkeypatch, tmp_path
):
    machine(monkeypatch)
    small = sp.SAEConfig(n_latents=16, sparsity=sp.TopK(k=2))
    sae = sp.SparseAutoencoder(8, small)
    sae.save_pretrained(tmp_path)
    model = sp.load_model("calibration", device="cpu")
    source = (model, sp.open_images("calibration:4"))
    for use in (
        lambda: sp.load_model("calibration", device=name),
        lambda: model.to(name),
        lambda: sp.SparseAutoencoder.from_pretrained(tmp_path, device=name),
        lambda: sp.train(source, out=tmp_path / "run", device=name),
        lambda: sp.sweep(source, sp.SweepConfig(grid={"k": [2]}), tmp_path / "s", device=name),
    ):
        with pytest.raises(UserError, match=message) as told:
            use()
        assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists() and not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "command",
    [
        "extract --model calibration --images calibration:4 --out acts",
        "attack measure --images calibration:4 --model calibration --out attack",
        *("train", "sweep", "evaluate", "encode", "index", "steer", "search", "finetune"),
    ],
)
def test_a_verb_refuses_a_device_before_any_work(command, monkeypatch, capsys, tmp_path):
    machine(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--device", "mps"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "finds no MPS device" in error
    assert not list(tmp_path.iterdir())
