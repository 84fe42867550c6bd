"""`sparsight extract`: a model's activations over images, kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from sparsight.cli.help import Help
from sparsight.cli.options import ModelOptions, parse

HELP = Help(
    examples=(
        "--model openai/clip-vit-base-patch32 --images photos/ --out acts/",
        "--model calibration --images calibration:500 --sites 'blocks.*.resid_post' --out acts/",
    ),
)


@dataclass(frozen=True)
class ExtractOptions(ModelOptions):
    """Run a vision model over images and keep its activations in a store."""

    model: str = tyro.MISSING
    """Hub id, local folder, "open_clip:NAME/PRETRAINED", or "calibration"."""

    images: str = tyro.MISSING
    """Folder, "webdataset:…", "parquet:…", "hf:NAME[:SPLIT]", or "calibration[:N[:SEED]]"."""

    sites: tuple[str, ...] = ("blocks.-1.resid_post",)
    """Sites to read, e.g. blocks.9.resid_post; negative blocks count from the end, and `*` stands
    for every block."""

    tokens: Literal["all", "patches", "cls", "mean"] = "all"
    """Which positions to keep."""

    out: Path = tyro.MISSING
    """Folder of the store; an interrupted extraction is continued."""

    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of the numbers on disk."""

    batch_size: int = 64
    """Images per forward pass."""

    flush_seconds: float = 60.0
    """Longest time between writes to disk, in seconds; a killed process loses at most this much
    work."""


def main(arguments: Sequence[str]) -> None:
    """Parse, extract, print what the store holds."""
    options = parse(ExtractOptions, "extract", arguments, helped=HELP)
    from sparsight.activations import extract
    from sparsight.cli.opening import open_model
    from sparsight.cli.printing import print_notes
    from sparsight.images import open_images

    images = open_images(options.images, table=options.table)
    print_notes(images.notes)
    store = extract(
        open_model(options.model, options),
        images,
        sites=options.sites,
        tokens=options.tokens,
        out=options.out,
        dtype=options.dtype,
        batch_size=options.batch_size,
        flush_seconds=options.flush_seconds,
        workers=options.workers,
        max_failed=options.max_failed,
    )
    for site in store.sites:
        print(f"{options.out} · {site}: {store.n_vectors(site):,} vectors of {store.d_in(site)}")
