"""`sparsight encode`: the sparse codes of all activations, kept on disk."""

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
    """Keep the active latents of every vector on disk."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = tyro.MISSING
    """Run folders, or folders with runs in them."""

    out: Path | None = None
    """Folder of the codes; default codes/ in each run's. What was interrupted is continued."""

    dtype: Literal["float32", "float16"] = "float32"
    """Of the values on disk."""

    batch_images: int | None = None
    """Images at a time; default 64, of a store as many as it takes for some 16,000 vectors."""

    flush_seconds: float = 60.0
    """What is in memory is written at least this often: a killed process loses no more."""


def main(arguments: Sequence[str]) -> None:
    """Parse, encode, print what the codes hold."""
    options = parse(EncodeOptions, "encode", arguments, helped=HELP)
    saes = open_saes(options.runs, options.device)
    if options.out is not None and len(saes) > 1:
        raise UserError(f"--out takes the codes of one SAE; {len(saes)} are given. Leave it out.")
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
