"""`sparsight train`: train autoencoders on a store, or on a model and images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import tyro

from sparsight.activations import ActivationStore, HeldOut, LiveActivations
from sparsight.cli.architecture import ArchitectureOptions, with_choices, with_new_names
from sparsight.cli.help import Help
from sparsight.cli.opening import open_model
from sparsight.cli.options import ModelOptions, parse
from sparsight.cli.printing import print_notes
from sparsight.errors import UserError
from sparsight.figures import shown_in
from sparsight.images import open_images
from sparsight.pace import SECONDS
from sparsight.training import TrainConfig, TrainRecipe, train

HELP = Help(
    examples=(
        "--store acts/ --out runs/b32-l9",
        "--store acts/ --out runs/wide --sae.n-latents 6144 --sae.sparsity.k 32",
        "--model calibration --images photos/ --sites blocks.3.resid_post",
    ),
    needed=("store", "out"),
    common=(
        "model",
        "images",
        "sites",
        "tokens",
        "sparsity",
        "remedy",
        "sae.n-latents",
        "sae.expansion",
        "sae.sparsity.k",
        "n-vectors",
        "held-out",
        "batch-size",
        "lr",
        "seed",
        "fresh",
        "config",
        "device",
    ),
)


@dataclass(frozen=True)
class TrainOptions(TrainRecipe, ArchitectureOptions, ModelOptions):
    """Train one sparse autoencoder per site, on a store, or on a model and images directly."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    """How to train; [train] in a config file."""

    activations: Annotated[str | None, tyro.conf.Suppress] = None

    verify: bool = True
    """Verify the store's checksums first."""

    checkpoint_seconds: float | None = SECONDS
    """Seconds between additional checkpoints; longer if writing takes more than a fiftieth of this
    time. A continued run may use another value."""

    fresh: tyro.conf.FlagCreatePairsOff[bool] = False
    """Refuse to continue an existing run from its last checkpoint."""


Options = TypeVar("Options", bound=TrainOptions)


def main(arguments: Sequence[str]) -> None:
    """Parse, train, print the folder of each autoencoder."""
    options = parse(
        TrainOptions, "train", arguments, adapt=choose_parts, helped=HELP, rename=with_new_flags
    )
    data = activations_of(options)
    run = train(
        data,
        options.train,
        out=options.out,
        sites=options.sites or None,
        tokens=options.tokens,
        held_out=held_out_by(options.held_out, options.held_out_seed),
        resume=not options.fresh,
        device=options.device,
        checkpoint_seconds=options.checkpoint_seconds,
    )
    for site in run.sites:
        last = (run.metrics(site) or [{}])[-1]
        figures = " · ".join(
            f"{figure.name} {figure.precise(figure.of(last))}"
            for figure in shown_in("log")
            if figure.of(last) is not None
        )
        print(f"{run.folder(site)} · {site} · {figures}")


def held_out_by(share: float | None, seed: int) -> HeldOut | None:
    """Return what `--held-out` and `--held-out-seed` keep out of training."""
    return None if share is None else HeldOut(share, seed)


def choose_parts(options: Options, arguments: Sequence[str]) -> Options:
    """Make the chosen kinds of parts the defaults of `options.train`."""
    train = with_choices(options.train, options, arguments)
    return dataclasses.replace(options, train=train)


def with_new_flags(options: TrainOptions, arguments: Sequence[str]) -> Sequence[str]:
    """Return the command line with today's names of flags."""
    return with_new_names(options.train, arguments)


def activations_of(options: TrainOptions) -> ActivationStore | LiveActivations:
    """Open the activations to train on; a store takes precedence over model and images."""
    if options.store is not None:
        store = ActivationStore(options.store, verify=options.verify)
        for name, asked, own in (
            ("model", options.model, store.model_info["id"]),
            ("images", options.images, store.model_info["images"]),
        ):
            if asked not in (None, own):
                print_notes([f"--{name} {asked} is not used: {options.store} is of {own}."])
        return store
    if options.model is None or options.images is None:
        raise UserError("Nothing to train on: give --store, or --model and --images.")
    if not options.sites:
        raise UserError("No sites are given; name at least one, e.g. --sites blocks.-1.resid_post.")
    images = open_images(options.images, table=options.table)
    print_notes(images.notes)
    return LiveActivations(
        open_model(options.model, options),
        images,
        options.sites,
        options.tokens or "all",
        workers=options.workers,
        max_failed=options.max_failed,
    )
