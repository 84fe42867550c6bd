from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparsight as sp
from model_fixtures import calibration, tiny
from sparsight.sae import Normaliser, SAEConfig, SparseAutoencoder, TopK
from sparsight.vision import VisionModel

__all__ = ["calibration", "tiny"]

SITE = "blocks.1.resid_post"
IMAGES = "calibration:24:3"


@pytest.fixture(scope="session")
def sae(calibration: VisionModel) -> SparseAutoencoder:
    """An untrained SAE of the calibration CLIP; latent 3 never fires."""
    images = sp.open_images(IMAGES)
    pixels = torch.stack([calibration.transform(images.load(i)) for i in range(24)])
    x = calibration.read(pixels, SITE)[SITE].flatten(0, 1).double()
    sae = SparseAutoencoder(
        x.shape[1],
        SAEConfig(96, sparsity=TopK(8)),
        normaliser=Normaliser.fit("scale", x.mean(dim=0), x.square().mean(dim=0)),
        metadata={
            "model": {"id": "calibration", "weights_hash": calibration.weights_hash},
            "images": IMAGES,
            "site": SITE,
            "tokens": "all",
        },
    ).requires_grad_(False)
    sae.b_enc[3] = -100
    return sae


@pytest.fixture(scope="session")
def run(
    sae: SparseAutoencoder, calibration: VisionModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of the SAE with its index."""
    folder = tmp_path_factory.mktemp("visualised")
    sae.save_pretrained(folder)
    activations = sp.LiveActivations(calibration, sp.open_images(IMAGES), [SITE], "all", workers=0)
    sp.build_index(sae, activations, out=folder / "index", quiet=True)
    return folder


@pytest.fixture(scope="session")
def index(run: Path, sae: SparseAutoencoder) -> sp.LatentIndex:
    return sp.LatentIndex.open(run / "index", sae)


@pytest.fixture(scope="session")
def live(index: sp.LatentIndex) -> list[int]:
    """Latents that fire on many images, in order."""
    rows = index.table.select(["latent", "n_active_images"]).to_pylist()
    return [row["latent"] for row in rows if row["n_active_images"] >= 6]
