"""`train`: one autoencoder per site, all in one pass over the activations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sparsight.activations import HeldOut
from sparsight.devices import choose_device
from sparsight.errors import UserError
from sparsight.pace import SECONDS, Pace
from sparsight.training import checkpoint
from sparsight.training.config import TrainConfig, TrainRecipe
from sparsight.training.identity import holds_part, identity
from sparsight.training.planning import Activations, recipe_of, resolve, with_length, with_target
from sparsight.training.run import CONFIG, SWEEP, Run, goes_on
from sparsight.training.trainer import Member, train_members
from sparsight.vision import Tokens


def train(
    source: Activations,
    config: TrainConfig | None = None,
    out: str | Path = "runs/sae",
    *,
    sites: Sequence[str] | None = None,
    tokens: Tokens | None = None,
    held_out: HeldOut | float | None = None,
    resume: bool = True,
    device: str | torch.device | None = None,
    checkpoint_seconds: float | None = SECONDS,
    quiet: bool = False,
) -> Run:
    """Train an SAE on each site, all in one pass over the activations.

    Ctrl-C and SIGTERM finish the step that is under way, write a checkpoint and are raised then,
    as `KeyboardInterrupt` and `SystemExit`; a second one stops at once.

    Args:
        source: an activation store, live activations, or a model and its images.
        config: how to train.
        out: folder of the run. A finished run of the same configuration is returned as it is, a
            cut one goes on from its last checkpoint with the same bits.
        sites: which sites of the source; all by default.
        tokens: which positions; "all" by default where `source` is a model and images. A store has
            its own, which must be these if they are given.
        held_out: share of the images to keep out of training, which `HeldOut` chooses;
            `held_out_of(sae.metadata)` gives them back.
        resume: False refuses a folder that holds a run.
        device: "cpu", "cuda", …; a GPU if there is one.
        checkpoint_seconds: a checkpoint is written when the last one is so long ago, or less often
            where writing takes more than a fiftieth of that; beside those of
            `config.checkpoint_every`. None writes none by time. No part of what a run is.
        quiet: no progress line.

    Returns:
        The run.

    Raises:
        UserError: `out` holds another run, another process trains into it, or the configuration
            does not fit the activations.
        SparsightError: the loss or the activations are not finite; the last checkpoint stays.
    """
    place = choose_device(device, float64=True)
    config = config or TrainConfig()
    activations, names, config = resolve(source, config, sites, tokens)
    run = Run(Path(out), names)
    for site in run.sites:
        config.sae.width(activations.d_in(site))
    held_out = HeldOut.of(held_out)
    kept_in = activations if held_out is None else held_out.split(activations)[0]
    config = with_length(config, [kept_in], names, run.folder(names[0]) / CONFIG)
    recipe = recipe_of(kept_in, run, config, held_out)
    pace = Pace(checkpoint_seconds)
    if _settled(run, recipe, resume):
        run.clear_leftovers()
        return run
    with run.claimed():
        run.clear()
        members = [Member(site, site, run.folder(site), recipe) for site in run.sites]
        read = with_target(run.sites, config)
        train_members(kept_in, read, members, run.checkpoints, "train", place, pace, quiet)
    return run


def _settled(run: Run, recipe: TrainRecipe, resume: bool) -> bool:
    """Whether the run is finished; makes sure that what is there is a part of the same run."""
    if (run.out / SWEEP).exists():
        raise UserError(f"{run.out} holds a sweep. Choose another folder for a single run.")
    begun = checkpoint.identities(run.checkpoints)
    own = identity(recipe)
    has_part = holds_part(run, recipe, all(begun.get(site) == own for site in run.sites))
    return goes_on(run.out, has_part, resume) and all(map(run.is_finished, run.sites))
