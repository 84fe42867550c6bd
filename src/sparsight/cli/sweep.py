"""`sparsight sweep`: several autoencoders in one pass over a store, or over a model and images."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparsight.cli.options import parse
from sparsight.cli.printing import print_sweep
from sparsight.cli.train import TrainOptions, activations_of, choose_parts
from sparsight.errors import UserError
from sparsight.training import SweepConfig, sweep


@dataclass(frozen=True)
class SweepOptions(TrainOptions):
    """Train a sparse autoencoder for every combination of settings, at every site, in one pass.

    What varies stands under [grid] of the config file, or behind --vary.
    """

    out: Path = Path("runs/sweep")
    """Folder of the sweep; each autoencoder gets a run folder in it."""

    grid: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)

    vary: tuple[str, ...] = ()
    """What varies, e.g. k=16,32 n_latents=1024,2048 seed=0,1 lr=3e-4,1e-3; any option of training
    by its dotted name. Beside [grid], and in place of the same name there."""

    fresh: tyro.conf.FlagCreatePairsOff[bool] = False
    """Refuse to continue a sweep that is there, rather than train what is missing."""


def main(arguments: Sequence[str]) -> None:
    """Parse, train, print a line an autoencoder."""
    options = parse(SweepOptions, "sweep", arguments, adapt=choose_parts)
    config = SweepConfig(options.train, {**options.grid, **_varied(options.vary)})
    found = sweep(
        activations_of(options),
        config,
        out=options.out,
        sites=options.sites or None,
        tokens=options.tokens,
        resume=not options.fresh,
        device=options.device,
    )
    print_sweep(found.out, found.table())


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
    """A number or truth value, as TOML spells them; else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
