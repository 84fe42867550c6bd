from __future__ import annotations

import sys
from pathlib import Path

# The small models are those of the tests of `vision`; other packages run as in those of `formats`.
sys.path[:0] = [str(Path(__file__).parents[1] / each) for each in ("vision", "formats")]

import cpu_torchvision  # noqa: E402, F401 - before transformers
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random CLIP."""
    return tiny_models.build("clip", tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(6)
    ]
