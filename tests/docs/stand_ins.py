"""The inputs of the pages' examples: photos, models from the Hub, a published SAE.

The photos are scenes of the calibration world. The models are the calibration CLIP with identity
blocks between its own, so that it is as deep as the model that it replaces and computes the same as
before. They are in a cache of the Hub, where `load_model` finds them by their real names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from transformers import BitImageProcessor, CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from sparsight.calibration import CLIP_FOLDER
from sparsight.images import open_images
from sparsight.sae import SparseAutoencoder
from sparsight.vision import load_model
from sparsight.vision.saving import write_model

CLASSES = 6
COMMIT = "c0ffee"


def save_photos(folder: Path, n: int, seed: int) -> Path:
    """Save scenes of single objects, one sub-folder per class."""
    source = open_images(f"calibration:{n * 16}:{seed}:single")
    classes = set(source.labels()[:CLASSES])
    chosen = [i for i in range(len(source)) if source.info(i).label in classes][:n]
    for i in chosen:
        path = folder / str(source.info(i).label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.load(i).save(path)
    return folder


def save_captions(folder: Path, pairs: Path) -> None:
    """Write a pair file with each image's caption, as programs for fine-tuning read it."""
    captions = {
        str(path.relative_to(folder)): [f"a photo of the {path.parent.name}"]
        for path in sorted(folder.rglob("*.png"))
    }
    pairs.write_text(json.dumps(captions))


def fill_cache(cache: Path) -> None:
    """Put every model that the pages name into a Hub cache."""
    for name, places, positions in (
        ("openai/clip-vit-base-patch32", {3: 0, 6: 1, 9: 2, 11: 3}, 32),
        ("openai/clip-vit-large-patch14", {5: 0, 11: 1, 17: 2, 22: 3}, 77),
        ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", {5: 0, 11: 1, 17: 2, 22: 3}, 77),
    ):
        deep = deepened(12 if positions == 32 else 24, places, positions)
        _save(cache, name, deep.save_pretrained)
        for path in CLIP_FOLDER.glob("*.json"):
            if path.name != "config.json":
                shutil.copy(path, _snapshot(cache, name))
    torch.manual_seed(0)
    dino = Dinov2Model(
        Dinov2Config(
            hidden_size=48, num_hidden_layers=12, num_attention_heads=2, mlp_ratio=2,
            image_size=56, patch_size=14,
        )
    )  # fmt: skip
    processor = BitImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    _save(cache, "facebook/dinov2-small", dino.save_pretrained, processor.save_pretrained)


def deepened(n_blocks: int, places: dict[int, int], positions: int) -> CLIPModel:
    """Make the calibration CLIP with its blocks at some places, and identity blocks elsewhere."""
    shallow = CLIPModel.from_pretrained(CLIP_FOLDER, dtype=torch.float32)
    config = CLIPConfig(**shallow.config.to_dict())
    config.vision_config.num_hidden_layers = n_blocks
    config.text_config.max_position_embeddings = positions
    torch.manual_seed(0)
    deep = CLIPModel(config)
    theirs, state = shallow.state_dict(), deep.state_dict()
    for key in state:
        block = _block(key)
        if block is not None and block not in places:
            if ".out_proj." in key or ".fc2." in key:  # adds nothing to the residual stream
                state[key].zero_()
            continue
        source = key if block is None else _with_block(key, places[block])
        if key == "text_model.embeddings.position_embedding.weight":
            state[key][: len(theirs[key])] = theirs[key]
        elif state[key].shape == theirs[source].shape:
            state[key].copy_(theirs[source])
    deep.load_state_dict(state)
    return deep.eval()


def _block(key: str) -> int | None:
    head, _, rest = key.partition("vision_model.encoder.layers.")
    return int(rest.partition(".")[0]) if rest and not head else None


def _with_block(key: str, block: int) -> str:
    parts = key.split(".")
    parts[3] = str(block)
    return ".".join(parts)


def _snapshot(cache: Path, name: str) -> Path:
    return cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT


def _save(cache: Path, name: str, *save: Callable[[Path], object]) -> None:
    folder = _snapshot(cache, name)
    for write in save:
        write(folder)
    refs = folder.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)


