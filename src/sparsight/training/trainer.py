"""The training loop: one pass over the data for all autoencoders, resumed exactly where it was cut.

`train` is the case of one autoencoder a site; `sweep` trains several.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import sparsight
from sparsight.activations import (
    ActivationSource,
    HeldOut,
    LiveActivations,
    Prefetcher,
    SiteStatistics,
    matching_sites,
    with_tokens,
)
from sparsight.config import first_difference, load, read_toml, to_dict, write_toml
from sparsight.devices import choose_device
from sparsight.errors import SparsightError, UserError
from sparsight.files import write_json
from sparsight.images import ImageSource
from sparsight.interruption import Stop, kept, noted, postponed
from sparsight.kernels import Kernels, Precision, choose, native_is_absent
from sparsight.pace import SECONDS, Pace
from sparsight.progress import ProgressLine, in_words, progress
from sparsight.runs.loop import CheckpointedLoop, warn_of_damage
from sparsight.runs.same_run import damaged_if, refuse_difference, refuse_other_checkpoint
from sparsight.sae.files import FILES
from sparsight.training import checkpoint
from sparsight.training.config import TrainConfig, TrainRecipe
from sparsight.training.loggers import Logger, open_loggers
from sparsight.training.run import (
    CONFIG,
    DIVERGED,
    METRICS,
    SWEEP,
    Run,
    goes_on,
)
from sparsight.training.schedule import learning_rate_factor
from sparsight.training.site import SiteTraining
from sparsight.vision import Tokens, VisionModel

Activations = ActivationSource | tuple[VisionModel, ImageSource]

ESTIMATE_SECONDS = 1.0
"""How long to train before the time that the whole run will take is told."""

HELD_OUT = ("held_out", "held_out_seed")
"""The fields of a recipe that say which images are held out."""

SHOWN_MEMBERS = 3
"""Autoencoders whose figures fit into a line of progress."""


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


@dataclass(frozen=True)
class Member:
    """One of the autoencoders that train in a pass.

    Attributes:
        name: its place in a checkpoint, and how messages call it.
        site: where it reads.
        folder: gets its `config.toml`, metrics and SAE.
        recipe: all that repeats its run.
    """

    name: str
    site: str
    folder: Path
    recipe: TrainRecipe

    @property
    def config(self) -> TrainConfig:
        """How it trains."""
        return self.recipe.train

    @property
    def target(self) -> str | None:
        """The site that a transcoder predicts."""
        return self.config.target_site


def train_members(
    source: ActivationSource,
    sites: Sequence[str],
    members: Sequence[Member],
    checkpoints: Path,
    title: str,
    device: str | torch.device | None,
    pace: Pace,
    quiet: bool,
    *,
    drop_diverged: bool = False,
) -> None:
    """Train some members to the end; a stop on the way says what is kept of them.

    Args:
        source, sites, members, checkpoints, device, pace, drop_diverged: see `Loop`.
        title: of the line of progress.
        quiet: without one.
    """
    loop: Loop | None = None

    def told() -> str:
        if loop is not None and loop.finished:
            return "Training was finished by then, and nothing is lost."
        config = members[0].config
        step = checkpoint.newest_step(checkpoints) if loop is None else loop.kept_step
        return kept(step * config.batch_size, config.n_steps * config.batch_size, "vectors")

    with noted(told):
        loop = Loop(source, sites, members, checkpoints, device, pace, drop_diverged=drop_diverged)
        loop.run_to_end(title, quiet)


class Loop(CheckpointedLoop):
    """One pass over the activations, and the state of everything that trains in it.

    Args:
        source: the activations.
        sites: what is read; the order of the data depends on them.
        members: what trains; of the same batches, length and order of the data.
        checkpoints: folder of the checkpoints; the pass goes on from the last.
        device: "cpu", "cuda", …; a GPU if there is one.
        pace: when to write a checkpoint beside those that the configuration asks for.
        drop_diverged: go on without a member whose loss ceases to be finite, and say so in its
            folder.

    Attributes:
        step, kept_step: see `CheckpointedLoop`.
        finished: whether all is trained and written.

    Raises:
        UserError: the checkpoints are those of another run.
    """

    def __init__(
        self,
        source: ActivationSource,
        sites: Sequence[str],
        members: Sequence[Member],
        checkpoints: Path,
        device: str | torch.device | None = None,
        pace: Pace | None = None,
        *,
        drop_diverged: bool = False,
    ) -> None:
        super().__init__(checkpoints, pace or Pace(None))
        self.members = {member.name: member for member in members}
        self.config = members[0].config  # for what all have in common
        self.device = choose_device(device, float64=True)
        self.drop_diverged = drop_diverged
        self.finished = False
        stream = source.stream(sites, self.config.batch_size, seed=self.config.order_seed)
        needed = tuple(
            dict.fromkeys(
                site for member in members for site in (member.site, member.target) if site
            )
        )
        self.batches = Prefetcher(stream, needed, self.device)
        found, problems = checkpoint.load_latest(checkpoints, tuple(self.members))
        warn_of_damage(problems)
        self.identities = {name: identity(each.recipe) for name, each in self.members.items()}
        if found is not None:
            for name, own in self.identities.items():
                refuse_other_checkpoint(checkpoints, found.runs[name], own)
        self.first_batch: dict[str, Tensor] | None = None
        if found is None:
            self.first_batch = self._read()
        # As many as a batch has: a dictionary has as many anchors as it found vectors.
        size = self.config.batch_size
        samples = self.first_batch or {
            site: torch.zeros(size, source.d_in(site)) for site in needed
        }
        self.trainings = {
            name: SiteTraining(
                member.config,
                source.stats(member.site),
                samples[member.site],
                _metadata(source, member.site, member.recipe),
                self.device,
                *self._kernels(member, source.d_in(member.site)),
                *self._target(source, member, samples),
                resumed=found is not None,
            )
            for name, member in self.members.items()
        }
        self.cursor: dict[str, Any] = {}  # behind the batches that were trained on
        if found is not None:
            self.step = self.kept_step = found.step
            self.cursor = found.cursor
            self.batches.load_state_dict(found.cursor)
            for name, training in self.trainings.items():
                training.load_state(found.saes[name], found.tensors[name], found.summed[name])
        self.logged = (time.monotonic(), self.vectors)
        self.note = ""
        self.quiet = False
        self._first: tuple[float, int] | None = None
        self._told_time = False
        self.loggers: dict[str, list[Logger]] = {}
        for name, member in self.members.items():
            write_toml(member.folder / CONFIG, member.recipe)
            self.loggers[name] = open_loggers(
                member.folder,
                member.config.loggers,
                self.step,
                self.vectors,
                to_dict(member.recipe),
                None if found is None else found.logs[name],
            )

    def _kernels(self, member: Member, d_in: int) -> tuple[Kernels, Precision]:
        """Who computes the steps of a member: autograd where no fused step can."""
        config = member.config
        if config.objective(d_in) is not None:
            return choose(config.kernels, config.precision, self.device)
        if config.kernels not in ("auto", "dense"):
            raise UserError(
                f"kernels {config.kernels!r} do not compute this architecture: they train TopK and "
                "BatchTopK, untied, with fixed prefixes at most. Take 'auto' or 'dense'."
            )
        return choose("dense", "auto", self.device)

    @staticmethod
    def _target(
        source: ActivationSource, member: Member, samples: Mapping[str, Tensor]
    ) -> tuple[SiteStatistics, Tensor] | tuple[()]:
        if member.target is None:
            return ()
        return source.stats(member.target), samples[member.target]

    @property
    def vectors(self) -> int:
        """Vectors trained on so far."""
        return self.step * self.config.batch_size

    def run_to_end(self, title: str, quiet: bool) -> None:
        """Train, log and save until the configured number of vectors is reached."""
        self.quiet = quiet
        total = self.config.n_steps * self.config.batch_size
        with (
            self.batches,
            progress(title, total, "vectors", done=self.vectors, quiet=quiet) as line,
        ):
            if not quiet:
                used = dict.fromkeys(training.kernels for training in self.trainings.values())
                absent = native_is_absent(self.device) and any(
                    self.members[name].config.kernels == "auto" and training.fused is not None
                    for name, training in self.trainings.items()
                )
                hint = " (the native kernels, which are quicker, are not built)" if absent else ""
                print(f"kernels: {', '.join(used)}{hint}", file=sys.stderr)
                print(f"{title}: {self._plan()}", file=sys.stderr)
                for site, ratio in self._ratios().items():
                    print(f"{site}: mean to spread {ratio:.2f}", file=sys.stderr)
            self._run(line)

    def _plan(self) -> str:
        """How long the run is, in numbers."""
        total, per_epoch = (
            self.config.n_steps * self.config.batch_size,
            self.batches.vectors_per_epoch,
        )
        done = f", of which {self.vectors:,} are done" if self.step else ""
        return (
            f"{total:,} vectors, {total / per_epoch:,.1f} epochs of {per_epoch:,}, in "
            f"{self.config.n_steps:,} steps of {self.config.batch_size:,}{done}"
        )

    def _tell_time(self) -> None:
        """Say once, as soon as a few steps tell, how long the run will take."""
        now = time.monotonic()
        if self._first is None:  # the first step, which makes all ready, counts for nothing
            self._first = (now, self.step)
            return
        begun, step = self._first
        if now - begun < ESTIMATE_SECONDS or self._told_time:
            return
        self._told_time = True
        left = (self.config.n_steps - self.step) * (now - begun) / (self.step - step)
        print(f"estimated time: {in_words(left)}", file=sys.stderr)

    def _ratios(self) -> dict[str, float]:
        """How far the activations of each site lie from 0, in their own spread."""
        return {
            self.members[name].site: training.sae.metadata["mean_to_spread"]
            for name, training in self.trainings.items()
        }

    def _run(self, line: ProgressLine) -> None:
        with postponed() as stop:
            while self.step < self.config.n_steps and self.trainings:
                self._take_step(self._next_or_keep(stop), line)
            self._finish()

    def _next_or_keep(self, stop: Stop) -> dict[str, Tensor]:
        """The next batch. Whoever stops the run is heard here, where state is whole."""
        with self.kept_when_stopped(), stop.at_once():
            return self._next_batch()

    def _take_step(self, batch: Mapping[str, Tensor], line: ProgressLine) -> None:
        config = self.config
        for name, training in self.trainings.items():
            factor = self._lr_factor(name, self.step)
            member = self.members[name]
            target = batch[member.target] if member.target else None
            training.step(batch[member.site], self.step, factor, target)
        self.step += 1
        self.cursor = self.batches.state_dict()
        last = self.step == config.n_steps
        if self.step % config.steps_every(config.log_every, 100) == 0 or last:
            self.note = self._log()
        every = config.steps_every(config.checkpoint_every, 10)
        if self.is_due(every, config.checkpoint_every is not None) and not last:
            self.keep()
        line.advance(config.batch_size, self.note)
        if not (self.quiet or self._told_time):
            self._tell_time()

    def keep(self) -> None:
        """Write a checkpoint of what is finite."""
        self._check_finite()
        if self.trainings:
            super().keep()

    def save(self) -> None:
        """Write a checkpoint of everything that trains."""
        logs = {name: self.members[name].folder / METRICS for name in self.trainings}
        checkpoint.save(
            self.checkpoints, self.step, self.trainings, self.cursor, self.identities, logs
        )

    def tell(self, text: str) -> None:
        """Tell the user something on the way."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def _lr_factor(self, name: str, step: int) -> float:
        config = self.members[name].config
        return learning_rate_factor(step, config.n_steps, config.warmup, config.decay)

    def _next_batch(self) -> dict[str, Tensor]:
        if self.first_batch is not None:
            batch, self.first_batch = self.first_batch, None
            return batch
        return self._read()

    def _read(self) -> dict[str, Tensor]:
        try:
            return next(self.batches)
        except UserError:
            raise
        except SparsightError as error:
            raise SparsightError(
                f"{error} Training stops at step {self.step + 1}; {self.what_stays()}."
            ) from error

    def _log(self) -> str:
        self._check_finite()
        now = time.monotonic()
        rate = (self.vectors - self.logged[1]) / max(now - self.logged[0], 1e-9)
        self.logged = (now, self.vectors)
        found = {}
        for name, training in self.trainings.items():
            figures = training.figures(self.config.batch_size)
            entry: dict[str, Any] = {
                "step": self.step,
                "vectors": self.vectors,
                "epoch": self.vectors / self.batches.vectors_per_epoch,
                **figures,
                "dead_window": self.members[name].config.dead_after,
                "lr": training.lr * self._lr_factor(name, self.step - 1),
                "vectors_per_second": rate,
                "kernels": training.kernels,
            }
            for logger in self.loggers[name]:
                logger.log(entry)
            found[name] = figures
        return _note(found)

    def _check_finite(self) -> None:
        """Stop at what is not finite, or drop the member that diverged."""
        for name, training in list(self.trainings.items()):
            bad = training.first_bad()
            if bad is None:
                continue
            step, what = bad
            size = self.config.batch_size
            told = (
                f"The {what} at {name} ceased to be finite at step {step + 1} (vectors "
                f"{step * size:,} to {(step + 1) * size:,})."
            )
            advice = "" if what == "activations" else " A lower lr may help."
            if what == "activations" or not self.drop_diverged:
                raise SparsightError(f"{told} Training stops; {self.what_stays()}.{advice}")
            write_json(self.members[name].folder / DIVERGED, {"step": step + 1, "reason": told})
            warnings.warn(f"{told} The others go on without it.{advice}", stacklevel=2)
            self._close(name)
            del self.trainings[name]

    def _finish(self) -> None:
        self._check_finite()
        for name, training in self.trainings.items():
            training.finished().save_pretrained(self.members[name].folder)
            self._close(name)
        self.finished = True

    def _close(self, name: str) -> None:
        for logger in self.loggers[name]:
            logger.close()


