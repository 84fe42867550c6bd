"""`sparsight encode`: write the sparse codes of all activations to disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from sparsight.cli.help import Help
from sparsight.cli.opening import open_saes
from sparsight.cli.options import parse
from sparsight.cli.subject import SubjectOptions, Subjects
from sparsight.errors import UserError
from sparsight.latents import encode

HELP = Help(
    examples=("runs/b32-l9", "runs/b32-l9 --images photos/ --out codes/"),
    needed=("runs",),
)


@dataclass(frozen=True)
class EncodeOptions(SubjectOptions):
    """Write the active latents of every vector to disk."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = tyro.MISSING
    """Run folders, or folders that contain runs."""

    out: Path | None = None
    """Folder of the codes; default: codes/ in each run. Interrupted work is continued."""

    dtype: Literal["float32", "float16"] = "float32"
    """Type of the values on disk."""

    batch_images: int | None = None
    """Images per batch; default: 64, or, with a store, enough for about 16,000 vectors."""

    flush_seconds: float = 60.0
    """Longest time between writes to disk, in seconds; a killed process loses at most this much
    work."""


def main(arguments: Sequence[str]) -> None:
    """Parse, encode, print what the codes hold."""
    options = parse(EncodeOptions, "encode", arguments, helped=HELP)
    saes = open_saes(options.runs, options.device)
    if options.out is not None and len(saes) > 1:
        raise UserError(f"--out works with one SAE, but {len(saes)} are given; leave it out.")
    subjects = Subjects(options)
    for folder, sae in saes.items():
        codes = encode(
            sae,
            subjects.activations(folder, sae),
            out=options.out or folder / "codes",
            dtype=options.dtype,
            batch_images=options.batch_images,
            flush_seconds=options.flush_seconds,
        )
        print(
            f"{codes.path} · {codes.n_vectors:,} vectors, {codes.n_active / codes.n_vectors:.1f} "
            f"of {codes.n_latents:,} latents active"
        )
