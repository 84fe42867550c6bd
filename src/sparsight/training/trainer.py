"""The training loop: one pass over the data for all sites, resumed exactly where it was cut."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import sparsight
from sparsight.activations import ActivationSource, LiveActivations
from sparsight.config import first_difference, load, to_dict, write_toml
from sparsight.errors import SparsightError, UserError
from sparsight.images import ImageSource
from sparsight.progress import ProgressLine, progress
from sparsight.sae.kernels import Precision
from sparsight.training import checkpoint
from sparsight.training.config import TrainConfig, TrainRecipe
from sparsight.training.loggers import Logger, open_loggers
from sparsight.training.run import CONFIG, Run
from sparsight.training.schedule import learning_rate_factor
from sparsight.training.site import SiteTraining
from sparsight.vision import Tokens, VisionModel

Activations = ActivationSource | tuple[VisionModel, ImageSource]


def train(
    source: Activations,
    config: TrainConfig | None = None,
    out: str | Path = "runs/sae",
    *,
    sites: Sequence[str] | None = None,
    tokens: Tokens | None = None,
    resume: bool = True,
    device: str | None = None,
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
    config = config or TrainConfig()
    activations = _as_activations(source, sites, tokens)
    chosen = [activations.canonical_site(site) for site in sites or activations.sites]
    run = Run(Path(out), tuple(dict.fromkeys(chosen)))
    for site in run.sites:
        config.sae.width(activations.d_in(site))
    recipe = _recipe(activations, run, config)
    if _settled(run, recipe, resume):
        return run
    with run.claimed():
        loop = _Loop(activations, recipe, run, torch.device(device or _best_device()))
        with progress("train", config.n_steps * config.batch_size, "vectors",
                      done=loop.step * config.batch_size, quiet=quiet) as line:  # fmt: skip
            loop.run_to_end(line)
    return run


class _Loop:
    """The state of a run in this process."""

    def __init__(
        self, source: ActivationSource, recipe: TrainRecipe, run: Run, device: torch.device
    ) -> None:
        self.config = recipe.train
        self.run = run
        self.device = device
        self.step = 0
        self.stream = source.stream(run.sites, self.config.batch_size, seed=self.config.seed)
        found, problems = checkpoint.load_latest(run.checkpoints, run.sites)
        for problem in problems:
            warnings.warn(f"Skipped a damaged checkpoint: {problem}", stacklevel=3)
        self.first_batch: dict[str, Tensor] | None = None
        if found is None:
            self.first_batch = self._read()
        samples = self.first_batch or {
            site: torch.zeros(1, source.d_in(site)) for site in run.sites
        }
        self.sites = {
            site: SiteTraining(
                self.config,
                source.stats(site),
                samples[site],
                _metadata(source, site, self.config),
                device,
                _precision(self.config, device),
            )
            for site in run.sites
        }
        if found is not None:
            self.step = found.step
            self.stream.load_state_dict(found.cursor)
            for site, training in self.sites.items():
                training.load_state(found.saes[site], found.tensors[site], found.summed[site])
        self.logged = (time.monotonic(), self.step * self.config.batch_size)
        self.loggers: dict[str, list[Logger]] = {}
        for site in run.sites:
            write_toml(run.folder(site) / CONFIG, recipe)
            self.loggers[site] = open_loggers(
                run.folder(site),
                self.config.loggers,
                self.step,
                self.step * self.config.batch_size,
                to_dict(recipe),
            )

    def run_to_end(self, line: ProgressLine) -> None:
        """Train, log and save until the configured number of vectors is reached."""
        config = self.config
        log_steps = config.steps_every(config.log_every, 100)
        save_steps = config.steps_every(config.checkpoint_every, 10)
        note = ""
        while self.step < config.n_steps:
            batch = self._next_batch()
            factor = learning_rate_factor(self.step, config.n_steps, config.warmup, config.decay)
            for site, training in self.sites.items():
                training.step(batch[site].to(self.device), self.step, factor)
            self.step += 1
            last = self.step == config.n_steps
            if self.step % log_steps == 0 or last:
                note = self._log(factor)
            if self.step % save_steps == 0 and not last:
                self._check_finite()
                checkpoint.save(
                    self.run.checkpoints, self.step, self.sites, self.stream.state_dict()
                )
            line.advance(config.batch_size, note)
        self._finish()

    def _next_batch(self) -> Mapping[str, Tensor]:
        if self.first_batch is not None:
            batch, self.first_batch = self.first_batch, None
            return batch
        return self._read()

    def _read(self) -> dict[str, Tensor]:
        try:
            return next(self.stream)
        except UserError:
            raise
        except SparsightError as error:
            raise SparsightError(
                f"{error} Training stops at step {self.step + 1}; {self._what_stays()}."
            ) from error

    def _log(self, factor: float) -> str:
        self._check_finite()
        notes = []
        vectors = self.step * self.config.batch_size
        now = time.monotonic()
        rate = (vectors - self.logged[1]) / max(now - self.logged[0], 1e-9)
        self.logged = (now, vectors)
        for site, training in self.sites.items():
            figures = training.figures(self.config.batch_size)
            entry: dict[str, Any] = {
                "step": self.step,
                "vectors": vectors,
                "epoch": vectors / self.stream.vectors_per_epoch,
                **figures,
                "dead_window": self.config.dead_after,
                "lr": training.lr * factor,
                "vectors_per_second": rate,
            }
            for logger in self.loggers[site]:
                logger.log(entry)
            notes.append(
                f"{site} FVU {figures['fvu']:.4f} L0 {figures['l0']:.1f} "
                f"dead {100 * figures['dead']:.2f} %"
            )
        return " · ".join(notes)

    def _check_finite(self) -> None:
        for site, training in self.sites.items():
            bad = training.first_bad()
            if bad is not None:
                step, what = bad
                size = self.config.batch_size
                advice = "" if what == "activations" else " A lower lr may help."
                raise SparsightError(
                    f"The {what} at {site} ceased to be finite at step {step + 1} (vectors "
                    f"{step * size:,} to {(step + 1) * size:,}). Training stops; "
                    f"{self._what_stays()}.{advice}"
                )

    def _what_stays(self) -> str:
        newest = checkpoint.newest(self.run.checkpoints)
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"

    def _finish(self) -> None:
        self._check_finite()
        for site, training in self.sites.items():
            training.finished().save_pretrained(self.run.folder(site))
            for logger in self.loggers[site]:
                logger.close()


def _as_activations(
    source: Activations, sites: Sequence[str] | None, tokens: Tokens | None
) -> ActivationSource:
    if not isinstance(source, tuple):
        if tokens not in (None, source.tokens):
            raise UserError(
                f"tokens is {tokens!r}, the activations are of {source.tokens!r}. Leave it out, or "
                f"extract with tokens={tokens!r}."
            )
        return source
    model, images = source
    if not sites:
        raise UserError("Name the sites to train on: sites=['blocks.-1.resid_post'], say.")
    return LiveActivations(model, images, sites, tokens or "all")


def _recipe(source: ActivationSource, run: Run, config: TrainConfig) -> TrainRecipe:
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
    _refuse_other_sites(run)
    folders = [run.folder(site) for site in run.sites]
    present = [folder for folder in folders if (folder / CONFIG).exists()]
    if not present:
        return False
    if not resume:
        raise UserError(f"{run.out} holds a run already. Choose another folder, or resume it.")
    own = _identity(recipe)
    for folder in present:
        there = _identity(load(TrainRecipe, folder / CONFIG))
        field = first_difference(there, own)
        if field == "activations":
            raise UserError(
                f"{folder / CONFIG}: holds a run on other activations: the model's weights, the "
                "preprocessing, the images or the selection of them differ. Choose another "
                "folder, or remove this one."
            )
        if field is not None:
            raise UserError(
                f"{folder / CONFIG}: holds a run that differs in {field!r}. Choose another folder, "
                "or remove this one."
            )
    return all((folder / "sae.safetensors").exists() for folder in folders)


def _identity(recipe: TrainRecipe) -> dict[str, Any]:
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
    return {
        "model": model,
        "images": source.model_info.get("images"),
        "site": site,
        "tokens": source.tokens,
        "n_vectors": config.n_steps * config.batch_size,
        "seed": config.seed,
        "sparsight_version": sparsight.__version__,
    }


def _precision(config: TrainConfig, device: torch.device) -> Precision:
    if config.precision != "auto":
        return config.precision
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "bfloat16" if fast else "float32"


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
