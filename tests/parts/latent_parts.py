"""Small real parts: a picture folder, a CLIP with random weights, an SAE over it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from sparsight.activations import LiveActivations, OrderedBatch
from sparsight.images import ImageSource
from sparsight.latents import LatentIndex, LatentName, build_index, set_names
from sparsight.latents.index_files import EXAMPLES, IMAGES, LATENTS, parquet, write_manifest
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK
from sparsight.vision import VisionModel

SITE = "blocks.1.resid_post"
LABELS = ("cat", "dog", "<script>alert(1)")
N_IMAGES = 36

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def save_clip(folder: Path) -> Path:
    """A CLIP vision tower: 3 blocks, width 32, 32-pixel pictures, 4 × 4 patches + CLS."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)
    return folder


def save_pictures(folder: Path, n: int = N_IMAGES) -> Path:
    """Smooth noise in PNG, one sub-folder for each of three labels."""
    random = np.random.default_rng(0)
    for i in range(n):
        small = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        path = folder / LABELS[i % 3] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((40, 32), Image.Resampling.BICUBIC).save(path)
    return folder


def make_sae(d_in: int = 32, n_latents: int = 96, k: int = 4, **metadata: Any) -> SparseAutoencoder:
    config = SAEConfig(n_latents=n_latents, sparsity=TopK(k=k), normaliser="none")
    sae = SparseAutoencoder(
        d_in, config, seed=1, metadata={"site": SITE, "tokens": "all"} | metadata
    )
    return sae.requires_grad_(False)


def model_facts(model: VisionModel) -> dict[str, Any]:
    return {"id": model.id, "weights_hash": model.weights_hash}


class TensorActivations(LiveActivations):
    """A model's activations, except that the ordered pass gives a tensor."""

    def __init__(
        self, x: Tensor, source: ImageSource, model: VisionModel, tokens: str = "all"
    ) -> None:
        super().__init__(model, source, [SITE], tokens)
        self.x = x

    def ordered(self, sites: Sequence[str], batch_images: int = 64) -> Iterator[OrderedBatch]:
        for images in torch.arange(len(self.x)).split(batch_images):
            yield OrderedBatch(images, {SITE: self.x[images]})


def as_version_1(index: LatentIndex) -> LatentIndex:
    """Rewrite an index on disk as version 0.2 of the package wrote it."""
    new = ("cls_share", "moran", "moran_null", "q10", "q50", "q90", "q99", "histogram")
    new += ("histogram_low", "histogram_high", "map_x", "map_y", "name_threshold")
    shown = {example.image for latent in range(index.n_latents) for example in index.top(latent)}
    shown |= {
        example.image
        for latent in range(index.n_latents)
        for band in index.samples(latent)
        for example in band
    }
    tensors = safetensors.torch.load_file(index.folder / EXAMPLES)
    contents = {
        LATENTS: parquet(index.table.drop_columns(list(new))),
        IMAGES: parquet(index.images.take(sorted(map(index.image_places.tolist().index, shown)))),
        EXAMPLES: safetensors.torch.save(
            {name: tensor for name, tensor in tensors.items() if "uniform" not in name}
        ),
    }
    for path in index.folder.iterdir():
        path.unlink()
    files = {}
    for name, data in contents.items():
        (index.folder / name).write_bytes(data)
        files[name] = [hashlib.sha256(data).hexdigest()]
    settings = dict(index.manifest["settings"])
    del settings["uniform_samples"]
    manifest = {**index.manifest, "version": 1, "files": files, "settings": settings}
    del manifest["n_entries"], manifest["n_label_counts"]
    write_manifest(index.folder, manifest)
    return LatentIndex.open(index.folder)


EVIL = "<script>alert('name')</script>"


def make_run(folder: Path, sae: SparseAutoencoder, activations: TensorActivations) -> Path:
    sae.save_pretrained(folder)
    index = build_index(sae, activations, out=folder / "index", quiet=True)
    alive = [row["latent"] for row in index.table.to_pylist() if row["n_active"]]
    set_names(
        index,
        {
            alive[0]: LatentName(EVIL, 0.9, "truth"),
            alive[1]: LatentName("sun", 0.8, "truth"),
            alive[2]: LatentName("sun", 0.7, "truth"),
        },
    )
    lines = [
        {"step": i, "vectors": 4096 * i, "fvu": 1 / i, "l0": 4.0, "dead": 0.0} for i in range(1, 9)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "config.toml").write_text(f'name = "{EVIL}"\n')
    metrics = {
        "fvu": 0.0834,
        "l0": 4.0,
        "dead": 0.01,
        "n_vectors": 612,
        "fvu_by_position": [0.1] * 17,
        "truth": {"symbol/<b>sun</b>": {"latent": 1, "auc": 0.912, "f1": 0.5, "iou": 0.3}},
        "baselines": {"untrained": {"fvu": 0.777}},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder
