"""Where the time of an extraction goes, and what an early site saves.

    make bench-peers                                   # installs the peers and runs this too python
    benchmarks/extract.py [--images FOLDER] [--n-images N] [--peers saev] [--out FILE]

A CLIP with the shapes of ViT-B/32 and random weights, saved and loaded like any other, reads JPEGs
of 500 × 375. Each site is extracted in a separate process, so that it has its own peak memory.
Other packages extract one block's activations of all tokens, in float32, to disk, with the same
batch size and number of workers; rounds go A B C, C B A. Loading the model is not counted. Our
result must equal that of the same weights in a plain loop.
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
    """A folder of images; default: JPEGs of 500 × 375 made for the benchmark."""

    n_images: int = 640
    """Number of images to read."""

    batch_size: int = 64
    """Images per forward pass."""

    workers: int | None = None
    """Processes that decode."""

    device: str = "cpu"
    """Where the model runs."""

    peers: tuple[str, ...] = ("by hand", "vit-prisma", "saev")
    """Names of other packages, or "none"."""

    rounds: int = 3
    """Number of rounds."""

    n_beside: int = 256
    """Number of images per round."""

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
"""Largest distance of an activation from that of the plain loop, relative to the vectors' norm."""


def beside_others(folder: Path, images: Path, options: Options) -> None:
    some = folder / "some" / "all"  # not all packages have a limit on the number of images
    some.mkdir(parents=True)
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in JPEGS)
    if not paths:
        raise SystemExit(
            f"{images} holds no JPEGs. Give a folder that does, or leave --images out."
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
    # A spawned process would spawn workers too, which costs seconds that users do not wait for.
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
    inside = folder / "all"  # some packages expect one folder per class
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
