"""Where the time of an extraction goes, and what an early site saves.

    python benchmarks/extract.py [--images FOLDER] [--n-images N] [--out FILE]

A CLIP of the shapes of ViT-B/32 with random weights, saved and loaded as any other, reads JPEGs of
500 × 375. Each site is extracted in a process of its own, so that peak memory is its own, too.
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
from PIL import Image
from tables import RESULTS, keep
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

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

    out: Path = RESULTS
    """File that keeps the table."""


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model")
        images = options.images or save_photos(folder / "photos", options.n_images)
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
    folder.mkdir()
    for i in range(n):
        small = random.integers(0, 256, (16, 21, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC)
        grain = random.normal(0, 8, (375, 500, 1))
        noisy = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i:05d}.jpg", quality=90)
    return folder


if __name__ == "__main__":
    main(tyro.cli(Options))
