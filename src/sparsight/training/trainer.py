"""The training loop: one pass over the data for all autoencoders, which resumes exactly.

`train` uses it to train one autoencoder per site, `sweep` several.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsight
from sparsight.activations import ActivationSource, HeldOut, Prefetcher, SiteStatistics
from sparsight.config import to_dict, write_toml
from sparsight.devices import choose_device
from sparsight.errors import SparsightError, UserError
from sparsight.figures import shown_in
from sparsight.files import write_json
from sparsight.interruption import Stop, kept, noted, postponed
from sparsight.kernels import Kernels, Precision, choose, native_is_absent
from sparsight.pace import Pace
from sparsight.progress import ProgressLine, in_words, progress
from sparsight.runs.loop import CheckpointedLoop, warn_of_damage
from sparsight.runs.same_run import refuse_other_checkpoint
from sparsight.training import checkpoint
from sparsight.training.config import TrainConfig, TrainRecipe
from sparsight.training.identity import identity
from sparsight.training.loggers import Logger, open_loggers
from sparsight.training.run import CONFIG, DIVERGED, METRICS
from sparsight.training.schedule import learning_rate_factor
from sparsight.training.site import SiteTraining

ESTIMATE_SECONDS = 1.0
"""How long to train before estimating the time for the whole run."""

LOGGED = shown_in("log")
"""Metrics of a member that the progress line shows."""
SHOWN_MEMBERS = 3
"""Number of autoencoders whose metrics fit into the progress line."""


@dataclass(frozen=True)
class Member:
    """One of the autoencoders that train in a pass.

    Attributes:
        name: its folder in a checkpoint, and its name in messages.
        site: the site that it reads.
        folder: folder for its `config.toml`, metrics and SAE.
        recipe: everything needed to repeat its run.
    """

    name: str
    site: str
    folder: Path
    recipe: TrainRecipe

    @property
    def config(self) -> TrainConfig:
        """How the member trains."""
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
    """Train members to the end; if interrupted, say how much of their work is kept.

    Args:
        source, sites, members, checkpoints, device, pace, drop_diverged: see `Loop`.
        title: title of the progress line.
        quiet: show no progress line.
    """
    loop: Loop | None = None

    def what_is_kept() -> str:
        if loop is not None and loop.finished:
            return "Training was already finished, so nothing is lost."
        config = members[0].config
        step = checkpoint.newest_step(checkpoints) if loop is None else loop.kept_step
        return kept(step * config.batch_size, config.n_steps * config.batch_size, "vectors")

    with noted(what_is_kept):
        loop = Loop(source, sites, members, checkpoints, device, pace, drop_diverged=drop_diverged)
        loop.run_to_end(title, quiet)


class Loop(CheckpointedLoop):
    """One pass over the activations, and the state of everything that trains in it.

    Args:
        source: the activations.
        sites: the sites to read; the order of the data depends on them.
        members: the autoencoders to train; they share batch size, length and order of the data.
        checkpoints: folder of the checkpoints; the pass continues from the last.
        device: "cpu", "cuda", …; by default a GPU if there is one.
        pace: when to write checkpoints in addition to those that the configuration requests.
        drop_diverged: continue without a member whose loss becomes infinite or NaN, and note that
            in its folder.

    Attributes:
        step, kept_step: see `CheckpointedLoop`.
        finished: whether everything is trained and written.

    Raises:
        UserError: the checkpoints belong to another run.
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
        self.config = members[0].config  # for the settings that all share
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
        # As many vectors as a batch has, because they determine a dictionary's number of anchors.
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
                *self._kernels(member),
                *self._target(source, member, samples),
                resumed=found is not None,
            )
            for name, member in self.members.items()
        }
        self.cursor: dict[str, Any] = {}  # position after the batches that were trained on
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

    def _kernels(self, member: Member) -> tuple[Kernels, Precision]:
        """Return the kernels that compute a member's steps: autograd if no fused step can."""
        config = member.config
        if config.fusable:
            return choose(config.kernels, config.precision, self.device)
        if config.kernels not in ("auto", "dense"):
            raise UserError(
                f"kernels is {config.kernels!r}, which cannot train this architecture, but only "
                "untied TopK and BatchTopK, with fixed prefixes if any. Choose 'auto' or 'dense'."
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
        """The number of vectors trained on so far."""
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
                    self.members[name].config.kernels == "auto"
                    and self.members[name].config.fusable
                    for name in self.trainings
                )
                hint = " (the native kernels are faster, but are not built)" if absent else ""
                print(f"kernels: {', '.join(used)}{hint}", file=sys.stderr)
                print(f"{title}: {self._plan()}", file=sys.stderr)
                for site, ratio in self._ratios().items():
                    print(f"{site}: mean-to-spread ratio {ratio:.2f}", file=sys.stderr)
            self._run(line)

    def _plan(self) -> str:
        """Describe the length of the run."""
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
        """Print once, after a few steps, an estimate of how long the run will take."""
        now = time.monotonic()
        if self._first is None:  # the first step also sets things up and is not representative
            self._first = (now, self.step)
            return
        begun, step = self._first
        if now - begun < ESTIMATE_SECONDS or self._told_time:
            return
        self._told_time = True
        left = (self.config.n_steps - self.step) * (now - begun) / (self.step - step)
        print(f"estimated time: {in_words(left)}", file=sys.stderr)

    def _ratios(self) -> dict[str, float]:
        """Return how far the activations of each site are from 0, relative to their spread."""
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
        """Return the next batch; signals are handled here, where the state is complete."""
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
        """Write a checkpoint, after checking that everything is finite."""
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
        """Print a message to the user in between."""
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
                f"{error} Training stopped at step {self.step + 1}; {self.what_stays()}."
            ) from error

    def _log(self) -> str:
        self._check_finite()
        now = time.monotonic()
        rate = (self.vectors - self.logged[1]) / max(now - self.logged[0], 1e-9)
        self.logged = (now, self.vectors)
        logged = {}
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
            logged[name] = figures
        return _note(logged)

    def _check_finite(self) -> None:
        """Stop if a value is infinite or NaN, or drop the member that diverged."""
        for name, training in list(self.trainings.items()):
            bad = training.first_bad()
            if bad is None:
                continue
            step, what = bad
            size = self.config.batch_size
            reason = (
                f"The {what} at {name} became infinite or NaN at step {step + 1} (vectors "
                f"{step * size:,} to {(step + 1) * size:,})."
            )
            advice = "" if what == "activations" else " A lower lr may help."
            if what == "activations" or not self.drop_diverged:
                raise SparsightError(f"{reason} Training stopped; {self.what_stays()}.{advice}")
            write_json(self.members[name].folder / DIVERGED, {"step": step + 1, "reason": reason})
            warnings.warn(f"{reason} The others continue without it.{advice}", stacklevel=2)
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
    """Return the latest metrics in one line: of each member if there are few, or their range."""
    if len(figures) <= SHOWN_MEMBERS:
        return " · ".join(
            " ".join([name, *(f"{each.name} {each.precise(each.of(row))}" for each in LOGGED)])
            for name, row in figures.items()
        )
    first = LOGGED[0]
    values = [first.of(row) for row in figures.values()]
    low, high = first.precise(min(values)), first.precise(max(values))
    return f"{len(values)} autoencoders, {first.name} {low} to {high}"


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
    """Return ‖mean‖ / √(Σ variances) of a site's activations.

    If it is large and the mean is not subtracted, many latents die: at first, all of them see the
    same large vector.
    """
    variance = (statistics.second_moment - statistics.mean**2).clamp(min=0).sum()
    return float(statistics.mean.norm() / variance.sqrt().clamp(min=1e-300))
