"""The whole chain on images that Sparsight renders itself: `sparsight demo`, or `run_demo`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsight.activations import ActivationStore, extract
from sparsight.config import check_seed, check_types, first_difference, load, to_dict, write_toml
from sparsight.errors import SparsightError, UserError
from sparsight.evaluation import evaluate
from sparsight.files import read_json
from sparsight.images import open_images
from sparsight.latents import LatentIndex, build_index, name_from_truth, write_report
from sparsight.latents.run_files import find_runs
from sparsight.sae import AuxK, SAEConfig, TopK
from sparsight.training import Run, TrainConfig, train
from sparsight.vision import VisionModel, load_model

CONFIG = "demo.toml"
DEAD_AFTER = 40_000
"""Vectors without an activation after which a latent counts as dead in training."""


@dataclass(frozen=True)
class DemoConfig:
    """The size of the demo."""

    n_images: int = 4000
    """Number of scenes to train on."""

    n_test: int = 2000
    """Number of scenes with another seed, to measure on and to show."""

    sites: tuple[str, ...] = ("blocks.-2.resid_post", "blocks.-1.resid_post")
    """Sites of the calibration CLIP to read."""

    n_latents: int = 3072
    """Latents of each autoencoder."""

    k: int = 48
    """Largest number of active latents per vector."""

    n_vectors: int = 1_100_000
    """Number of vectors to train on; with the defaults, about four passes over the store."""

    latents: int = 24
    """Number of latents of each autoencoder that the report shows."""

    seed: int = 0
    """Seed of the scenes, the weights and the order of training."""

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self.seed)
        for name in ("n_images", "n_test"):
            if getattr(self, name) < 100:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 100 or more.")
        if self.latents < 0:
            raise UserError(f"latents is {self.latents}; it must be 0 or more.")
        if not self.sites:
            raise UserError("sites is empty; name at least one.")


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo.

    Attributes:
        report: path of the page.
        metrics: contents of `metrics.json`, by site.
    """

    report: Path
    metrics: Mapping[str, Mapping[str, Any]]


def run_demo(
    out: str | Path = "demo", config: DemoConfig | None = None, *, quiet: bool = False
) -> DemoResult:
    """Render, extract, train, evaluate, index, name and report; continue an interrupted demo.

    Args:
        out: folder for `report.html`, `store/` (to train on), `held-out/` (to measure on) and
            `runs/SITE/`.
        config: sizes.
        quiet: show no progress bars.

    Raises:
        UserError: `out` holds a demo with another configuration.
    """
    out, config = Path(out), config or DemoConfig()
    _claim(out, config)
    report = out / "report.html"
    if report.exists():  # it is written last
        return DemoResult(report, _metrics(out))
    model = load_model("calibration")
    store, held_out = (
        extract(model, open_images(images), sites=config.sites, out=out / name, quiet=quiet)
        for name, images in {
            "store": f"calibration:{config.n_images}:{config.seed}",
            "held-out": f"calibration:{config.n_test}:{config.seed + 1}",
        }.items()
    )
    run = train(store, train_config(config), out=out / "runs", quiet=quiet)
    for site in run.sites:
        metrics = _measure(run, site, model, held_out, quiet)
        _look(run, site, held_out, metrics, quiet)
    write_report(
        [run.folder(site) for site in run.sites],
        report,
        model=model,
        latents=config.latents,
        seed=config.seed,
        quiet=quiet,
    )
    return DemoResult(report, _metrics(out))


def _metrics(out: Path) -> dict[str, Mapping[str, Any]]:
    """Read the metrics of every autoencoder of a finished demo."""
    reports = (read_json(folder / "metrics.json") for folder in find_runs(out / "runs"))
    return {metrics["site"]: metrics for metrics in reports}


def _claim(out: Path, config: DemoConfig) -> None:
    """Write the configuration into `out`, or compare it with an existing one."""
    path = out / CONFIG
    if not path.exists():
        write_toml(path, config)
        return
    different = first_difference(to_dict(load(DemoConfig, path)), to_dict(config))
    if different is not None:
        raise UserError(
            f"{out} holds a demo with another {different}. Name another folder with --out, or "
            "remove this one."
        )


def train_config(config: DemoConfig) -> TrainConfig:
    """Return how the demo trains each autoencoder."""
    sae = SAEConfig(n_latents=config.n_latents, sparsity=TopK(k=config.k))
    # A run of one minute needs many steps rather than large batches, and a short dead window.
    return TrainConfig(
        sae=sae,
        n_vectors=config.n_vectors,
        batch_size=1024,
        lr=1e-3,
        remedy=AuxK(alpha=1 / 8, dead_after=DEAD_AFTER),
        seed=config.seed,
    )


def _measure(
    run: Run, site: str, model: VisionModel, held_out: ActivationStore, quiet: bool
) -> Mapping[str, Any]:
    """Evaluate on scenes that training did not see, unless that is already done."""
    path = run.folder(site) / "metrics.json"
    if path.exists():
        return read_json(path)
    evaluate(run.sae(site), held_out, model=model, quiet=quiet).save(path)
    return read_json(path)


def _look(
    run: Run, site: str, held_out: ActivationStore, metrics: Mapping[str, Any], quiet: bool
) -> None:
    """Build the index of a site and name its latents, unless that is already done."""
    folder = run.folder(site) / "index"
    sae = run.sae(site)
    try:
        index = LatentIndex.open(folder, sae)
    except SparsightError:  # missing, of another SAE, or damaged
        build_index(sae, held_out, out=folder, metrics=metrics, quiet=quiet)
        return
    if index.table["name"].null_count == index.n_latents:
        name_from_truth(index, metrics)
