"""Train the published recipes and our default on the calibration world; write the docs' table.

    python benchmarks/recipes.py [--n-images N] [--n-vectors N] [--out FOLDER]

Every row trains on the same scenes, for the same number of vectors, and is measured on scenes of
another world. Each recipe is compared with Sparsight's default at the recipe's site, tokens and
batch size.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import sparsight as sp
from sparsight.config import load
from sparsight.files import write_text
from sparsight.training import TrainRecipe

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "recipes.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEAD = ("", "site, tokens", "latents", "FVU", "FVU by batch", "L0", "dead", "symbols, mean AUC")


@dataclass(frozen=True)
class Options:
    """Train the recipes and our default; write the table to docs/recipes.md."""

    n_images: int = 16_000
    """Scenes to train on."""

    n_test: int = 2000
    """Scenes of another world to measure on."""

    n_vectors: int = 1_000_000
    """Vectors that each run trains on."""

    out: Path | None = None
    """Folder of stores and runs, so that a second call continues; default: a temporary folder."""


def main(options: Options) -> None:
    """Train the missing runs, print the table and put it into the page."""
    if options.out is None:
        with tempfile.TemporaryDirectory() as folder:
            return main(dataclasses.replace(options, out=Path(folder)))
    rows = [row(*each, options) for each in runs(options)]
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text = (
        f"{options.n_vectors:,} vectors of {options.n_images:,} scenes each, measured on "
        f"{options.n_test:,} scenes of another world:\n\n{table}"
    )
    print(text)
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    write_text(PAGE, f"{before}{BEGIN}\n{text}\n{END}{after}")
    return None


def runs(options: Options) -> Iterator[tuple[str, TrainRecipe]]:
    """Yield each recipe, and our default in its place."""
    for path in sorted((ROOT / "recipes").glob("imagenet-mini-*.toml")):
        recipe = load(TrainRecipe, path)
        number = path.stem.rpartition("-")[2]
        published = dataclasses.replace(recipe.train, n_vectors=options.n_vectors)
        yield f"run {number}", dataclasses.replace(recipe, train=published)
        # The same number of steps too: a short run at the default's 4,096 vectors per step has too
        # few.
        default = sp.TrainConfig(n_vectors=options.n_vectors, batch_size=recipe.train.batch_size)
        yield f"default, as {number}", dataclasses.replace(recipe, train=default)


def row(name: str, recipe: TrainRecipe, options: Options) -> tuple[str, ...]:
    """Train and measure one run."""
    assert options.out is not None
    model = sp.load_model("calibration")
    (site,) = (model.canonical_site(site) for site in recipe.sites)
    stores = {
        seed: sp.extract(
            model,
            sp.open_images(f"calibration:{n}:{seed}"),
            sites=[site],
            tokens=recipe.tokens,
            out=options.out / f"{site}-{recipe.tokens}-{seed}",
        )
        for seed, n in enumerate((options.n_images, options.n_test))
    }
    run = sp.train(stores[0], recipe.train, out=options.out / name.replace(", ", "-"))
    metrics = sp.evaluate(run.sae(), stores[1], baselines=False).metrics
    return (
        name,
        f"`{site}`, {recipe.tokens}",
        f"{metrics['n_latents']:,}",
        *(number(metrics[key]) for key in ("fvu", "fvu_batch", "l0")),
        f"{100 * metrics['dead']:.1f} %",
        number(metrics["truth_summary"]["symbol"]["auc"]["mean"]),
    )


def number(value: Any) -> str:
    """Write a number with three digits."""
    return "–" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    main(tyro.cli(Options))
