"""`sparsight taxonomy`: what kind of thing each latent stands for, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from sparsight.cli.help import Help
from sparsight.cli.opening import open_saes
from sparsight.cli.options import parse
from sparsight.cli.printing import print_notes, print_table
from sparsight.cli.subject import SubjectOptions, Subjects
from sparsight.folders import settled
from sparsight.latents import LatentIndex
from sparsight.latents.index_files import MANIFEST
from sparsight.latents.run_files import run_names
from sparsight.taxonomy import Evidence, Rule, classify, follow, write_taxonomy
from sparsight.taxonomy.classifying import MAX_IMAGES
from sparsight.taxonomy.following import LEAST_CORRELATION
from sparsight.taxonomy.writing import table_rows

HELP = Help(
    examples=("runs/l2 runs/l5 runs/l8", "runs/sweep --out taxonomy/"),
    needed=("runs",),
    common=("out", "max-images", "false-kinds", "truth", "store"),
)


@dataclass(frozen=True)
class TaxonomyOptions(SubjectOptions):
    """Find what kind of thing each latent stands for: colour, texture or pattern, part, object,
    scene, text, position or none; follow latents from layer to layer."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = tyro.MISSING
    """Run folders, or folders that contain runs, in the order of the layers; all of one model on
    the same images."""

    out: Path = Path("taxonomy")
    """Folder for the tables, the plots and the edges between layers."""

    truth: bool = True
    """Use the ground truth of calibration images. Without it, names, labels and the rule decide."""

    false_kinds: float = 0.05
    """Share of an untrained autoencoder's latents that may get a kind."""

    max_images: int = MAX_IMAGES
    """Measure on a random sample of this many images."""

    least_correlation: float = LEAST_CORRELATION
    """Link two latents only if their correlation over images reaches this."""

    links: int = 1
    """Number of links from each latent to the next layer."""

    seed: int = 0
    """Seed of the sample of images and of the untrained autoencoders."""


def main(arguments: Sequence[str]) -> None:
    """Parse, classify, print one line per layer."""
    options = parse(TaxonomyOptions, "taxonomy", arguments, helped=HELP)
    rule = Rule(false_kinds=options.false_kinds)
    saes = open_saes(options.runs, options.device)
    subjects = Subjects(options)
    names = run_names(list(saes))
    evidence = {
        name: Evidence.of(LatentIndex.open(folder), sae, truth=options.truth)
        for name, (folder, sae) in zip(names, saes.items(), strict=True)
        if (settled(folder / "index") / MANIFEST).exists()
    }
    layers = classify(
        {
            name: (sae, subjects.activations(folder, sae))
            for name, (folder, sae) in zip(names, saes.items(), strict=True)
        },
        rule=rule,
        truth=options.truth,
        evidence=evidence,
        max_images=options.max_images,
        seed=options.seed,
    )
    edges = follow(layers, n=options.links, least=options.least_correlation)
    write_taxonomy(layers, edges, options.out)
    print_table(table_rows(layers, intervals=False))
    shares = ", ".join(f"{100 * layer.null_share:.1f} %" for layer in layers)
    print_notes([f"of an untrained SAE's latents, the rule gives a kind to {shares}."])
    print(f"{options.out} · {len(edges):,} links between layers")
