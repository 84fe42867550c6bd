"""The training loop: one pass over the data for all autoencoders, resumed exactly where it was cut.

`train` is the case of one autoencoder a site; `sweep` trains several.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import sparsight
from sparsight.activations import (
    ActivationSource,
    LiveActivations,
    Prefetcher,
    SiteStatistics,
    matching_sites,
    with_tokens,
)
from sparsight.config import first_difference, load, to_dict, write_toml
from sparsight.devices import choose_device
from sparsight.errors import SparsightError, UserError
from sparsight.files import write_json
from sparsight.images import ImageSource
from sparsight.progress import ProgressLine, progress
from sparsight.sae.kernels import Kernels, Precision, choose, native_is_absent
from sparsight.training import checkpoint
from sparsight.training.config import TrainConfig, TrainRecipe
from sparsight.training.loggers import Logger, open_loggers
from sparsight.training.run import CONFIG, DIVERGED, SWEEP, Run
from sparsight.training.schedule import learning_rate_factor
from sparsight.training.site import SiteTraining
from sparsight.vision import Tokens, VisionModel

Activations = ActivationSource | tuple[VisionModel, ImageSource]

SHOWN_MEMBERS = 3
"""Autoencoders whose figures fit into a line of progress."""


def train(
    source: Activations,
    config: TrainConfig | None = None,
    out: str | Path = "runs/sae",
    *,
    sites: Sequence[str] | None = None,
    tokens: Tokens | None = None,
    resume: bool = True,
    device: str | torch.device | None = None,
    quiet: bool = False,
) -> Run:
    """Train an SAE on each site, all in one pass over the activations.

    Args:
        source: an activation store, live activations, or a model and its images.
        config: how to train.
        out: folder of the run. A finished run of the same configuration is returned as it is, a
            cut one goes on from its last checkpoint with the same bits.
        sites: which sites of the source; all by default.
        tokens: which positions; "all" by default where `source` is a model and images. A store has
            its own, which must be these if they are given.
        resume: False refuses a folder that holds a run.
        device: "cpu", "cuda", …; a GPU if there is one.
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
    recipe = recipe_of(activations, run, config)
    if _settled(run, recipe, resume):
        return run
    with run.claimed():
        members = [Member(site, site, run.folder(site), recipe) for site in run.sites]
        read = with_target(run.sites, config)
        Loop(activations, read, members, run.checkpoints, place).run_to_end("train", quiet)
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


