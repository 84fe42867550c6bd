"""What a run trains on, and for how long: making a recipe from settings and activations."""

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
    """Return activations, sites to train on, and the configuration with its target's full name.

    Raises:
        UserError: see `as_activations`; or a transcoder's target is the only site.
    """
    target = config.target_site
    activations = as_activations(source, (*sites, target) if sites and target else sites, tokens)
    names = chosen_sites(activations, sites)
    if target is not None:
        target = activations.canonical_site(target)
        config = dataclasses.replace(config, target_site=target)
        names = tuple(name for name in names if name != target)
        if not names:
            raise UserError(
                f"target_site is {target!r}, the only site; also name a site to predict it from."
            )
    return activations, names, config


def as_activations(
    source: Activations, sites: Sequence[str] | None, tokens: Tokens | None
) -> ActivationSource:
    """Return the source as activations; those of a model and images are computed on the fly.

    Raises:
        UserError: `tokens` are not those of the activations, or no site is named.
    """
    if not isinstance(source, tuple):
        return with_tokens(source, tokens)
    model, images = source
    if not sites:
        raise UserError("No sites are given; name them, e.g. sites=['blocks.-1.resid_post'].")
    return LiveActivations(model, images, sites, tokens or "all")


def chosen_sites(source: ActivationSource, sites: Sequence[str] | None) -> tuple[str, ...]:
    """Return the canonical names of sites, each once; by default all sites of the source."""
    return matching_sites(sites or source.sites, source.sites, source.canonical_site)


def with_target(sites: tuple[str, ...], config: TrainConfig) -> tuple[str, ...]:
    """Return the sites to read: those to train on, then a transcoder's target."""
    return sites if config.target_site is None else (*sites, config.target_site)


def with_length(
    config: TrainConfig, sources: Sequence[ActivationSource], sites: Sequence[str], there: Path
) -> TrainConfig:
    """Return the configuration with its number of vectors.

    If it names none, the number is that of the existing run, or follows from the activations.

    Args:
        config: the configuration as given.
        sources: the activations, one source per choice of positions.
        sites: the sites to train on.
        there: the path of the run's `config.toml` or `sweep.toml`, which need not exist.
    """
    if config.n_vectors is not None:
        return config
    with suppress(UserError, KeyError, TypeError):
        return dataclasses.replace(config, n_vectors=read_toml(there)["train"]["n_vectors"])
    return config.with_length(max(each.n_images * each.n_tokens[sites[0]] for each in sources))


def recipe_of(
    source: ActivationSource, run: Run, config: TrainConfig, held_out: HeldOut | None = None
) -> TrainRecipe:
    """Return everything needed to repeat a run on activations without the held-out ones."""
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
