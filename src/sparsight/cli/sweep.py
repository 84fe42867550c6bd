"""`sparsight sweep`: train several autoencoders in one pass over a store, or a model's images."""

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

    The settings to vary are given with --vary or under [grid] in the config file. At the end, every
    autoencoder is measured on the same vectors; table.md, table.csv and plots/ are written to the
    sweep's folder.
    """

    out: Path = Path("runs/sweep")
    """Folder of the sweep, with one run folder per autoencoder."""

    grid: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)

    vary: tuple[str, ...] = ()
    """Settings to vary, e.g. k=16,32 n_latents=1024,2048 seed=0,1 lr=3e-4,1e-3; any training option
    can be given by its dotted name. These settings are added to [grid] and replace entries of the
    same name."""

    evaluate: bool = True
    """Measure every autoencoder on the same vectors, and write the table and the plots."""

    held_out: float | Path | None = None  # type: ignore[assignment]  # a store as well as a share
    """What to measure on: another store, or a share of the images, e.g. 0.1, to keep out of
    training. Default: the training data."""

    max_images: int | None = None
    """Measure on a random sample of this many images; default: all images of a store, or 2,000 if
    the model has to run."""

    accuracy_images: int = ACCURACY_IMAGES
    """Measure zero-shot accuracy on a random sample of this many images; 0 skips this measure and
    loads no model."""

    templates: str = "simple"
    """Sentences for zero-shot classification: simple, openai80, or your own with {} in it."""

    fresh: tyro.conf.FlagCreatePairsOff[bool] = False
    """Refuse to continue an existing sweep, instead of training the missing autoencoders."""


def main(arguments: Sequence[str]) -> None:
    """Parse, train, print one line per autoencoder."""
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
    trained = sweep(
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
    rows = trained.table()
    if options.evaluate:
        model = partial(_model_of, measured, options)
        try:
            table = compare(trained, measured, measures, model=model, device=options.device)
        except STOPS as stop:
            stop.add_note("All autoencoders are trained; the same command measures them.")
            raise
        rows = table["members"]
        print_notes(f"no {what}: {why}" for what, why in table["omitted"].items())
    print_sweep(trained.out, rows)


def _model_of(source: ActivationSource, options: SweepOptions) -> VisionModel:
    """Load the model of the activations, as it ran for them."""
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
    varied: dict[str, list[Any]] = {}
    for argument in given:
        key, equals, values = argument.partition("=")
        if not key or not equals:
            raise UserError(f"--vary {argument}: expected NAME=VALUE,VALUE, e.g. k=16,32.")
        if key in varied:
            raise UserError(f"--vary {key} is given twice.")
        varied[key] = [_value(value) for value in values.split(",") if value]
    return varied


def _value(text: str) -> Any:
    """Read a number or boolean as TOML spells it (1e3 and 2k are whole), or else keep the text."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text
    if isinstance(value, str) or (isinstance(value, float) and "." not in text):
        with suppress(ValueError):
            return whole_number(text)
    return value
