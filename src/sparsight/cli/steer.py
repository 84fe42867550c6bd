"""`sparsight steer`: turn latents up and down, and measure how the model's predictions change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from sparsight.cli.help import Help
from sparsight.cli.opening import open_index, open_saes
from sparsight.cli.options import parse
from sparsight.cli.printing import plain_table, print_notes
from sparsight.cli.subject import SubjectOptions, Subjects
from sparsight.editing.latent_search import find_latents
from sparsight.editing.steering import STRENGTHS, SteerReport, steer
from sparsight.editing.steering_files import rows_to_print, save_steering
from sparsight.errors import UserError
from sparsight.files import check_folder

HELP = Help(
    examples=(
        "runs/b32-l9 --latents 12 40",
        "runs/b32-l9 --latents anchor --strengths 0 0.5 1 2",
    ),
    needed=("run", "latents"),
    common=("strengths", "unit", "out", "images", "store", "curves", "max-images", "index"),
)


@dataclass(frozen=True)
class SteerOptions(SubjectOptions):
    """Change latents of an SAE over a range of strengths; measure zero-shot accuracy and retrieval.

    Also measure accuracy with only the k latents that each class uses most, and without them.
    """

    run: tyro.conf.Positional[Path | None] = None
    """Run folder of the SAE. Required."""

    latents: tuple[str, ...] = ()
    """Latents to change, by number or by words from their names in the index: `--latents 12
    anchor`."""

    strengths: tuple[float, ...] = STRENGTHS
    """Strengths, in units of `--unit`; 0 switches the latent off."""

    unit: Literal["max", "absolute", "factor"] = "max"
    """Unit of the strengths. max: the latent's largest activation on the images; absolute: an
    activation of 1; factor: the latent's own activation."""

    tokens: Literal["cls", "patches", "all"] | None = None
    """Positions to change; default: those on which the SAE was trained."""

    curves: bool = True
    """Measure accuracy with only the top k latents of each image's class, and without them."""

    ks: tuple[int, ...] | None = None
    """Values of k for --curves; default: 1, 2, 5, 10, … and all."""

    templates: str = "openai80"
    """Sentences for zero-shot classification: simple, openai80, or your own with {} in it."""

    index: Path | None = None
    """Latent index in which to look up names; default: index/ in the run, if it exists."""

    out: Path | None = None
    """Folder for steer.json, .csv, .png and .svg; default: steer/ in the run."""

    max_images: int | None = 1000
    """Use a random sample of this many images: half to choose latents, half to measure."""

    batch_images: int = 64
    """Images per batch."""

    seed: int = 0
    """Seed of the sample of images, and of the random latents used for comparison in --curves."""

    check: bool = True
    """Refuse an SAE that was trained on a model with other weights, or at another site."""


def main(arguments: Sequence[str]) -> None:
    """Parse, steer, print a table, write the files."""
    options = parse(SteerOptions, "steer", arguments, helped=HELP)
    if options.run is None:
        raise UserError("No SAE is given; name a run folder.")
    if options.store is not None:
        raise UserError("steer runs the model over images: give --images, not --store.")
    saes = open_saes([options.run], options.device)
    if len(saes) > 1:
        listed = ", ".join(map(str, saes))
        raise UserError(f"{options.run} holds {len(saes)} SAEs; name one run: {listed}.")
    (folder, sae), = saes.items()  # fmt: skip
    index = open_index(options.index, folder, sae)
    found = find_latents(options.latents, sae.n_latents, index)
    subjects = Subjects(options)
    out = check_folder(options.out or folder / "steer")
    report = steer(
        subjects.model(folder, sae),
        subjects.images(folder, sae),
        sae,
        list(found),
        strengths=options.strengths,
        unit=options.unit,
        tokens=options.tokens,
        templates=options.templates,
        curves=options.curves,
        ks=options.ks,
        names={latent: name for latent, name in found.items() if name},
        max_images=options.max_images,
        batch_images=options.batch_images,
        workers=options.workers,
        seed=options.seed,
        check=options.check,
        quiet=False,
    )
    paths = save_steering(report, out)
    print_notes(f"no {what}: {reason}" for what, reason in report.omitted.items())
    if report.about["failed"]:
        print_notes([f"{report.about['failed']} images could not be read and were left out."])
    _print(report)
    print(f"{paths[0].parent} · {', '.join(path.name for path in paths)}")


def _print(report: SteerReport) -> None:
    console = Console(markup=False, emoji=False)
    original = report.original
    if report.latents:
        table = plain_table()
        table.add_column("latent", overflow="ellipsis", no_wrap=True, max_width=18)
        table.add_column("×", justify="right")
        if "top1" in original:
            table.add_column("top-1", justify="right")
            table.add_column("change [95 %]", justify="right", no_wrap=True)
        if "change" in original:
            table.add_column("raised most", no_wrap=True)
            table.add_column("KL", justify="right")
        if "image_to_text" in original:
            table.add_column("i→t", justify="right")
            table.add_column("t→i", justify="right")
        last = None
        for cells in rows_to_print(report):
            if last is not None and cells[0] != last:
                table.add_section()
            table.add_row("" if cells[0] == last else cells[0], *cells[1:])
            last = cells[0]
        console.print(table)
    if report.curves:
        table = plain_table()
        table.add_column("k", justify="right")
        heads = {
            ("on", "class"): "keep class's",
            ("on", "random"): "random",
            ("off", "class"): "drop class's",
            ("off", "random"): "random",
        }
        for head in heads.values():
            table.add_column(head, justify="right", no_wrap=True)
        by_key = {(row["kind"], row["latents"], row["k"]): row for row in report.curves}
        for k in sorted({row["k"] for row in report.curves if row["k"]}):
            table.add_row(f"{k:,}", *(_share(by_key[(*key, k)]) for key in heads))
        console.print(table)
    if "top1" in original:
        print(
            f"unsteered: top-1 {_share(original)} on {original['n']:,} images in "
            f"{report.about['n_classes']} classes"
        )


def _share(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['top1']:.1%} [{100 * low:.0f}, {100 * high:.0f}]"
