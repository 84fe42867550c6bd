from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from activation_parts import BLOCK_0, BLOCK_1, save_clip, save_photos
from one_thread import one_thread
from sparsight.activations import ActivationStore, extract
from sparsight.images import ImageSource, open_images
from sparsight.vision import VisionModel, load_model

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def model(clip_folder: Path) -> VisionModel:
    return load_model(str(clip_folder), device="cpu")


@pytest.fixture
def own_model(clip_folder: Path) -> VisionModel:
    """A model whose weights a test may change."""
    return load_model(str(clip_folder), device="cpu")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    return open_images(str(save_photos(tmp_path_factory.mktemp("photos"))))


@pytest.fixture(scope="session")
def kept_store(
    model: VisionModel, photos: ImageSource, tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    """Three shards of two sites in float32; not to be written to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests: bits may depend on it
    store = extract(
        model,
        photos,
        sites=[BLOCK_0, BLOCK_1, "embedding"],
        out=tmp_path_factory.mktemp("stores") / "kept",
        dtype="float32",
        batch_size=4,
        shard_images=8,
        workers=0,
        quiet=True,
    )
    torch.set_num_threads(threads)
    return store


@pytest.fixture
def own_store(kept_store: ActivationStore, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(kept_store.path, tmp_path / "store"))
