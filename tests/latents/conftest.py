from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latent_parts import SITE, TensorActivations, make_sae, model_facts, save_clip, save_pictures
from sparsight.images import ImageSource, load_batches, open_images
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel, load_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionModel:
    return load_model(str(save_clip(tmp_path_factory.mktemp("clip"))), device="cpu")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def source(pictures: Path) -> ImageSource:
    return open_images(pictures)


@pytest.fixture(scope="session")
def sae(model: VisionModel) -> SparseAutoencoder:
    return make_sae(model=model_facts(model))


@pytest.fixture(scope="session")
def activations(model: VisionModel, source: ImageSource) -> TensorActivations:
    """The model's activations at SITE, all tokens of all images."""
    batches = load_batches(source, model.transform, 12, workers=0)
    x = torch.cat([model.read(batch.pixels, [SITE])[SITE] for batch in batches])
    return TensorActivations(x, source, model)
