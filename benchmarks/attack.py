"""How much accuracy words on images cost the calibration CLIP, and how much ablating their latents
wins back: the table `attack` in QUALITY.md.

SAEs are trained on scenes of one seed, latents are found on scenes of a second, and everything is
measured on scenes of a third. Random latents of equal density are the comparison.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tables import QUALITY, keep

import sparsight as sp
from sparsight.attacks import (
    AttackPairs,
    CausalReport,
    SalienceTable,
    Target,
    causal_check,
    find_text_salient,
    make_pairs,
)
from sparsight.editing import MeanAblation
from sparsight.sae import SparseAutoencoder
from sparsight.training import TrainConfig
from sparsight.vision import VisionModel

CONFIG = TrainConfig(
    sae=sp.SAEConfig(n_latents=2048, sparsity=sp.TopK(k=16)),
    n_vectors=1_000_000,
    batch_size=1024,
    lr=1e-3,
    remedy=sp.AuxK(alpha=1 / 8, dead_after=40_000),
)


@dataclass(frozen=True)
class Options:
    """Train, find latents, ablate them; write the table."""

    blocks: tuple[int, ...] = (1, 2, 3)
    """Blocks whose outputs get an SAE and whose MLP neurons are tested."""

    n_images: int = 4000
    """Scenes to train on."""

    find: str = "calibration:600:5001:single"
    """Scenes to find latents on."""

    measure: str = "calibration:400:990000:single"
    """Scenes to measure on, from the world on which the CLIP itself was measured."""

    draws: int = 5
    """Sets of random latents."""

    workers: int = 0
    """Processes that draw scenes."""

    folder: Path | None = None
    """Folder that keeps store and SAEs, so that a second call continues; default: none are kept."""

    out: Path = QUALITY
    """File that keeps the table."""


@dataclass
class Bench:
    """A model, the scenes to find latents and to measure on, and the results so far."""

    model: VisionModel
    find: AttackPairs
    measure: AttackPairs
    options: Options

    def salience(self, sae: SparseAutoencoder | None, site: str, contrast: Any) -> SalienceTable:
        return find_text_salient(
            self.model, self.find, sae, site=site, contrast=contrast, workers=self.options.workers
        )

    def check(self, targets: Sequence[Target]) -> CausalReport:
        options = self.options
        return causal_check(
            self.model, self.measure, targets, draws=options.draws, workers=options.workers
        )


def main(options: Options) -> None:
    model = sp.load_model("calibration")
    bench = Bench(
        model,
        make_pairs(sp.open_images(options.find)),
        make_pairs(sp.open_images(options.measure)),
        options,
    )
    sites = [f"blocks.{block}.resid_post" for block in options.blocks]
    rows: list[dict[str, Any]] = []
    temporary = tempfile.TemporaryDirectory() if options.folder is None else nullcontext("")
    with temporary as folder:
        kept = options.folder or Path(folder)
        images = sp.open_images(f"calibration:{options.n_images}:0")
        store = sp.extract(model, images, sites=sites, out=kept / "store", quiet=True)
        run = sp.train(store, CONFIG, out=kept / "run", quiet=True)
        saes = {site: run.sae(site) for site in sites}
    middle = sites[len(sites) // 2]
    for site in sorted(sites, key=lambda each: each != middle):
        sae = saes[site]
        contrasts = ("attack", "writing", "word") if site == middle else ("attack",)
        for contrast in contrasts:
            table = bench.salience(sae, site, contrast)
            name = f"latents of {site}, {table.about['compares']}"
            add(rows, options, name, table, bench, {"selective": table.selective}, sae)
            if site == middle and contrast == "attack":
                add(rows, options, name, table, bench, {"all found": table.found}, sae)
                means = MeanAblation(table.mean["clean"].tolist())
                chosen = {"selective, to the clean mean": table.selective}
                add(rows, options, name, table, bench, chosen, sae, means)
    neurons = [bench.salience(None, f"blocks.{i}.mlp_post", "attack") for i in options.blocks]
    for least in (0.5, 0.9):
        targets = [
            Target(table, chosen)
            for table in neurons
            if (chosen := table.select(selectivity=least))
        ]
        where = ", ".join(str(block) for block in options.blocks)
        name = f"neurons of the MLPs of blocks {where}, attacked - clean"
        rows.append(row(name, f"selectivity {least}", targets, bench.check(targets)))
    write(rows, options)


def add(
    rows: list[dict[str, Any]],
    options: Options,
    name: str,
    table: SalienceTable,
    bench: Bench,
    chosen: Mapping[str, Sequence[int]],
    sae: SparseAutoencoder,
    action: Any = None,
) -> None:
    """Measure one choice, and write the table so far."""
    ((which, latents),) = chosen.items()
    if not latents:
        rows.append({**dict.fromkeys(rows[0], "–"), "": name, "off": f"{which}: none"})
        return
    options_of = {} if action is None else {"action": action}
    targets = [Target(table, latents, sae, **options_of)]
    rows.append(row(name, which, targets, bench.check(targets)))
    write(rows, options)


def row(name: str, which: str, targets: Sequence[Target], found: CausalReport) -> dict[str, Any]:
    """Make one row of the table."""
    n = sum(len(target.chosen or ()) for target in targets)
    assert found.random is not None
    before, after = found.original, found.found.accuracy
    low, high = found.found.won_back.interval or (0.0, 0.0)
    random = found.random.won_back.interval or (0.0, 0.0)
    return {
        "": name,
        "off": f"{which}: {n}",
        "density": f"{100 * found.density:.2f} %",
        "clean": change(before["clean"].value, after["clean"].value),
        "attacked": change(before["attacked"].value, after["attacked"].value),
        "nonsense": change(before["control"].value, after["control"].value),
        "fooled": change(found.fooled.value, found.found.fooled.value),
        "won back": f"{percent(found.found.won_back.value)} ({low:.0%} to {high:.0%})",
        "random: won back": (
            f"{percent(found.random.won_back.value)} ({random[0]:.0%} to {random[1]:.0%})"
        ),
        "random: clean": percent(found.random.accuracy["clean"]),
    }


def write(rows: Sequence[dict[str, Any]], options: Options) -> None:
    title = (
        f"Words that fool the calibration CLIP, before → with latents or neurons switched off. "
        f"TopK({CONFIG.sae.sparsity.k}) SAEs of {CONFIG.sae.n_latents:,} latents; found on "
        f"{options.find}, measured on {options.measure}; all positions; {options.draws} draws of "
        "random ones of equal density"
    )
    keep(title, rows, options.out, name="attack")


def change(before: float, after: float) -> str:
    return f"{percent(before)} → {percent(after)}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main(tyro.cli(Options))
