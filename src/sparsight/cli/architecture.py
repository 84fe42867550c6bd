"""`--sparsity` and `--remedy`: kinds of parts, chosen before their own flags are created."""

from __future__ import annotations

import dataclasses
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from sparsight.cli.options import flag
from sparsight.config import NONE, kind_of
from sparsight.errors import UserError
from sparsight.sae.remedies import AnyRemedy
from sparsight.sae.sparsity import AnySparsity
from sparsight.training import TrainConfig
from sparsight.training.old_keys import OLD_REMEDIES

KINDS: dict[str, type[AnySparsity]] = {kind_of(kind): kind for kind in typing.get_args(AnySparsity)}
REMEDIES: dict[str, type[AnyRemedy]] = {kind.word: kind for kind in typing.get_args(AnyRemedy)}


@dataclass(frozen=True)
class ArchitectureOptions:
    """Kinds of parts; a config file can specify more."""

    sparsity: str | None = None
    """Kind of sparsity: topk, batchtopk, abstopk, groupmax, relu, jumprelu, gated or
    matchingpursuit. A kind's flags are --sae.sparsity.…; see --help-all."""

    remedy: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"Remedy for dead latents: {', '.join(REMEDIES)} or none; default: auxk. A "
            "remedy's flags are --remedy.…; see --help-all."
        ),
    ] = None


def with_choices(
    config: TrainConfig, options: ArchitectureOptions, arguments: Sequence[str]
) -> TrainConfig:
    """Return the configuration with the chosen parts, as defaults of their flags.

    Args:
        config: the configuration before the choice.
        options: the options of a config file.
        arguments: the command line, which takes precedence.

    Raises:
        UserError: a kind is unknown.
    """
    kind = flag(arguments, "--sparsity") or options.sparsity
    if kind is not None and kind not in KINDS:
        raise UserError(f"--sparsity: unknown kind {kind!r}; choose one of {', '.join(KINDS)}.")
    if kind is not None and kind_of(type(config.sae.sparsity)) != kind:
        sae = dataclasses.replace(config.sae, sparsity=KINDS[kind]())
        config = dataclasses.replace(config, sae=sae)
    remedy = flag(arguments, "--remedy") or options.remedy
    if remedy is None:
        return config
    if remedy == NONE:
        return dataclasses.replace(config, remedy=None)
    if remedy not in REMEDIES:
        words = ", ".join([*REMEDIES, NONE])
        raise UserError(f"--remedy: unknown remedy {remedy!r}; choose one of {words}.")
    if config.remedy is not None and config.remedy.word == remedy:
        return config
    return dataclasses.replace(config, remedy=REMEDIES[remedy]())


def with_new_names(config: TrainConfig, arguments: Sequence[str]) -> list[str]:
    """Replace `--auxk.…`, `--ghost.…` and `--resampling.…` by `--remedy.…` in the command line.

    Raises:
        UserError: one of these is given together with another remedy.
    """
    new = {argument.partition("=")[0] for argument in arguments}
    renamed = []
    for argument in arguments:
        old, dot, rest = argument.removeprefix("--").partition(".")
        if not (argument.startswith("--") and dot and old in OLD_REMEDIES):
            renamed.append(argument)
            continue
        word, name = OLD_REMEDIES[old].word, rest.partition("=")[0]
        if f"--remedy.{name}" in new:
            raise UserError(f"--{old}.{name} is the old name of --remedy.{name}; give only one.")
        if config.remedy is None or config.remedy.word != word:
            current = NONE if config.remedy is None else config.remedy.word
            raise UserError(
                f"--{old}.{name}: the remedy is {current}. To use {word}, write --remedy {word} "
                f"--remedy.{name}."
            )
        warnings.warn(
            f"--{old}.{name} is now called --remedy.{name}; the next version drops the old name.",
            FutureWarning,
            stacklevel=2,
        )
        renamed.append(f"--remedy.{rest}")
    return renamed
