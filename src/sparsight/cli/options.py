"""Making flags from a dataclass, with a TOML file's values as defaults."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from sparsight.cli.help import ASKS, Help, options_of, parser_of, render, wrong_option
from sparsight.cli.integers import REGISTRY
from sparsight.config import load
from sparsight.errors import UserError


@dataclass(frozen=True)
class CommandOptions:
    """Options of every verb."""

    config: Path | None = None
    """TOML file with any of these options; the command line takes precedence."""


@dataclass(frozen=True)
class ModelOptions(CommandOptions):
    """How a vision model runs over images."""

    table: Path | None = None
    """CSV, JSON Lines or Parquet file with labels and captions of a folder's images."""

    workers: int | None = None
    """Processes that decode images; default: the number of processors minus one."""

    max_failed: float = 0.01
    """Largest share of images that may be broken; if more are, the run stops."""

    device: str | None = None
    """cpu, cuda, cuda:1, xpu or mps; default: a CUDA or Intel GPU if available, otherwise cpu."""

    model_dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    """Type of the model's numbers; default: the type with which an autoencoder was trained, or
    float32. auto: bfloat16 if the device can multiply such numbers, otherwise float32."""

    scale_jpegs: bool = False
    """Decode JPEGs at reduced size if they are much larger than the model's input. On by default if
    the autoencoder was trained on such images."""

    revision: str | None = None
    """Branch, tag or commit of a model on the Hub."""


Shown = Annotated[int, tyro.conf.arg(name="n-shown", aliases=("--latents",))]
"""Number of latents that a page or a card shows. Its old name `--latents`, which names latents in
`steer` and `search`, is still read."""
SHOWN_ALIASES: Mapping[str, str] = {"n_shown": "latents"}

Options = TypeVar("Options", bound=CommandOptions)


def parse(
    cls: type[Options],
    verb: str,
    arguments: Sequence[str],
    adapt: Callable[[Options, Sequence[str]], Options] | None = None,
    helped: Help | None = None,
    rename: Callable[[Options, Sequence[str]], Sequence[str]] | None = None,
) -> Options:
    """Read the flags of a verb.

    Args:
        cls: its options; each field has a default, `tyro.MISSING` if it is required.
        verb: its name.
        arguments: the command line after the name.
        adapt: returns new defaults, given the defaults and the command line, if some flags decide
            which other flags exist.
        helped: examples for `--help`, and the options that it shows first.
        rename: replaces names of flags from earlier versions by today's.

    Raises:
        UserError: a flag is unknown, missing or wrong; the `--config` file is missing, not TOML, or
            has a key or value that `cls` does not allow; or torch finds no device of this name.
        SystemExit: `--help` (code 0).
    """
    asked = [argument for argument in arguments if argument in ASKS]
    arguments = [argument for argument in arguments if argument not in ASKS]
    _check_paths(cls, arguments)
    path = flag(arguments, "--config")
    default = cls() if path is None else load(cls, Path(path))
    default = default if adapt is None else adapt(default, arguments)
    arguments = arguments if rename is None else rename(default, arguments)
    parser = parser_of(cls, verb, default) if asked else None
    if parser is not None:
        shared = [field.name.replace("_", "-") for field in fields(ModelOptions)]
        whole = "--help-all" in asked
        print(render(parser, verb, helped or Help(), last=shared, whole=whole))
        raise SystemExit(0)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            options = tyro.cli(
                cls,
                prog=f"sparsight {verb}",
                args=[*arguments, *(["--help"] if asked else [])],
                default=default,
                # A union of remedies becomes the flags of its default, not a sub-command.
                config=(tyro.conf.AvoidSubcommands,),
                registry=REGISTRY,
            )
    except SystemExit as stop:
        if stop.code != 2:
            raise
        parser = parser_of(cls, verb, default)
        known = [f"--{option.name}" for option in options_of(parser)] if parser else []
        raise UserError(wrong_option(verb, printed.getvalue(), known)) from None
    _check_device(getattr(options, "device", None))
    return options


def _check_paths(cls: type[CommandOptions], arguments: Sequence[str]) -> None:
    """Refuse an empty path (an unset shell variable), which would mean the working folder."""
    names = {f.name.replace("_", "-"): f for f in fields(cls) if "Path" in str(f.type)}
    positional = any("Positional" in str(field.type) for field in names.values())
    last = None
    for argument in arguments:
        given, equals, value = argument.partition("=")
        if given.startswith("--"):
            last = given[2:].replace("_", "-")
        empty = not argument or (given.startswith("--") and equals and not value)
        if empty and (last in names or (last is None and positional)):
            where = "the name of a folder" if last is None else f"--{last}"
            raise UserError(f"{where} is empty; give a path ('.' is the current folder).")


def _check_device(named: str | None) -> None:
    """Refuse a missing device before any work; without `named`, torch is not imported."""
    if named is not None:
        from sparsight.devices import choose_device

        choose_device(named)


def flag(arguments: Sequence[str], name: str) -> str | None:
    """Return the last value of a flag that must be known before the others are read.

    Raises:
        UserError: the flag comes last, without a value.
    """
    last: str | None = None
    for place, argument in enumerate(arguments):
        given, equals, value = argument.partition("=")
        if given != name:
            continue
        if not equals:
            if place + 1 == len(arguments):
                what = "the path of a TOML file" if name == "--config" else "a value"
                raise UserError(f"{name} needs {what}.")
            value = arguments[place + 1]
        last = value
    return last
