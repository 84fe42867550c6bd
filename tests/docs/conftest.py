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

from hub_server import running_hub
from sparsight.training import config as training_config

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, models and a run, made once for all test processes."""
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
    """A folder for one page, with photos, models on the Hub, and the results of the quick start."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(shared / "hub"))
    monkeypatch.setattr(training_config, "SHORTEST", 4096)
    monkeypatch.setattr(training_config, "LONGEST", 4096)
    folder = tmp_path / "page"
    shutil.copytree(shared / "start", folder)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    monkeypatch.chdir(folder)
    yield folder


@pytest.fixture
def hub(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty Hub on which everybody is `my-name`."""
    with running_hub({"token": ("my-name",)}) as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(workshop / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(workshop / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "token")
        yield
