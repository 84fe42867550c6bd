from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.utils
import pytest
from huggingface_hub import constants
from publishing_parts import EVIL, METRICS, SITES

from hub_server import HubServer, running_hub
from sparsight.activations import extract
from sparsight.images import open_images
from sparsight.latents import LatentName, build_index, set_names
from sparsight.sae import SAEConfig, TopK
from sparsight.training import Run, TrainConfig, train
from sparsight.vision import VisionModel, load_model


@pytest.fixture(scope="session")
def hub_process() -> Iterator[HubServer]:
    with running_hub({"token-of-ada": ("ada", "lab"), "token-of-bob": ("bob",)}) as server:
        yield server


@pytest.fixture
def hub(
    hub_process: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[HubServer]:
    """An empty Hub, which this process takes for the real one; the user is ada."""
    template = f"{hub_process.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub_process.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "token-of-ada")
    huggingface_hub.utils.disable_progress_bars()
    yield hub_process
    huggingface_hub.utils.enable_progress_bars()
    hub_process.repositories.clear()
    hub_process.uploaded.clear()
    hub_process.requests.clear()
    hub_process.failing = None


@pytest.fixture(scope="session")
def model() -> VisionModel:
    return load_model("calibration", device="cpu")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, model: VisionModel) -> Run:
    """Two sites of the calibration CLIP; the second was evaluated and indexed, with a name."""
    folder = tmp_path_factory.mktemp("home-of-ada") / "secret project"
    images = open_images("calibration:32:5")
    store = extract(model, images, sites=SITES, out=folder / "acts", workers=0, quiet=True)
    config = TrainConfig(
        sae=SAEConfig(n_latents=128, sparsity=TopK(k=8)), n_vectors=1024, batch_size=256
    )
    run = train(store, config, out=folder / "run", device="cpu", quiet=True)
    sae = run.sae(SITES[1])
    (run.folder(SITES[1]) / "metrics.json").write_text(json.dumps(METRICS))
    index = build_index(sae, store, out=run.folder(SITES[1]) / "index", quiet=True)
    busy = max(index.table.to_pylist(), key=lambda row: row["n_active_images"])["latent"]
    set_names(index, {busy: LatentName(EVIL, 0.9, "truth")})
    return run


@pytest.fixture(scope="session")
def private_run(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """A run of one site over photos in a folder, with local paths in every file."""
    folder = tmp_path_factory.mktemp("machine") / "home" / "ada" / "run"
    run.sae(SITES[0]).save_pretrained(folder)
    home = folder.parent
    description = json.loads((folder / "config.json").read_text())
    description["metadata"]["images"] = f"{home}/photos/?table={home}/labels.csv[0:64]"
    description["metadata"]["model"]["id"] = f"{home}/clip"
    (folder / "config.json").write_text(json.dumps(description))
    (folder / "config.toml").write_text(f'store = "{home}/acts"\n[train]\nseed = 3\n')
    metrics = {
        "fvu": 0.25,
        "l0": 8.0,
        "n_vectors": 1000,
        "images": f"parquet:{home}/photos.parquet",
        "model": {"id": f"{home}/clip"},
        "omitted": {"zero_shot": f"The images ({home}/photos) have no labels."},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder
