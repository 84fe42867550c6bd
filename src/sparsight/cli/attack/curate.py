"""`sparsight attack curate`: the pictures that drive what was found most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from sparsight.attacks import SalienceTable, curate
from sparsight.attacks.curating import SENTENCE, Captions
from sparsight.cli.attack.shared import model_of, target_of
from sparsight.cli.help import Help
from sparsight.cli.options import ModelOptions, parse
from sparsight.cli.printing import print_notes
from sparsight.images import open_images

HELP = Help(
    examples=("attack/blocks.9.resid_post --images photos/ --out attack-set/",),
    needed=("found", "images", "out"),
)


@dataclass(frozen=True)
class CurateOptions(ModelOptions):
    """Write the pictures that drive what was found most: a folder with captions, and a tar."""

    found: tyro.conf.Positional[tuple[Path, ...]] = tyro.MISSING
    """Folders that `attack find` wrote."""

    images: str = tyro.MISSING
    """Pictures to choose from, in any form that `extract` takes."""

    out: Path = Path("attack-set")
    """Folder to write; it must not be there yet."""

    model: str | None = None
    """Vision model; default the one that latents were found in."""

    n: int = 200
    """Pictures to keep."""

    captions: Captions = "labels"
    """own: those of the pictures. labels: labels in a sentence. zero-shot: the likeliest class in
    one. opinion: the words that come closest to the picture, by gradient ascent."""

    sentence: str = SENTENCE
    """What labels and classes stand in; {} is their place."""

    classes: tuple[str, ...] = ()
    """Of zero-shot captions; default the labels of the pictures."""

    words: int = 4
    """Of captions by opinion."""

    selectivity: float | None = None
    """Score by those of at least so much; default what `attack find` was asked for."""

    seed: int = 0
    """Of the search for opinions."""

    batch_images: int = 64
    """Images at a time."""


def main(arguments: Sequence[str]) -> None:
    """Parse, choose, write, print what was made."""
    options = parse(CurateOptions, "attack curate", arguments, helped=HELP)
    tables = [SalienceTable.load(folder) for folder in options.found]
    model = model_of(options, options.model, tables)
    source = open_images(options.images, table=options.table)
    print_notes(source.notes)
    made = curate(
        model,
        source,
        [target_of(table, options.selectivity, options.device) for table in tables],
        options.out,
        n=options.n,
        captions=options.captions,
        sentence=options.sentence,
        class_names=options.classes or None,
        words=options.words,
        max_failed=options.max_failed,
        seed=options.seed,
        batch_size=options.batch_images,
        workers=options.workers,
        quiet=False,
    )
    if made.failed:
        print_notes([f"{made.failed:,} pictures could not be loaded."])
    print(
        f"{made.folder}: {made.n:,} of {made.n_seen:,} pictures, scores {made.highest:.2f} to "
        f"{made.lowest:.2f}"
    )
