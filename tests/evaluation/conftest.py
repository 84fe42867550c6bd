from __future__ import annotations

import pytest
import torch

from evaluation_parts import save_model
from sparsight.vision import VisionModel, load_model

# Tiny products gain nothing from threads, and lose much on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> VisionModel:
    return load_model(str(save_model("clip", tmp_path_factory.mktemp("clip"))), device="cpu")


@pytest.fixture(scope="session")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> VisionModel:
    return load_model(str(save_model("siglip", tmp_path_factory.mktemp("siglip"))), device="cpu")


@pytest.fixture(scope="session")
def calibration() -> VisionModel:
    return load_model("calibration", device="cpu")
