"""Images made for latents by every recipe: the table `visualisation` in QUALITY.md.

For random live latents of one SAE, the activation on the made image over that of the best real
image: as it is, and in the mean of held-out changes (a shift, JPEG, a reduction). Without `--run`,
a TopK autoencoder of the last block of the calibration CLIP is trained and indexed first.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import tyro
from tables import QUALITY, keep

import sparsight as sp
from sparsight.intervals import Z_95, wilson_interval
from sparsight.sae import SAEConfig, TopK
from sparsight.training import TrainConfig
from sparsight.visualisation import (
    Transforms,
    Visualisation,
    VisualisationSettings,
    visualize,
)

STILL = Transforms(shift=0.0, scale=0.0, rotate=0.0, crop=1.0, noise=0.0)

SETTINGS = {
    "maco": VisualisationSettings(recipe="maco"),
    "pixels": VisualisationSettings(recipe="pixels"),
    "fourier": VisualisationSettings(recipe="fourier"),
    "network": VisualisationSettings(recipe="network"),
    "maco, others pressed down": VisualisationSettings(recipe="maco", press=1.0),
    "pixels, no transforms": VisualisationSettings(recipe="pixels", transforms=STILL, tv=0.0),
}


@dataclass(frozen=True)
class Options:
    """Make images for random live latents with each recipe; write the table."""

    run: Path | None = None
    """Run with an index; default: one is trained on rendered scenes."""

    name: str = "visualisation"
    """Name of the table."""

    rows: tuple[str, ...] = tuple(SETTINGS)
    """Rows of the table."""

    n: int = 24
    """Latents for `maco` and `pixels`."""

    n_others: int = 12
    """Latents for the other rows: the first of the same ones."""

    n_images: int = 4000
    """Scenes to train on."""

    n_vectors: int = 1_500_000
    """Vectors to train on."""

    steps: int = VisualisationSettings.steps
    """Steps for each image."""

    seed: int = 0
    """Seed of the choice of latents."""

    pictures: Path | None = None
    """Folder in which to keep the images."""

    out: Path = QUALITY
    """File that keeps the table."""


def main(options: Options) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or trained(Path(folder), options)
        sae = sp.SparseAutoencoder.from_pretrained(run, device="cpu")
        index = sp.LatentIndex.open(run / "index", sae)
        model = sp.load_model(str(sae.metadata["model"]["id"]), device="cpu")
        active = index.table["n_active"].to_pylist()
        live = [latent for latent, n in enumerate(active) if n]
        chosen = random.Random(options.seed).sample(live, options.n)
        rows = []
        for name in options.rows:
            settings = replace(SETTINGS[name], steps=options.steps)
            out = None if options.pictures is None else options.pictures / name.replace(" ", "-")
            latents = chosen[: options.n if name in ("maco", "pixels") else options.n_others]
            made = visualize(model, sae, latents, index=index, settings=settings, out=out)
            rows.append(row(name, made))
            print(rows[-1], flush=True)
        title = (
            f"Images made for random live latents: {model.id.split('/')[-1]}, "
            f"{index.site}, {sae.n_latents:,} latents, {options.steps} steps; activation over that "
            "of the best real image"
        )
        keep(title, rows, options.out, name=options.name)


def trained(folder: Path, options: Options) -> Path:
    """Train and index an SAE of the last block of the calibration CLIP."""
    store = sp.extract(
        sp.load_model("calibration", device="cpu"),
        sp.open_images(f"calibration:{options.n_images}"),
        sites=["blocks.-1.resid_post"],
        out=folder / "store",
    )
    config = TrainConfig(
        sae=SAEConfig(n_latents=2048, sparsity=TopK(16)), n_vectors=options.n_vectors
    )
    (run,) = sp.train(store, config, out=folder / "run", quiet=True).values()
    sp.build_index(run.sae(), store, out=run.out / "index", quiet=True)
    return run.out


def row(name: str, made: Sequence[Visualisation]) -> dict[str, Any]:
    """Summarise the results of one recipe."""
    plain = [each.ratio or 0.0 for each in made]
    held_out = [each.held_out_ratio or 0.0 for each in made]
    strict = [each.strict_ratio or 0.0 for each in made]
    return {
        "recipe": name,
        "latents": len(made),
        "median ratio": middle(plain),
        "≥ 1": share(plain),
        "median under changes": middle(held_out),
        "≥ 1 under changes": share(held_out),
        "≥ the unchanged real image": share(strict),
        "median rank": f"{median(each.best.rank for each in made):.0f}",
        "s per latent": f"{fmean(each.seconds for each in made):.1f}",
    }


def middle(values: Sequence[float]) -> str:
    """Return the median with its 95 % interval by order statistics."""
    ordered, n = sorted(values), len(values)
    low = max(0, math.floor((n - Z_95 * math.sqrt(n)) / 2))
    return f"{median(values):.2f} [{ordered[low]:.2f}, {ordered[n - 1 - low]:.2f}]"


def share(values: Sequence[float]) -> str:
    """Return the share of at least 1, with Wilson's interval."""
    n, reached = len(values), sum(value >= 1 for value in values)
    low, high = wilson_interval(reached, n)
    return f"{reached}/{n} [{100 * low:.0f} %, {100 * high:.0f} %]"


if __name__ == "__main__":
    main(tyro.cli(Options))
