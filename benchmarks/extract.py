"""Where the time of an extraction goes, and what an early site saves.

    make bench-peers                                   # installs the peers, runs this, too
    python benchmarks/extract.py [--images FOLDER] [--n-images N] [--peers saev] [--out FILE]

A CLIP of the shapes of ViT-B/32 with random weights, saved and loaded as any other, reads JPEGs of
500 × 375. Each site is extracted in a process of its own, so that peak memory is its own, too.

Others extract one block's activations of all tokens, in float32, to disk, in batches as large and
with as many workers; rounds go A B C, C B A. Loading the model is not counted. Ours must have what
the same weights give by hand.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from data_path import BLOCK, EXTRACTORS, Photos
from PIL import Image
from tables import RESULTS, cores, keep
from train_step import OPEN_CLIP, PEERS, versions
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection
from turns import chosen, take_turns, told

from sparsight.activations import extract
from sparsight.images import open_images
from sparsight.vision import load_model

SITES = {
    "early": ("blocks.2.resid_post",),
    "middle": ("blocks.5.resid_post",),
    "late": ("blocks.11.resid_post",),
    "all three": ("blocks.2.resid_post", "blocks.5.resid_post", "blocks.11.resid_post"),
}


@dataclass(frozen=True)
class Options:
    """Extract from early, middle and late sites; print rates, shares of time and memory."""

    images: Path | None = None
    """A folder of pictures; default: JPEGs of 500 × 375 made on the spot."""

    n_images: int = 640
    """How many pictures to read."""

    batch_size: int = 64
    """Images in a forward pass."""

    workers: int | None = None
    """Processes that decode."""

    device: str = "cpu"
    """Where the model runs."""

    peers: tuple[str, ...] = ("by hand", "vit-prisma", "saev")
    """Others, or "none"."""

    rounds: int = 3
    """How many times each of them, and ours, extracts."""

    n_beside: int = 256
    """How many pictures they read each time."""

    peers_folder: Path = PEERS
    """Where other packages are installed."""

    open_clip_folder: Path = OPEN_CLIP
    """Where open_clip is, which saev needs."""

    out: Path = RESULTS
    """File that keeps the tables."""


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model")
        images = options.images or save_photos(folder / "photos", options.n_images)
        if options.peers != ("none",):
            beside_others(folder, images, options)
        rows: list[dict[str, Any]] = []
        for label, sites in SITES.items():
            out = folder / label
            # A process of its own: peak memory never goes down.
            child = multiprocessing.get_context("spawn").Process(
                target=measure, args=(folder / "model", images, sites, out, options)
            )
            child.start()
            child.join()
            if child.exitcode:
                raise SystemExit(child.exitcode)
            rows.append({"site": label, **json.loads(out.with_suffix(".json").read_text())})
        whole = next(row for row in rows if row["site"] == "late")["ms an image in forward"]
        for row in rows:
            row["of the late site's cost"] = row["ms an image in forward"] / whole
        keep("Extraction, ViT-B/32 shapes, all tokens", rows, options.out, name="extract")


JPEGS = (".jpg", ".jpeg")

AGREE = 1e-4
"""Largest distance of an activation from that by hand, as a share of the vectors' norm."""


def beside_others(folder: Path, images: Path, options: Options) -> None:
    some = folder / "some" / "all"  # not all packages can be told how many to read
    some.mkdir(parents=True)
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in JPEGS)
    if not paths:
        raise SystemExit(
            f"{images} holds no JPEGs. Name a folder that does, or leave --images out."
        )
    for i, path in enumerate(paths[: options.n_beside]):
        (some / f"{i:05d}.jpg").symlink_to(path.absolute())
    n_images = sum(1 for _ in some.iterdir())
    photos = Photos(
        some.parent,
        n_images,
        folder / "model",
        folder / "beside",
        peers=options.peers_folder.absolute(),
        open_clip=options.open_clip_folder.absolute(),
        batch_size=options.batch_size,
        workers=cores() if options.workers is None else options.workers,
    )
    jobs = chosen(EXTRACTORS, options.peers, "sparsight")
    results = take_turns(jobs, photos, options.rounds)
    samples = {
        result.name: torch.tensor(result.facts.pop("sample"))
        for result in results
        if "sample" in result.facts
    }
    if {"sparsight", "by hand"} <= samples.keys():
        mine, truth = samples["sparsight"], samples["by hand"]
        off = float((mine - truth).norm(dim=1).max() / truth.norm(dim=1).mean())
        if not off <= AGREE:
            results[0].facts["note"] = f"differs from what is got by hand by {off:.1e}"
    keep(
        f"Extraction beside others: ViT-B/32 shapes, block {BLOCK}, all tokens",
        told(results, "images", n_images, "sparsight", memory=True),
        options.out,
        versions(options.peers, options.peers_folder),
    )


def measure(
    model_folder: Path, images: Path, sites: tuple[str, ...], out: Path, options: Options
) -> None:
    # A spawned process would spawn its own workers, too: seconds that users do not wait for.
    multiprocessing.set_start_method(None, force=True)
    model = load_model(str(model_folder), device=options.device)
    source = open_images(str(images))
    source = source.subset(0, options.n_images)
    store = extract(
        model,
        source,
        sites=sites,
        out=out,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    summary = store.summary
    assert summary is not None
    row = {
        "images": summary.images,
        "images/s": summary.images / summary.seconds,
        "share of time in forward": summary.forward_share,
        "ms an image in forward": 1000 * summary.seconds_in_forward / summary.images,
        "peak MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak MiB of a worker": round(
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        ),
    }
    out.with_suffix(".json").write_text(json.dumps(row))


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(CLIPVisionConfig()).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)


def save_photos(folder: Path, n: int) -> Path:
    """Smooth noise with grain, as JPEG: about as many bytes as a photo has."""
    random = np.random.default_rng(0)
    inside = folder / "all"  # some packages want a folder for each class
    inside.mkdir(parents=True)
    for i in range(n):
        small = random.integers(0, 256, (16, 21, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC)
        grain = random.normal(0, 8, (375, 500, 1))
        noisy = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(inside / f"{i:05d}.jpg", quality=90)
    return folder


if __name__ == "__main__":
    main(tyro.cli(Options))
