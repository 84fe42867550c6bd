"""`sparsight push`: upload a finished run to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from sparsight.cli.help import Help
from sparsight.cli.options import SHOWN_ALIASES, CommandOptions, Shown, parse
from sparsight.cli.printing import print_notes
from sparsight.errors import UserError

HELP = Help(
    examples=(
        "runs/b32-l9 --to org/name --dry-run preview/",
        "runs/b32-l9 --to org/name --license mit",
    ),
    needed=("run", "to"),
)


@dataclass(frozen=True)
class PushOptions(CommandOptions):
    """Upload a run to the Hugging Face Hub, with a model card: metrics, configuration, images."""

    run: tyro.conf.Positional[Path | None] = None
    """Run folder, or a folder that contains several runs. Required."""

    to: str | None = None
    """Repository, ORG/NAME; created if it does not exist. Required."""

    private: tyro.conf.FlagCreatePairsOff[bool] = False
    """Make the repository private."""

    revision: str | None = None
    """Branch; created if it does not exist."""

    message: str | None = None
    """Commit message."""

    license: str | None = None
    """Licence of the autoencoder, as the Hub spells it: mit, apache-2.0, cc-by-4.0, …"""

    ALIASES: ClassVar[Mapping[str, str]] = SHOWN_ALIASES

    latents: Shown = 12
    """Number of latents to show, with images, for each run that has an index: those that
    are easiest to understand. 0 shows none."""

    model: str | None = None
    """Model that computes the heatmaps if neither codes nor activations of the images are on disk;
    default: the model that each index names."""

    seed: int = 0
    """Seed of the choice of random latents."""

    dry_run: Path | None = None
    """Upload nothing; write the files into this new folder instead."""


def main(arguments: Sequence[str]) -> None:
    """Parse, push, print the address and the size."""
    options = parse(PushOptions, "push", arguments, helped=HELP)
    if options.run is None or options.to is None:
        raise UserError("Name a run folder and the repository: sparsight push RUN --to ORG/NAME.")
    from sparsight.publishing import push_to_hub

    done = push_to_hub(
        options.run,
        options.to,
        private=options.private,
        revision=options.revision,
        message=options.message,
        license=options.license,
        latents=options.latents,
        model=options.model,
        seed=options.seed,
        dry_run=options.dry_run,
    )
    print_notes(done.notes)
    size = f"{len(done.files)} files, {sum(done.files.values()) / 1e6:.1f} MB"
    if done.url is None:
        print(f"{options.dry_run} · {size} for {done.repo_id}; nothing was uploaded")
    else:
        print(f"{done.url} · {size}")
