from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import stand_ins
import torch
from code_blocks import ROOT
from filelock import FileLock
from huggingface_hub import constants
from page_runner import run_command

from sparsight.training import config as training_config

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, models and a run, made once for all processes that test."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "pages"
    with FileLock(root / "pages.lock"):
        if not (folder / "done").exists():
            (folder / "start").mkdir(parents=True)
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
                monkeypatch.chdir(folder / "start")
                stand_ins.make(folder, run_command)
            (folder / "done").touch()
    return folder


@pytest.fixture
def workshop(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of one page: with photos, models on the Hub, and what the quick start leaves."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(shared / "hub"))
    monkeypatch.setattr(training_config, "SHORTEST", 4096)
    monkeypatch.setattr(training_config, "LONGEST", 4096)
    folder = tmp_path / "page"
    shutil.copytree(shared / "start", folder)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    monkeypatch.chdir(folder)
    yield folder
