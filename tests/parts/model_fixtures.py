"""Small models for the tests that act on them, as fixtures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import cpu_torchvision  # noqa: F401 - before transformers
import tiny_models
from sparsight.vision import VisionModel, load_model

# Tiny products gain nothing from threads, and lose much on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], VisionModel]:
    """A family's small random model, loaded once: 3 blocks, width 32, 16 patches."""
    root = tmp_path_factory.mktemp("tiny")
    loaded: dict[str, VisionModel] = {}

    def get(family: str) -> VisionModel:
        if family not in loaded:
            loaded[family] = load_model(str(tiny_models.build(family, root / family)), device="cpu")
        return loaded[family]

    return get


@pytest.fixture
def clip(tiny: Callable[[str], VisionModel]) -> VisionModel:
    return tiny("clip")


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def calibration() -> VisionModel:
    return load_model("calibration", device="cpu")
