"""`sparsight sweep`: several autoencoders in one pass over a store, or over a model and images."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import tyro

from sparsight.activations import ActivationSource, ActivationStore, LiveActivations
from sparsight.cli.help import Help
from sparsight.cli.options import parse
from sparsight.cli.printing import print_notes, print_sweep
from sparsight.cli.train import (
    TrainOptions,
    activations_of,
    choose_parts,
    held_out_by,
    with_new_flags,
)
from sparsight.config import whole_number
from sparsight.errors import UserError
from sparsight.evaluation import SweepMeasures
from sparsight.evaluation.comparing import ACCURACY_IMAGES
from sparsight.interruption import STOPS
from sparsight.latents.comparison import compare
from sparsight.training import SweepConfig, sweep
from sparsight.vision import VisionModel, load_model

HELP = Help(
    examples=(
        "--store acts/ --vary k=16,32 seed=0,1 --out runs/sweep",
        "--store acts/ --vary n_latents=1024,4096 --held-out acts-test/ --out runs/widths",
    ),
    needed=("store", "vary", "out"),
    common=(
        "sites", "sparsity", "remedy", "sae.n-latents", "sae.sparsity.k", "n-vectors", "held-out",
        "evaluate", "fresh", "config", "device",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class SweepOptions(TrainOptions):
    """Train a sparse autoencoder for every combination of settings, at every site, in one pass.

    What varies stands under [grid] of the config file, or behind --vary. At the end every member is
    measured on the same vectors: table.md, table.csv and plots/ are in the sweep's folder.
    """

    out: Path = Path("runs/sweep")
    """Folder of the sweep; each autoencoder gets a run folder in it."""

    grid: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)

    vary: tuple[str, ...] = ()
    """What varies, e.g. k=16,32 n_latents=1024,2048 seed=0,1 lr=3e-4,1e-3; any option of training
    by its dotted name. Beside [grid], and in place of the same name there."""

    evaluate: bool = True
    """Measure every member on the same vectors, and write the table and the plots."""

    held_out: float | Path | None = None  # type: ignore[assignment]  # a store as well as a share
    """What to measure on: another store; or a share of the images, e.g. 0.1, which are then kept
    out of training. Default what was trained on."""

    max_images: int | None = None
    """Images to measure on, a random sample; default all of a store, 2,000 where the model runs."""

    accuracy_images: int = ACCURACY_IMAGES
    """Images for zero-shot accuracy, a random sample; 0 leaves it out, and no model is loaded."""

    templates: str = "simple"
    """Sentences for it: simple, openai80, or one with {} in it."""

    fresh: tyro.conf.FlagCreatePairsOff[bool] = False
    """Refuse to continue a sweep that is there, rather than train what is missing."""


def main(arguments: Sequence[str]) -> None:
    """Parse, train, print a line an autoencoder."""
    options = parse(
        SweepOptions, "sweep", arguments, adapt=choose_parts, helped=HELP, rename=with_new_flags
    )
    config = SweepConfig(options.train, {**options.grid, **_varied(options.vary)})
    measures = SweepMeasures(
        max_images=options.max_images,
        accuracy_images=options.accuracy_images,
        templates=options.templates,
        workers=options.workers,
    )
    given: float | Path | None = options.held_out
    share = held_out_by(given if isinstance(given, float) else None, options.held_out_seed)
    source = measured = activations_of(options)
    if share is not None:
        measured = cast(ActivationStore | LiveActivations, share.split(source)[1])
    elif isinstance(given, Path):
        measured = ActivationStore(given, verify=options.verify)
    found = sweep(
        source,
        config,
        out=options.out,
        sites=options.sites or None,
        tokens=options.tokens,
        held_out=share,
        resume=not options.fresh,
        device=options.device,
        checkpoint_seconds=options.checkpoint_seconds,
    )
    rows = found.table()
    if options.evaluate:
        model = partial(_model_of, measured, options)
        try:
            table = compare(found, measured, measures, model=model, device=options.device)
        except STOPS as stop:
            stop.add_note("All are trained; the same command measures them.")
            raise
        rows = table["members"]
        print_notes(f"no {what}: {why}" for what, why in table["omitted"].items())
    print_sweep(found.out, rows)


def _model_of(source: ActivationSource, options: SweepOptions) -> VisionModel:
    """The model that activations are of, as it was."""
    if isinstance(source, LiveActivations):
        return source.model
    about = source.model_info
    return load_model(
        about["id"],
        device=options.device,
        dtype=about.get("dtype"),
        revision=about.get("revision"),
        scale_jpegs="jpeg_min_side" in (about.get("preprocessing") or {}),
    )


def _varied(given: Sequence[str]) -> Mapping[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for each in given:
        key, equals, values = each.partition("=")
        if not key or not equals:
            raise UserError(f"--vary {each}: expected NAME=VALUE,VALUE, e.g. k=16,32.")
        if key in found:
            raise UserError(f"--vary {key} is given twice.")
        found[key] = [_value(value) for value in values.split(",") if value]
    return found


def _value(text: str) -> Any:
    """A number or truth value, as TOML spells them; 1e3 and 2k are whole; else the text itself."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text
    if isinstance(value, str) or (isinstance(value, float) and "." not in text):
        with suppress(ValueError):
            return whole_number(text)
    return value
