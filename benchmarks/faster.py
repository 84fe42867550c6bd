"""How much time settings for faster extraction save, and how much they change activations.

    python benchmarks/faster.py [--compile]

Three tables: the forward pass of CLIP's ViT-B/32 and ViT-B/16 shapes (random weights) in several
settings, timed in turns; how bfloat16 agrees with float32, at sites of these and of the trained
calibration CLIP; and JPEGs decoded at a part of their size.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from tables import RESULTS, keep
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from sparsight.images import decode_image, open_images
from sparsight.vision import VisionModel, load_model

SITES = ("blocks.{first}.resid_post", "blocks.{middle}.resid_post", "blocks.{last}.resid_post")
TRAINED = "calibration"
JPEG_SIZES = ((1920, 1080), (4032, 3024), (1801, 1201))


@dataclass(frozen=True)
class Options:
    """Time the settings in turns; compare their activations."""

    tables: tuple[Literal["forward", "bfloat16", "jpeg"], ...] = ("forward", "bfloat16", "jpeg")
    """Models to measure."""

    rounds: int = 5
    """Runs of each setting; the fastest counts."""

    batch_size: int = 8
    """Images per forward pass."""

    n_images: int = 16
    """Number of JPEGs per size."""

    photos: Path | None = None
    """Folder of photos to enlarge to JPEGs; default: rendered scenes."""

    compile: bool = False
    """Time torch.compile too, which takes minutes."""

    out: Path = RESULTS
    """File that keeps the tables."""


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as name:
        folders = {f"ViT-B/{size}": save_model(Path(name) / str(size), size) for size in (32, 16)}
        ids = {**{label: str(folder) for label, folder in folders.items()}, TRAINED: TRAINED}
        if "forward" in options.tables:
            rows = [row for each in folders.items() for row in time_forward(*each, options)]
            keep("Forward pass", rows, options.out, name="forward")
        if "bfloat16" in options.tables:
            rows = [row for each in ids.items() for row in compare_precisions(*each, options)]
            keep("bfloat16 against float32", rows, options.out, name="bfloat16")
        if "jpeg" in options.tables:
            files = {size: list(large_jpegs(size, options)) for size in JPEG_SIZES}
            rows = [
                row
                for label in (TRAINED, "ViT-B/32")
                for size in JPEG_SIZES
                for row in compare_jpegs(label, ids[label], size, files[size])
            ]
            keep("JPEGs decoded at a part of their size", rows, options.out, name="jpeg")


def save_model(folder: Path, patch_size: int) -> Path:
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=patch_size)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return folder


def time_forward(label: str, folder: Path, options: Options) -> Iterable[dict[str, Any]]:
    pixels = torch.randn(options.batch_size, 3, 224, 224)
    last = torch.channels_last
    autocast = torch.autocast("cpu", torch.bfloat16)

    def module(dtype: str = "float32", form: torch.memory_format | None = None) -> Any:
        found = load_model(str(folder), device="cpu", dtype=dtype).module
        return found if form is None else found.to(memory_format=form)

    def call(found: Any, context: AbstractContextManager[Any] | None = None) -> Callable[[], None]:
        x = pixels.to(next(found.parameters()).dtype)

        def run() -> None:
            with torch.no_grad(), context or nullcontext():
                found(pixel_values=x)

        return run

    settings = {
        "float32": call(module()),
        "float32, channels_last": call(module(form=last)),
        "float32, autocast to bfloat16": call(module(), autocast),
        "bfloat16": call(module("bfloat16")),
        "bfloat16, channels_last": call(module("bfloat16", last)),
    }
    if options.compile:
        settings["float32, torch.compile"] = call(torch.compile(module()))
        settings["bfloat16, torch.compile"] = call(torch.compile(module("bfloat16")))
    seconds = {name: [] for name in settings}
    for _ in range(options.rounds + 1):  # the first only warms up
        for name, run in settings.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(each[1:]) for name, each in seconds.items()}
    for name, each in best.items():
        yield {
            "model": label,
            "setting": name,
            "images/s": options.batch_size / each,
            "times float32": best["float32"] / each,
        }


def sites_of(model: VisionModel) -> list[str]:
    n = model.n_blocks
    return [each.format(first=0, middle=n // 2, last=n - 1) for each in SITES] + ["embedding"]


def compare_precisions(label: str, id: str, options: Options) -> Iterable[dict[str, Any]]:
    exact, fast = (load_model(id, device="cpu", dtype=each) for each in ("float32", "bfloat16"))
    scenes = open_images(f"calibration:{options.n_images}:7")
    pixels = torch.stack([exact.transform(scenes.load(i)) for i in range(len(scenes))])
    sites = sites_of(exact)
    one, other = exact.read(pixels, sites), fast.read(pixels, sites)
    return ({"model": label, "site": s, **agreement(one[s], other[s])} for s in sites)


def agreement(exact: Tensor, other: Tensor) -> dict[str, float]:
    a, b = exact.flatten(0, 1).double(), other.flatten(0, 1).double()
    error = (a - b).square().sum()
    return {
        "1 − cosine": float(1 - torch.cosine_similarity(a, b).mean()),
        "relative error": float((error / a.square().sum()).sqrt()),
        "FVU": float(error / (a - a.mean(dim=0)).square().sum()),
    }


def compare_jpegs(
    label: str, id: str, size: tuple[int, int], files: Sequence[bytes]
) -> Iterable[dict[str, Any]]:
    model = load_model(id, device="cpu", scale_jpegs=True)
    found = {}
    for scaled in (False, True):
        times = {"decode": 0.0, "preprocess": 0.0}
        pixels = []
        for data in files:
            start = time.perf_counter()
            picture = decode_image(data, model.min_side if scaled else None)
            decoded = time.perf_counter()
            pixels.append(model.transform(picture))
            times["decode"] += decoded - start
            times["preprocess"] += time.perf_counter() - decoded
        sites = sites_of(model)[-2:]
        found[scaled] = (times, picture.size, model.read(torch.stack(pixels), sites))
    (before, _, exact), (after, at, other) = found[False], found[True]
    for site in sites:
        yield {
            "model": label,
            "JPEG": f"{size[0]} × {size[1]}",
            "decoded at": f"{at[0]} × {at[1]}",
            "site": site,
            "ms decode": round(1000 * before["decode"] / len(files), 1),
            "ms decode, scaled": round(1000 * after["decode"] / len(files), 1),
            "ms preprocess": round(1000 * before["preprocess"] / len(files), 1),
            "ms preprocess, scaled": round(1000 * after["preprocess"] / len(files), 1),
            **agreement(exact[site], other[site]),
        }


def large_jpegs(size: tuple[int, int], options: Options) -> Iterable[bytes]:
    """Enlarge images, with the grain of a camera."""
    source = open_images(options.photos or f"calibration:{options.n_images}:7")
    random = np.random.default_rng(0)
    for i in np.linspace(0, len(source) - 1, options.n_images, dtype=int):
        large = np.asarray(source.load(int(i)).resize(size, Image.Resampling.LANCZOS))
        grain = random.normal(0, 6, (size[1], size[0], 1)).astype(np.float32)
        file = io.BytesIO()
        noisy = np.clip(large + grain, 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        yield file.getvalue()


if __name__ == "__main__":
    main(tyro.cli(Options))
