from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cpu_torchvision  # noqa: F401 - before transformers
import tiny_models
from sparsight.vision import VisionModel, load_model

# Tiny products gain nothing from threads, and lose much on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a small random model of a family; built once."""
    root = tmp_path_factory.mktemp("models")

    def get(family: str) -> Path:
        path = root / family
        return path if path.exists() else tiny_models.build(family, path)

    return get


@pytest.fixture(scope="session")
def model(folder: Callable[[str], Path]) -> Callable[[str], VisionModel]:
    """A family's small model, loaded once."""
    loaded: dict[str, VisionModel] = {}

    def get(family: str) -> VisionModel:
        if family not in loaded:
            loaded[family] = load_model(str(folder(family)), device="cpu")
        return loaded[family]

    return get


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
