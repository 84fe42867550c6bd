"""`sparsight index`: the images and patches that every latent responds to."""

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
from sparsight.latents import CodeStore, build_index
from sparsight.sae import SparseAutoencoder

HELP = Help(
    examples=("runs/b32-l9", "runs/b32-l9 --codes runs/b32-l9/codes"),
    needed=("runs",),
)


@dataclass(frozen=True)
class IndexOptions(SubjectOptions):
    """Find the images that every latent responds to, and name the latents that are known."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = tyro.MISSING
    """Run folders, or folders with runs in them."""

    codes: Path | None = None
    """Codes that `encode` made, to read instead of activations."""

    out: Path | None = None
    """Folder of the index; default index/ in each run's. An index there is replaced."""

    top_n: int = 16
    """Strongest images to keep of each latent."""

    quantiles: int = 4
    """Bands of equally many images into which those that activate a latent are cut."""

    samples_per_quantile: int = 4
    """Images to keep of each band."""

    batch_images: int | None = None
    """Images at a time; default 64, of a store as many as it takes for some 16,000 vectors."""

    seed: int = 0
    """Of the samples."""


def main(arguments: Sequence[str]) -> None:
    """Parse, build, print how many latents are alive and named."""
    options = parse(IndexOptions, "index", arguments, helped=HELP)
    saes = open_saes(options.runs, options.device)
    if options.out is not None and len(saes) > 1:
        raise UserError(f"--out takes one index; {len(saes)} SAEs are given. Leave it out.")
    if options.codes is not None and len(saes) > 1:
        raise UserError(f"--codes are of one SAE; {len(saes)} are given. Name its run alone.")
    if options.codes is not None and (options.store or options.images or options.model):
        raise UserError("--codes already know their images; leave out --store, --images, --model.")
    subjects = Subjects(options)
    codes = None if options.codes is None else CodeStore(options.codes, verify=options.verify)
    for folder, sae in saes.items():
        known = _known(folder, sae)
        index = build_index(
            sae,
            subjects.activations(folder, sae) if codes is None else codes,
            out=options.out or folder / "index",
            top_n=options.top_n,
            quantiles=options.quantiles,
            samples_per_quantile=options.samples_per_quantile,
            batch_images=options.batch_images,
            seed=options.seed,
            metrics=known,
        )
        never = index.n_latents - sum(row > 0 for row in index.table["n_active"].to_pylist())
        named = index.n_latents - index.table["name"].null_count
        print(
            f"{index.folder} · {index.n_latents:,} latents, {never:,} never active, {named:,} named"
        )


def _known(folder: Path, sae: SparseAutoencoder) -> dict[str, Any] | None:
    """The figures that name latents; None where they know no truth, or another SAE's."""
    path = folder / "metrics.json"
    found = read_json(path) if path.exists() else {}
    if "truth" not in found:
        return None
    if found.get("sae", sae.fingerprint()) != sae.fingerprint():
        print_notes(
            [
                f"{path} is about another SAE, so that no latent is named. `sparsight evaluate` "
                "measures this one."
            ]
        )
        return None
    return found
