"""`--sparsity` and `--remedy`: kinds of parts, chosen before their own flags are made."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparsight.cli.options import flag
from sparsight.config import kind_of
from sparsight.errors import UserError
from sparsight.sae import AuxK, GhostGradients, Resampling
from sparsight.sae.sparsity import AnySparsity
from sparsight.training import TrainConfig

KINDS: dict[str, type[AnySparsity]] = {kind_of(kind): kind for kind in typing.get_args(AnySparsity)}
Remedy = Literal["auxk", "ghost", "resampling", "none"]


@dataclass(frozen=True)
class ArchitectureOptions:
    """Kinds of parts; a config file can say more."""

    sparsity: str | None = None
    """Kind of sparsity: topk, batchtopk, abstopk, groupmax, relu, jumprelu, gated or
    matchingpursuit; its own flags are then --sae.sparsity.…, which --help-all lists."""

    remedy: Remedy | None = None
    """For dead latents: auxk (the default), ghost gradients, resampling, or none."""


def with_choices(
    config: TrainConfig, options: ArchitectureOptions, arguments: Sequence[str]
) -> TrainConfig:
    """A configuration with the parts that are chosen, as defaults of their flags.

    Args:
        config: without them.
        options: of a config file.
        arguments: the command line, which wins.

    Raises:
        UserError: a kind is unknown.
    """
    kind = flag(arguments, "--sparsity") or options.sparsity
    if kind is not None and kind not in KINDS:
        raise UserError(f"--sparsity {kind}: there is no such kind, only: {', '.join(KINDS)}.")
    if kind is not None and kind_of(type(config.sae.sparsity)) != kind:
        sae = dataclasses.replace(config.sae, sparsity=KINDS[kind]())
        config = dataclasses.replace(config, sae=sae)
    remedy = flag(arguments, "--remedy") or options.remedy
    if remedy is None:
        return config
    remedies = typing.get_args(Remedy)
    if remedy not in remedies:
        raise UserError(f"--remedy {remedy}: there is no such, only: {', '.join(remedies)}.")
    return dataclasses.replace(
        config,
        auxk=(config.auxk or AuxK()) if remedy == "auxk" else None,
        ghost=(config.ghost or GhostGradients()) if remedy == "ghost" else None,
        resampling=(config.resampling or Resampling()) if remedy == "resampling" else None,
    )