class Loop:
    """One pass over the activations, and the state of everything that trains in it.

    Args:
        source: the activations.
        sites: what is read; the order of the data depends on them.
        members: what trains; of the same batches, length and order of the data.
        checkpoints: folder of the checkpoints; the pass goes on from the last.
        device: "cpu", "cuda", …; a GPU if there is one.
        drop_diverged: go on without a member whose loss ceases to be finite, and say so in its
            folder.
    """

    def __init__(
        self,
        source: ActivationSource,
        sites: Sequence[str],
        members: Sequence[Member],
        checkpoints: Path,
        device: str | torch.device | None = None,
        *,
        drop_diverged: bool = False,
    ) -> None:
        self.members = {member.name: member for member in members}
        self.config = members[0].config  # for what all have in common
        self.checkpoints = checkpoints
        self.device = choose_device(device, float64=True)
        self.drop_diverged = drop_diverged
        self.step = 0
        stream = source.stream(sites, self.config.batch_size, seed=self.config.order_seed)
        needed = tuple(
            dict.fromkeys(
                site for member in members for site in (member.site, member.target) if site
            )
        )
        self.batches = Prefetcher(stream, needed, self.device)
        found, problems = checkpoint.load_latest(checkpoints, tuple(self.members))
        for problem in problems:
            warnings.warn(f"Skipped a damaged checkpoint: {problem}", stacklevel=4)
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
                _metadata(source, member.site, member.config),
                self.device,
                *self._kernels(member, source.d_in(member.site)),
                *self._target(source, member, samples),
                resumed=found is not None,
            )
            for name, member in self.members.items()
        }
        if found is not None:
            self.step = found.step
            self.batches.load_state_dict(found.cursor)
            for name, training in self.trainings.items():
                training.load_state(found.saes[name], found.tensors[name], found.summed[name])
        self.logged = (time.monotonic(), self.vectors)
        self.loggers: dict[str, list[Logger]] = {}
        for name, member in self.members.items():
            write_toml(member.folder / CONFIG, member.recipe)
            self.loggers[name] = open_loggers(
                member.folder,
                member.config.loggers,
                self.step,
                self.vectors,
                to_dict(member.recipe),
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
                for site, ratio in self._ratios().items():
                    print(f"{site}: mean to spread {ratio:.2f}", file=sys.stderr)
            self._run(line)

    def _ratios(self) -> dict[str, float]:
        """How far the activations of each site lie from 0, in their own spread."""
        return {
            self.members[name].site: training.sae.metadata["mean_to_spread"]
            for name, training in self.trainings.items()
        }

    def _run(self, line: ProgressLine) -> None:
        config = self.config
        log_steps = config.steps_every(config.log_every, 100)
        save_steps = config.steps_every(config.checkpoint_every, 10)
        note = ""
        while self.step < config.n_steps and self.trainings:
            batch = self._next_batch()
            for name, training in self.trainings.items():
                factor = self._lr_factor(name, self.step)
                member = self.members[name]
                target = batch[member.target] if member.target else None
                training.step(batch[member.site], self.step, factor, target)
            self.step += 1
            last = self.step == config.n_steps
            if self.step % log_steps == 0 or last:
                note = self._log()
            if self.step % save_steps == 0 and not last:
                self._check_finite()
                checkpoint.save(
                    self.checkpoints, self.step, self.trainings, self.batches.state_dict()
                )
            line.advance(config.batch_size, note)
        self._finish()

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
                f"{error} Training stops at step {self.step + 1}; {self._what_stays()}."
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
        """Stop at what is not finite, or drop the member that it befell."""
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
                raise SparsightError(f"{told} Training stops; {self._what_stays()}.{advice}")
            write_json(self.members[name].folder / DIVERGED, {"step": step + 1, "reason": told})
            warnings.warn(f"{told} The others go on without it.{advice}", stacklevel=2)
            self._close(name)
            del self.trainings[name]

    def _what_stays(self) -> str:
        newest = checkpoint.newest(self.checkpoints)
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def _finish(self) -> None:
        self._check_finite()
        for name, training in self.trainings.items():
            training.finished().save_pretrained(self.members[name].folder)
            self._close(name)

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


def recipe_of(source: ActivationSource, run: Run, config: TrainConfig) -> TrainRecipe:
    """All that repeats a run."""
    store = getattr(source, "path", None)
    return TrainRecipe(
        store=str(Path(store).resolve()) if store is not None else None,
        model=source.model_info.get("id"),
        images=source.model_info.get("images"),
        sites=run.sites,
        tokens=cast(Tokens, source.tokens),
        out=run.out,
        activations=source.fingerprint,
        train=config,
    )


def _settled(run: Run, recipe: TrainRecipe, resume: bool) -> bool:
    """Whether the run is finished; makes sure that what is there is a part of the same run."""
    if (run.out / SWEEP).exists():
        raise UserError(f"{run.out} holds a sweep. Choose another folder for a single run.")
    if not holds_part(run, recipe):
        return False
    if not resume:
        raise UserError(f"{run.out} holds a run already. Choose another folder, or resume it.")
    return all(run.is_finished(site) for site in run.sites)


def holds_part(run: Run, recipe: TrainRecipe) -> bool:
    """Whether some of the run is there already.

    Raises:
        UserError: another run is there.
    """
    _refuse_other_sites(run)
    paths = [run.folder(site) / CONFIG for site in run.sites]
    present = [path for path in paths if path.exists()]
    own = identity(recipe)
    for path in present:
        field = first_difference(identity(load(TrainRecipe, path)), own)
        if field == "activations":
            raise UserError(
                f"{path}: holds a run on other activations: the model's weights, the "
                "preprocessing, the images or the selection of them differ. Choose another "
                "folder, or remove this one."
            )
        if field is not None:
            raise UserError(
                f"{path}: holds a run that differs in {field!r}. Choose another folder, "
                "or remove this one."
            )
    return bool(present)


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


def _metadata(source: ActivationSource, site: str, config: TrainConfig) -> dict[str, Any]:
    model = {key: value for key, value in source.model_info.items() if key != "images"}
    target = {} if config.target_site is None else {"target_site": config.target_site}
    return {
        "model": model,
        "images": source.model_info.get("images"),
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
