"""What a run is to train on, and for how long: settings and activations become a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from sparsight.activations import (
    ActivationSource,
    HeldOut,
    LiveActivations,
    matching_sites,
    with_tokens,
)
from sparsight.config import read_toml
from sparsight.errors import UserError
from sparsight.images import ImageSource
from sparsight.training.config import TrainConfig, TrainRecipe
from sparsight.training.run import Run
from sparsight.vision import Tokens, VisionModel

Activations = ActivationSource | tuple[VisionModel, ImageSource]


def resolve(
    source: Activations,
    config: TrainConfig,
    sites: Sequence[str] | None,
    tokens: Tokens | None,
) -> tuple[ActivationSource, tuple[str, ...], TrainConfig]:
    """The activations, the sites to train on, and the configuration with its target's full name.

    Raises:
        UserError: see `as_activations`; or nothing but a transcoder's target is to be trained on.
    """
    target = config.target_site
    activations = as_activations(source, (*sites, target) if sites and target else sites, tokens)
    names = chosen_sites(activations, sites)
    if target is not None:
        target = activations.canonical_site(target)
        config = dataclasses.replace(config, target_site=target)
        names = tuple(name for name in names if name != target)
        if not names:
            raise UserError(f"target_site is {target!r}, the only site: name one to predict from.")
    return activations, names, config


def as_activations(
    source: Activations, sites: Sequence[str] | None, tokens: Tokens | None
) -> ActivationSource:
    """What `train` is given, as activations; a model and images are read on the fly.

    Raises:
        UserError: `tokens` are not those of the activations, or no site is named.
    """
    if not isinstance(source, tuple):
        return with_tokens(source, tokens)
    model, images = source
    if not sites:
        raise UserError("Name the sites to train on: sites=['blocks.-1.resid_post'], say.")
    return LiveActivations(model, images, sites, tokens or "all")


def chosen_sites(source: ActivationSource, sites: Sequence[str] | None) -> tuple[str, ...]:
    """The canonical names of some sites, each once; all of the source by default."""
    return matching_sites(sites or source.sites, source.sites, source.canonical_site)


def with_target(sites: tuple[str, ...], config: TrainConfig) -> tuple[str, ...]:
    """The sites that are read: a transcoder's target after those that are trained on."""
    return sites if config.target_site is None else (*sites, config.target_site)


def with_length(
    config: TrainConfig, sources: Sequence[ActivationSource], sites: Sequence[str], there: Path
) -> TrainConfig:
    """The configuration with its number of vectors.

    Where none is named it is that of the run that is there already, or follows from the vectors of
    the activations.

    Args:
        config: as it was given.
        sources: the activations, or several of other positions.
        sites: what is trained on.
        there: the `config.toml` or `sweep.toml` of the run, if it is there.
    """
    if config.n_vectors is not None:
        return config
    with suppress(UserError, KeyError, TypeError):
        return dataclasses.replace(config, n_vectors=read_toml(there)["train"]["n_vectors"])
    return config.with_length(max(each.n_images * each.n_tokens[sites[0]] for each in sources))


def recipe_of(
    source: ActivationSource, run: Run, config: TrainConfig, held_out: HeldOut | None = None
) -> TrainRecipe:
    """All that repeats a run on activations, of which those that are held out are no part."""
    store = getattr(source, "path", None)
    return TrainRecipe(
        store=str(Path(store).resolve()) if store is not None else None,
        model=source.model_info.get("id"),
        images=source.model_info.get("images"),
        sites=run.sites,
        tokens=cast(Tokens, source.tokens),
        held_out=None if held_out is None else held_out.share,
        held_out_seed=0 if held_out is None else held_out.seed,
        out=run.out,
        activations=source.fingerprint,
        train=config,
    )
