"""`sparsight convert`: write an SAE in another project's format, or another project's in ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from sparsight.cli.help import Help
from sparsight.cli.options import CommandOptions, parse
from sparsight.errors import UserError
from sparsight.formats.converting import convert
from sparsight.sae import SparseAutoencoder

HELP = Help(
    examples=(
        "runs/b32-l9 --to saelens --out converted/",
        "lewington/CLIP-ViT-L-scope/22_resid/1200013184.pt --out mine/",
    ),
    needed=("sae", "to", "out"),
)


@dataclass(frozen=True)
class ConvertOptions(CommandOptions):
    """Write an SAE in another format, read the copy back, and compare it with the original.

    SAE is a run, a file or folder in any format that Sparsight reads, or a name on the Hub.
    """

    sae: tyro.conf.Positional[str] = ""
    """Folder, file, or name on the Hub: org/repo, org/repo/folder, org/repo/file.pt."""

    to: str = "sparsight"
    """Format: sparsight, sparsify, saelens, dictionary_learning, …; the error for an unknown format
    lists all formats."""

    out: Path | None = None
    """Folder to write into; it must be empty or new. Required."""

    approximate: bool = False
    """Write a TopK with a ReLU even to formats whose TopK has no ReLU, and report the
    difference."""

    revision: str | None = None
    """Branch, tag or commit on the Hub."""


def main(arguments: Sequence[str]) -> None:
    """Parse, convert, print the path and how exact the copy is."""
    options = parse(ConvertOptions, "convert", arguments, helped=HELP)
    if not options.sae:
        raise UserError("No SAE is given; name a folder, a file, or an SAE on the Hub.")
    if options.out is None:
        raise UserError("No destination is given; name a new folder with --out.")
    sae = SparseAutoencoder.from_pretrained(options.sae, revision=options.revision)
    done = convert(sae, options.to, options.out, approximate=options.approximate)
    source = sae.metadata.get("source", {}).get("format", "sparsight")
    sparsity = sae.config.sparsity.describe(training=False)
    shape = f"{sae.n_latents:,} latents of width {sae.d_in:,}, {sparsity}"
    print(f"{done.path} · {source} → {options.to} · {shape}")
    print(f"read back: x̂ differs by {done.difference:.1e} of its norm")