def _note(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The latest figures in a line: of each member where they are few, else their range."""
    if len(figures) <= SHOWN_MEMBERS:
        return " · ".join(
            f"{name} FVU {each['fvu']:.4f} L0 {each['l0']:.1f} dead {100 * each['dead']:.2f} %"
            for name, each in figures.items()
        )
    fvus = [each["fvu"] for each in figures.values()]
    return f"{len(fvus)} autoencoders, FVU {min(fvus):.4f} to {max(fvus):.4f}"


def chosen_sites(source: ActivationSource, sites: Sequence[str] | None) -> tuple[str, ...]:
    """The canonical names of some sites, each once; all of the source by default."""
    return matching_sites(sites or source.sites, source.sites, source.canonical_site)


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


def with_target(sites: tuple[str, ...], config: TrainConfig) -> tuple[str, ...]:
    """The sites that are read: a transcoder's target after those that are trained on."""
    return sites if config.target_site is None else (*sites, config.target_site)


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


def _settled(run: Run, recipe: TrainRecipe, resume: bool) -> bool:
    """Whether the run is finished; makes sure that what is there is a part of the same run."""
    if (run.out / SWEEP).exists():
        raise UserError(f"{run.out} holds a sweep. Choose another folder for a single run.")
    begun = checkpoint.identities(run.checkpoints)
    own = identity(recipe)
    has_part = holds_part(run, recipe, all(begun.get(site) == own for site in run.sites))
    return goes_on(run.out, has_part, resume) and all(map(run.is_finished, run.sites))


def holds_part(run: Run, recipe: TrainRecipe, begun: bool = False) -> bool:
    """Whether some of the run is there already.

    Args:
        run: the run.
        recipe: what it is.
        begun: a checkpoint says that it is of this recipe: a `config.toml` that says otherwise is
            damaged.

    Raises:
        UserError: another run is there.
    """
    paths = [run.folder(site) / CONFIG for site in run.sites]
    present = [path for path in paths if path.exists()]
    with damaged_if(begun):
        _refuse_other_sites(run)
        for path in present:
            _refuse_other_run(path, recipe)
    if not present and not begun:
        for folder in map(run.folder, run.sites):
            _refuse_other_files(folder)
    return bool(present)


def _refuse_other_files(folder: Path) -> None:
    """Raise a `UserError` if a folder that is no run's holds files that a run would write over."""
    for name in ("manifest.json", *FILES):
        if (folder / name).exists():
            raise UserError(
                f"{folder}: holds no run, but a {name} of something else. Choose another folder."
            )


def _refuse_other_run(path: Path, recipe: TrainRecipe) -> None:
    there, own = identity(load(TrainRecipe, path)), identity(recipe)
    if any(there.get(key) != own.get(key) for key in HELD_OUT):  # so the activations differ, too
        there, own = ({key: each.get(key) for key in HELD_OUT} for each in (there, own))
    field = first_difference(there, own)
    if field == "activations":
        raise UserError(
            f"{path}: holds a run on other activations: the model's weights, the "
            "preprocessing, the images or the selection of them differ. Choose another "
            "folder, or remove this one."
        )
    refuse_difference(path, there, own)


def identity(recipe: TrainRecipe) -> dict[str, Any]:
    """What two parts of a run share. Folders may have moved; the fingerprint knows the contents."""
    return to_dict(dataclasses.replace(recipe, out=Path(), store=None, model=None, images=None))


def _refuse_other_sites(run: Run) -> None:
    """Raise a `UserError` if the folder holds a run of other sites, whose checkpoints are there."""
    for path in (run.out / CONFIG, *run.out.glob(f"*/{CONFIG}")):
        if not path.exists():
            continue
        sites = load(TrainRecipe, path).sites
        places = [run.out] if len(sites) == 1 else [run.out / site for site in sites]
        if path.parent in places and set(sites) != set(run.sites):
            raise UserError(
                f"{path}: belongs to a run of {', '.join(sites)}. Choose another folder, or remove "
                "this one."
            )


def _metadata(source: ActivationSource, site: str, recipe: TrainRecipe) -> dict[str, Any]:
    config, held_out = recipe.train, {}
    if recipe.held_out is not None:
        share = HeldOut(recipe.held_out, recipe.held_out_seed)
        held_out = {"held_out": share.to_metadata(source)}
    model = {key: value for key, value in source.model_info.items() if key != "images"}
    target = {} if config.target_site is None else {"target_site": config.target_site}
    return {
        "model": model,
        "images": source.model_info.get("images"),
        **held_out,
        "site": site,
        **target,
        "tokens": source.tokens,
        "n_vectors": config.n_steps * config.batch_size,
        "seed": config.seed,
        "mean_to_spread": mean_to_spread(source.stats(site)),
        "sparsight_version": sparsight.__version__,
    }


def mean_to_spread(statistics: SiteStatistics) -> float:
    """‖mean‖ / √(Σ variances) of a site's activations.

    Where it is large, and the mean is not subtracted, many latents die: all of them see the same
    large vector first.
    """
    variance = (statistics.second_moment - statistics.mean**2).clamp(min=0).sum()
    return float(statistics.mean.norm() / variance.sqrt().clamp(min=1e-300))
