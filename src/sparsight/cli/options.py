"""From a dataclass to flags, with a TOML file's values as defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import tyro

from sparsight.config import load
from sparsight.errors import UserError


@dataclass(frozen=True)
class CommandOptions:
    """What every verb understands."""

    config: Path | None = None
    """TOML file with any of these options; what stands on the command line wins."""


@dataclass(frozen=True)
class ModelOptions(CommandOptions):
    """How a vision model runs over images."""

    table: Path | None = None
    """CSV, JSON-lines or Parquet with labels and captions of a folder's images."""

    workers: int | None = None
    """Processes that decode images; default one a processor but one."""

    max_failed: float = 0.01
    """Share of images that may be broken before the run stops."""

    device: str | None = None
    """Default: a GPU if there is one."""

    model_dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    """Of the model while it runs; default float32, or that which an autoencoder was made with.
    auto: bfloat16 where the device multiplies in it, else float32."""

    scale_jpegs: bool = False
    """Decode JPEGs that are much larger than the model's input at a part of their size; also where
    an autoencoder was made so."""

    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""


Options = TypeVar("Options", bound=CommandOptions)


def parse(cls: type[Options], verb: str, arguments: Sequence[str]) -> Options:
    """Read the flags of a verb.

    Args:
        cls: its options; each field has a default, `tyro.MISSING` where one must be given.
        verb: its name.
        arguments: what follows the name.

    Raises:
        UserError: the `--config` file is missing, no TOML, or has a key or value that `cls` lacks.
        SystemExit: `--help` (code 0), or a flag that is unknown or wrong (code 2).
    """
    path = _config_path(arguments)
    return tyro.cli(
        cls,
        prog=f"sparsight {verb}",
        args=list(arguments),
        default=cls() if path is None else load(cls, path),
        # A union such as `AuxK | None` becomes the flags of its default, not a sub-command.
        config=(tyro.conf.AvoidSubcommands,),
    )


def _config_path(arguments: Sequence[str]) -> Path | None:
    """The file behind `--config`, which must be read before the flags are."""
    found: Path | None = None
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--config":
            continue
        if not equals:
            if place + 1 == len(arguments):
                raise UserError("--config needs the path of a TOML file.")
            value = arguments[place + 1]
        found = Path(value)
    return found
