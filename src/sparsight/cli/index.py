"""`sparsight index`: find the images and patches to which each latent responds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from sparsight.cli.help import Help
from sparsight.cli.opening import open_saes
from sparsight.cli.options import parse
from sparsight.cli.printing import print_notes
from sparsight.cli.subject import SubjectOptions, Subjects
from sparsight.errors import UserError
from sparsight.files import read_json
from sparsight.latents import CodeStore, LatentIndex, build_index, upgrade_index
from sparsight.latents.build import UNIFORM_SAMPLES
from sparsight.latents.embedding_writer import Wanted
from sparsight.latents.index_files import VERSION
from sparsight.sae import SparseAutoencoder

HELP = Help(
    examples=(
        "runs/b32-l9",
        "runs/b32-l9 --codes runs/b32-l9/codes",
        "runs/b32-l9 --upgrade",
    ),
    needed=("runs",),
    common=(
        *("store", "images", "codes", "out", "top-n", "upgrade", "embeddings", "neighbours"),
        *("seed",),
    ),
)


@dataclass(frozen=True)
class IndexOptions(SubjectOptions):
    """Find each latent's top-activating images and patches, and name latents by ground truth."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = tyro.MISSING
    """Run folders, or folders that contain runs."""

    codes: Path | None = None
    """Codes written by `encode`, to read instead of activations."""

    out: Path | None = None
    """Folder of the index; default: index/ in each run. An existing index is replaced."""

    top_n: int = 16
    """Top-activating images to keep per latent."""

    quantiles: int = 4
    """Number of quantiles into which the images that activate a latent are divided."""

    samples_per_quantile: int = 4
    """Images to keep per quantile."""

    uniform_samples: int = UNIFORM_SAMPLES
    """Images to draw from all in which a latent fires."""

    upgrade: bool = False
    """Bring an index of format version 1 to version 2: keep its names and settings, and read its
    images once more."""

    embeddings: Wanted = "auto"
    """Embeddings of the images, for nearest images, near misses and examples without
    near-duplicates: joint with texts, pooled activations, or codes; auto: what costs no further
    computing."""

    neighbours: bool = True
    """Find the closest latents of each latent, and its place on the map."""

    batch_images: int | None = None
    """Images per batch; default: 64, or, with a store, enough for about 16,000 vectors."""

    seed: int = 0
    """Seed of the samples."""


def main(arguments: Sequence[str]) -> None:
    """Parse, build, print how many latents are alive and named."""
    options = parse(IndexOptions, "index", arguments, helped=HELP)
    saes = open_saes(options.runs, options.device)
    if options.out is not None and len(saes) > 1:
        raise UserError(f"--out works with one SAE, but {len(saes)} are given; leave it out.")
    if options.codes is not None and len(saes) > 1:
        raise UserError(
            f"--codes works with one SAE, but {len(saes)} are given; name only its run."
        )
    if options.codes is not None and (options.store or options.images or options.model):
        raise UserError(
            "--codes already names its images; leave out --store, --images and --model."
        )
    subjects = Subjects(options)
    codes = None if options.codes is None else CodeStore(options.codes, verify=options.verify)
    for folder, sae in saes.items():
        out = options.out or folder / "index"
        data = subjects.activations(folder, sae) if codes is None else codes
        if options.upgrade:
            if LatentIndex.open(out, sae).version == VERSION:
                print_notes([f"{out} has the newest format already, so nothing is read or changed"])
            index = upgrade_index(out, sae, data, batch_images=options.batch_images)
        else:
            index = build_index(
                sae,
                data,
                out=out,
                top_n=options.top_n,
                quantiles=options.quantiles,
                samples_per_quantile=options.samples_per_quantile,
                uniform_samples=options.uniform_samples,
                batch_images=options.batch_images,
                seed=options.seed,
                metrics=_known(folder, sae),
                embeddings=options.embeddings,
                neighbours=options.neighbours,
            )
        never = index.n_latents - sum(row > 0 for row in index.table["n_active"].to_pylist())
        named = index.n_latents - index.table["name"].null_count
        print(
            f"{index.folder} · {index.n_latents:,} latents, {never:,} never active, {named:,} named"
        )


def _known(folder: Path, sae: SparseAutoencoder) -> dict[str, Any] | None:
    """Return the metrics that name latents; None if they lack ground truth or are another SAE's."""
    path = folder / "metrics.json"
    metrics = read_json(path) if path.exists() else {}
    if "truth" not in metrics:
        return None
    if metrics.get("sae", sae.fingerprint()) != sae.fingerprint():
        print_notes(
            [
                f"{path} belongs to another SAE, so no latents are named; `sparsight evaluate` "
                "measures this one."
            ]
        )
        return None
    return metrics
