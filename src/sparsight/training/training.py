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

    On Ctrl-C or SIGTERM, training finishes the current step, writes a checkpoint and raises
    `KeyboardInterrupt` or `SystemExit`; a second signal stops at once.

    Args:
        source: an activation store, live activations, or a model and its images.
        config: how to train.
        out: folder of the run. A finished run with the same configuration is returned as it is; an
            interrupted one continues from its last checkpoint, with the same bits.
        sites: sites of the source to train on; all by default.
        tokens: positions to train on; "all" by default if `source` is a model and images. A store
            has its own; if `tokens` are given, they must be the same.
        held_out: share of the images to keep out of training, chosen by `HeldOut`;
            `held_out_of(sae.metadata)` returns them.
        resume: False refuses a folder that holds a run.
        device: "cpu", "cuda", …; by default a GPU if there is one.
        checkpoint_seconds: write a checkpoint this many seconds after the last one, or less often
            if writing takes more than a fiftieth of that; in addition to those of
            `config.checkpoint_every`. None: no checkpoints by time. May differ when a run resumes.
        quiet: show no progress line.

    Returns:
        The run.

    Raises:
        UserError: `out` holds another run, another process is training into it, or the
            configuration does not fit the activations.
        SparsightError: the loss or activations are infinite or NaN; the last checkpoint stays.
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
    """Return whether the run is finished; check that what is there belongs to the same run."""
    if (run.out / SWEEP).exists():
        raise UserError(f"{run.out} holds a sweep. Choose another folder for a single run.")
    begun = checkpoint.identities(run.checkpoints)
    own = identity(recipe)
    has_part = holds_part(run, recipe, all(begun.get(site) == own for site in run.sites))
    return goes_on(run.out, has_part, resume) and all(map(run.is_finished, run.sites))
