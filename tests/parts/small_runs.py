"""A store of photos and runs on it that train in a moment, for tests of what faults leave."""

from __future__ import annotations

from pathlib import Path

import pytest

import sparsight as sp
from activation_parts import BLOCK_1, save_clip, save_photos
from one_thread import one_thread

__all__ = ["one_thread", "store", "train_small"]

CONFIG = sp.TrainConfig(
    sae=sp.SAEConfig(n_latents=64, sparsity=sp.TopK(k=4)), n_vectors=640, batch_size=32
)


@pytest.fixture(scope="module")
def store(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> sp.ActivationStore:
    folder = tmp_path_factory.mktemp("small_runs")
    model = sp.load_model(str(save_clip(folder / "clip")), device="cpu")
    images = sp.open_images(save_photos(folder / "photos"))
    out = folder / "store"
    return sp.extract(model, images, sites=[BLOCK_1], out=out, workers=0, quiet=True)


def train_small(store: sp.ActivationStore, out: Path) -> sp.Run:
    return sp.train(store, CONFIG, out=out, device="cpu", quiet=True)
