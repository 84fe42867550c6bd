"""What remedies for dead latents do: the table `remedies` in QUALITY.md.

Two runs on the calibration CLIP kill many latents without a remedy: TopK with a high learning rate,
where latents lose their places, and ReLU with a high penalty, where they stop being active at all.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tables import QUALITY, keep

import sparsight as sp
from sparsight.sae import (
    AuxK,
    GhostGradients,
    ReLU,
    Resampling,
    SAEConfig,
    SparseAutoencoder,
    TopK,
)
from sparsight.training import Run, TrainConfig


@dataclass(frozen=True)
class Options:
    """Train with each remedy; write the table."""

    site: str = "blocks.-1.resid_post"
    """Where to read the calibration CLIP."""

    n_images: int = 4000
    """Scenes to train on; 500 others to measure on."""

    out: Path = QUALITY
    """File that keeps the table."""


SHORT = TrainConfig(batch_size=512, lr=3e-3, remedy=None)

RUNS: dict[str, TrainConfig] = {
    "TopK": dataclasses.replace(SHORT, sae=SAEConfig(3072, sparsity=TopK(16)), n_vectors=300_000),
    "ReLU": dataclasses.replace(SHORT, sae=SAEConfig(1536, sparsity=ReLU(8.0)), n_vectors=150_000),
}


def remedies(config: TrainConfig) -> dict[str, TrainConfig]:
    """Return the run with each remedy."""
    change = dataclasses.replace
    return {
        "none": config,
        "AuxK": change(config, remedy=AuxK()),
        "AuxK, soon and strong": change(config, remedy=AuxK(alpha=1 / 8, dead_after=10_000)),
        "ghost gradients": change(config, remedy=GhostGradients()),
        "resampling": change(config, remedy=Resampling()),
        "rows from data": change(config, sae=change(config.sae, decoder_init="data")),
    }


def main(options: Options) -> None:
    model, rows = sp.load_model("calibration"), []
    with tempfile.TemporaryDirectory() as folder:
        store, test = (
            sp.extract(
                model,
                sp.open_images(f"calibration:{n}:{seed}"),
                sites=[options.site],
                out=Path(folder) / f"store-{seed}",
            )
            for seed, n in enumerate((options.n_images, 500))
        )
        (site,) = test.sites
        x = torch.cat([batch.activations[site].flatten(0, 1) for batch in test.ordered([site])])
        for kind, config in RUNS.items():
            for name, each in remedies(config).items():
                out = Path(folder) / f"{kind}-{name}"
                start = time.monotonic()
                run = sp.train(store, each, out=out, quiet=True)
                seconds = time.monotonic() - start
                rows.append(row(f"{kind}: {name}", run, x, config.n_vectors / seconds))
    title = (
        f"Remedies for dead latents: calibration CLIP, {site}; TopK(16) of 3,072 latents, "
        f"300,000 vectors; ReLU(l1 = 8) of 1,536 latents, 150,000 vectors; learning rate 0.003"
    )
    keep(title, rows, options.out, name="remedies")


def row(name: str, run: Run, x: torch.Tensor, rate: float) -> dict[str, Any]:
    """Make one row of the table."""
    fvu, l0, dead = measure(run.sae(), x.float())
    lines = run.metrics()
    return {
        "": name,
        "dead": f"{100 * dead:.1f} %",
        "FVU": fvu,
        "L0": l0,
        "revived": sum(line["revived"] for line in lines),
        "resampled": sum(line["resampled"] for line in lines),
        "vectors/s": f"{rate:,.0f}",
    }


@torch.no_grad()
def measure(sae: SparseAutoencoder, x: torch.Tensor) -> tuple[float, float, float]:
    """Measure FVU, L0 and the share of latents that no vector activates."""
    active = torch.zeros(sae.n_latents, dtype=torch.bool)
    error = entries = 0.0
    for batch in x.split(4096):
        found = sae(batch)
        error += (found.x_hat - batch).double().square().sum().item()
        entries += len(found.code.values)
        active[found.code.indices] = True
    spread = (x.double() - x.double().mean(dim=0)).square().sum().item()
    return error / spread, entries / len(x), 1 - active.double().mean().item()


if __name__ == "__main__":
    main(tyro.cli(Options))