def save_published_sae(cache: Path) -> None:
    """Save a checkpoint in CLIP-Scope's layout, under its real name."""
    numbers = torch.Generator().manual_seed(0)
    width, latents = 192, 256
    enc = torch.randn(width, latents, generator=numbers) / width**0.5
    state = {"pre_b": torch.zeros(width), "enc": enc, "dec": enc.T.contiguous()}
    checkpoint = {"n_features": latents, "d_in": width, "k": 8, "model_state_dict": state}

    def write(folder: Path) -> None:
        (folder / "22_resid").mkdir(parents=True)
        torch.save(checkpoint, folder / "22_resid" / "1200013184.pt")

    _save(cache, "lewington/CLIP-ViT-L-scope", write)


def make(folder: Path, run: Callable[[str], None]) -> None:
    """Fill a folder with `start/`, the inputs of every page, and `hub/`, a Hub cache.

    Args:
        run: function that runs a shell command in `start/`, with the Hub cache in `hub/`.
    """
    fill_cache(folder / "hub")
    save_published_sae(folder / "hub")
    start = folder / "start"
    photos = save_photos(start / "photos", 48, seed=3)
    others = save_photos(start / "other-photos", 18, seed=4)
    shutil.copy(min(others.rglob("*.png")), start / "mine.png")
    shutil.copytree(photos, start / "coco")
    save_captions(start / "coco", start / "coco.json")
    for name in ("attacks", "imagenet-val"):
        shutil.copytree(others, start / name)
    for command in lines(TRAINING):
        run(command)
    for name in ("b32-l9", "embedding"):
        put_busy_latents_first(start / "runs" / name, start)
    for command in lines(MEASURING):
        run(command)
    sae = SparseAutoencoder.from_pretrained(start / "runs" / "b32-l9")

    def publish(snapshot: Path) -> None:
        sae.save_pretrained(snapshot / "layers.9", format="sparsify")

    _save(folder / "hub", "org/repo", publish)
    sae.save_pretrained(start / "old", format="dictionary_learning")
    model = load_model(str(_snapshot(folder / "hub", "openai/clip-vit-base-patch32")))
    write_model(model, start / "tuned.safetensors", layout="openai", gmp=True)
    shutil.copy(CLIP_FOLDER / "tokenizer.json", start)
    shutil.copy(CLIP_FOLDER / "tokenizer_config.json", start)


def put_busy_latents_first(run: Path, start: Path) -> None:
    """Renumber the latents of a run, so that those named in the pages are active on images."""
    sae = SparseAutoencoder.from_pretrained(run)
    model = load_model(sae.metadata["model"]["id"])
    source = open_images(start / "photos")
    pixels = [model.transform(source.load(i)) for i in range(len(source))]
    pixels.append(model.transform(Image.open(start / "mine.png")))
    site = str(sae.metadata["site"])
    active = sae.encode(model.read(torch.stack(pixels), site, "cls")[site][:, 0]).dense() > 0
    busy = (active.sum(0) * active[-1]).argsort(descending=True, stable=True).tolist()
    order = [None] * sae.n_latents
    for named in NAMED_LATENTS:
        order[named] = busy.pop(0)
    order = [busy.pop(0) if latent is None else latent for latent in order]
    with torch.no_grad():
        for weight in (sae.W_enc, sae.b_enc, *([] if sae.config.tied else [sae.W_dec])):
            weight.copy_(weight[order])
    sae.save_pretrained(run)


def lines(commands: str) -> list[str]:
    return commands.replace("\n    ", " ").strip().split("\n")


NAMED_LATENTS = (12, 17, 40, 88)
"""Latents that examples name by number."""

TRAINING = """
sparsight extract --model openai/clip-vit-base-patch32 --images photos/
    --sites blocks.9.resid_post --tokens cls --out acts/ --workers 0
sparsight train --store acts/ --out runs/b32-l9 --sae.n-latents 128 --sae.sparsity.k 16
    --n-vectors 60000 --batch-size 256 --lr 2e-3
sparsight extract --model openai/clip-vit-base-patch32 --images photos/
    --sites blocks.9.resid_post --tokens all --out acts-all/ --workers 0
sparsight extract --model openai/clip-vit-base-patch32 --images other-photos/
    --sites blocks.9.resid_post --tokens cls --out acts-of-other-photos/ --workers 0
sparsight train --model openai/clip-vit-base-patch32 --images photos/ --sites embedding
    --sae.tied --sae.n-latents 256 --sae.sparsity.k 8 --n-vectors 8192 --batch-size 256
    --out runs/embedding --workers 0
"""
MEASURING = """
sparsight evaluate runs/b32-l9
sparsight index runs/b32-l9
"""
"""The quick start, smaller, and other results that pages assume."""
