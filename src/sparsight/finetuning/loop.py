"""The loop of fine-tuning: steps on pairs and attacks, resumed exactly where it stopped."""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.config import write_toml
from sparsight.errors import SparsightError
from sparsight.files import write_bytes
from sparsight.finetuning import losses
from sparsight.finetuning.batches import BatchLoader, PairBatch
from sparsight.finetuning.config import FinetuneRecipe
from sparsight.finetuning.groups import set_trainable
from sparsight.finetuning.optimisers import rate_factor
from sparsight.finetuning.optimising import gradient_norms, make_optimiser
from sparsight.finetuning.pairs import CaptionedImages
from sparsight.finetuning.penalty import LatentPenalty, PenalisedLatents
from sparsight.finetuning.run import FinetuneRun, identity
from sparsight.finetuning.sampling import Pair, PairSampler
from sparsight.finetuning.scaling import ScaledNeurons
from sparsight.interruption import Stop, postponed
from sparsight.pace import Pace
from sparsight.progress import logger, progress
from sparsight.runs import checkpoint_files
from sparsight.runs.loop import CheckpointedLoop, warn_of_damage
from sparsight.runs.same_run import refuse_other_checkpoint
from sparsight.tensor_files import read_safetensors, write_safetensors
from sparsight.training.loggers import JsonLines
from sparsight.training.run import CONFIG, METRICS
from sparsight.vision import VisionModel
from sparsight.vision.gmp import parametrize, to_plain
from sparsight.vision.saving import Layout, save_model

_TENSORS = "training.safetensors"
_Kept = tuple[dict[str, Any], dict[str, Tensor], bytes | None]
_TERMS = ("contrastive", "distillation", "pull", "penalty")


class FinetuneLoop(CheckpointedLoop):
    """The state of a training run.

    Args:
        original: the given model.
        data: clean images with their captions.
        attack: attacks with their captions, if there are any.
        loader: loader of both.
        recipe: everything needed to repeat the run.
        run: the run folder, which must be claimed.
        latents, neurons: see `finetune`.
        pace: when to write a checkpoint by time.
        quiet: show no progress line.
    """

    def __init__(
        self,
        original: VisionModel,
        data: CaptionedImages,
        attack: CaptionedImages | None,
        loader: BatchLoader,
        recipe: FinetuneRecipe,
        run: FinetuneRun,
        latents: PenalisedLatents | None,
        neurons: Mapping[int, Sequence[int]] | None,
        pace: Pace,
        quiet: bool,
    ) -> None:
        super().__init__(run.checkpoints, pace)
        self.original, self.loader, self.run = original, loader, run
        self.config, self.identity, self.quiet = recipe.train, identity(recipe), quiet
        config = self.config
        sampler = PairSampler(
            data,
            attack,
            batch_size=config.batch_size,
            attack_share=config.attack_share,
            duplicates=config.duplicates,
            seed=config.seed,
        )
        self.per_epoch = len(data) / sampler.n_data
        n_batches = config.n_batches(len(data), sampler.n_data)
        self.planned: list[list[Pair]] = list(islice(sampler.batches(), n_batches))
        self.n_steps = config.n_steps(n_batches)
        self.model = working_copy(original, geometric=config.parametrisation == "geometric")
        self.trained = set_trainable(self.model, config.rates, config.first_block)
        self.optimiser = make_optimiser(self.trained, config, self._width())
        self.penalty: LatentPenalty | None = None
        if latents is not None and config.penalty:
            self.penalty = LatentPenalty(self.model, latents, latents.place(original))
        self.scaled: ScaledNeurons | None = None
        if attack is not None and config.scaling.factor != 1:
            self.scaled = ScaledNeurons(self.model, config.scaling, neurons)
        self.summed: dict[str, float] = {}
        lines = self._restore()
        write_toml(run.out / CONFIG, recipe)
        self.log = JsonLines(run.out, self.step, lines)
        self.logged = time.monotonic()

    def run_to_end(self, layout: Layout) -> None:
        """Train, log and save until the planned batches are done; write the model."""
        with postponed() as stop:
            self._train(stop)
            self.export(layout)

    def _train(self, stop: Stop) -> None:
        config = self.config
        every = config.every(config.log_every, self.n_steps, 100)
        save_every = config.every(config.checkpoint_every, self.n_steps, 10)
        with (
            closing(self.loader.load(self.planned[self.step * config.accumulation :])) as batches,
            progress("finetune", self.n_steps, "steps", done=self.step, quiet=self.quiet) as line,
        ):
            self.model.module.train()
            while self.step < self.n_steps:
                with self.kept_when_stopped():
                    stop.check()
                norms = self.take_step(batches)
                self.step += 1
                last = self.step == self.n_steps
                note = self._log(norms) if self.step % every == 0 or last else ""
                wanted = config.checkpoint_every is not None
                if self.is_due(save_every, wanted) and not last:
                    self.keep()
                line.advance(1, note)
        self.model.module.eval()
        self._check_weights()

    def take_step(self, batches: Iterator[PairBatch]) -> dict[str, Tensor]:
        """Take one optimiser step; return the norm of each layer's gradient before clipping."""
        config = self.config
        factor = rate_factor(config.schedule, self.step, self.n_steps, config.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimiser.zero_grad(set_to_none=True)
        first = self.step * config.accumulation
        n = len(self.planned[first : first + config.accumulation])
        with _own_random_numbers(config.seed, self.step):
            for _ in range(n):
                loss = self._loss(next(batches))
                (loss / n).backward()
        norms = gradient_norms(self.trained)
        whole = torch.stack(list(norms.values())).norm()
        self._check_finite("gradient", whole)
        if config.grad_clip is not None and whole > config.grad_clip:
            for member in self.trained:
                if member.parameter.grad is not None:
                    member.parameter.grad.mul_(config.grad_clip / whole)
        self.optimiser.step()
        self._clamp_scale()
        self._add("steps", 1.0)
        return {"all": whole, **norms}

    def _loss(self, batch: PairBatch) -> Tensor:
        """Return the total loss of one batch."""
        config, model = self.config, self.model
        texts = list(dict.fromkeys(batch.captions))
        own = torch.tensor([texts.index(caption) for caption in batch.captions])
        attack = batch.attack
        factor = config.scaling.factor_at(self.step, self.n_steps)
        device = model.device.type
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
            with (
                self.scaled.applied(attack, factor) if self.scaled else _nothing(),
                self.penalty.reading() if self.penalty else _nothing(),
            ):
                images = model.embed_images(batch.pixels)
            distinct = model.embed_texts(texts)
        captions = distinct[own.to(distinct.device)]
        terms = {"contrastive": self._contrastive(images, captions, batch.captions)}
        attacked = attack.to(images.device)
        if config.distillation:
            kept: list[Tensor] = []
            with torch.no_grad():
                wanted = self.original.embed_texts(texts)
                calm = (
                    self.original.embed_images(batch.pixels[~attack]) if not all(attack) else None
                )
            kept.append(losses.distillation(distinct, wanted))
            if calm is not None:
                kept.append(losses.distillation(images[~attacked], calm))
            terms["distillation"] = torch.stack(kept).sum()
        if batch.clean is not None and any(attack):
            with torch.no_grad():
                calm = self.original.embed_images(batch.clean)
            terms["pull"] = losses.distillation(images[attacked], calm)
        if self.penalty:
            rows = attack if any(attack) else torch.ones_like(attack)
            terms["penalty"] = self.penalty.value(rows.float())
        weights = {"contrastive": 1.0} | {name: getattr(config, name) for name in _TERMS[1:]}
        total = sum(weights[name] * term for name, term in terms.items())
        assert isinstance(total, Tensor)
        self._check_finite("loss", total)
        for name, term in {"loss": total, **terms}.items():
            self._add(name, float(term.detach()))
        self._add("batches", 1.0)
        return total

    def _contrastive(self, images: Tensor, captions: Tensor, texts: Sequence[str]) -> Tensor:
        config = self.config
        if config.loss == "similarity_of_similarities":
            return losses.similarity_of_similarities(
                images, captions, config.temperature, config.smoothing, config.entropy
            )
        groups = losses.caption_groups(texts)
        targets = losses.contrastive_targets(groups, config.smoothing).to(images.device)
        scale = self.model.module.logit_scale.float().reshape(())  # type: ignore[operator]
        return losses.info_nce(images, captions, scale, targets, config.entropy)

    @torch.no_grad()
    def _clamp_scale(self) -> None:
        scale = self.model.module.logit_scale
        if isinstance(scale, Tensor) and scale.requires_grad:
            scale.clamp_(max=losses.LARGEST_LOG_SCALE)

    @torch.no_grad()
    def _check_weights(self) -> None:
        """Check the weights before they are saved: a step may overflow though its gradient is
        finite.
        """
        for member in self.trained:
            self._check_finite(f"sum of {member.name}", member.parameter.sum(), self.step)

    def _check_finite(self, what: str, value: Tensor, step: int | None = None) -> None:
        found = float(value.detach())
        if math.isfinite(found):
            return
        step = self.step + 1 if step is None else step
        raise SparsightError(
            f"The {what} is {found} at step {step} of {self.n_steps}. Fine-tuning "
            f"stops; {self.what_stays()}. A lower lr may help"
            + (", or precision float32." if self.config.precision != "float32" else ".")
        )

    def _add(self, name: str, value: float) -> None:
        self.summed[name] = self.summed.get(name, 0.0) + value

    def _log(self, norms: Mapping[str, Tensor]) -> str:
        """Write a line to the log: means since the last line, gradient norms of this step."""
        now, summed = time.monotonic(), self.summed
        batches, steps = summed.pop("batches"), summed.pop("steps")
        config = self.config
        means = {name: value / batches for name, value in summed.items()}
        whole = norms["all"]
        figures = {
            "step": self.step,
            "epoch": min(self.step * config.accumulation, len(self.planned)) / self.per_epoch,
            **means,
            "logit_scale": self.model.logit_scale,
            "lr_factor": rate_factor(config.schedule, self.step - 1, self.n_steps, config.warmup),
            "lr": {group["part"]: group["lr"] for group in self.optimiser.param_groups},
            "scaling": config.scaling.factor_at(self.step - 1, self.n_steps),
            "gradient_norm": float(whole),
            "clipped": config.grad_clip is not None and float(whole) > config.grad_clip,
            "gradient_norms": {name: float(norm) for name, norm in norms.items() if name != "all"},
            "failed": len(self.loader.failures),
            "seconds_per_step": (now - self.logged) / steps,
        }
        self.log.log(figures)
        self.logged, self.summed = now, {}
        return " · ".join(f"{name} {value:.4f}" for name, value in means.items())

    def keep(self) -> None:
        """Write a checkpoint, after checking that the weights are finite."""
        self._check_weights()
        super().keep()

    def tell(self, text: str) -> None:
        """Print a message to the user."""
        if not self.quiet:
            logger().info(text)

    def save(self) -> None:
        """Write a checkpoint of the model and its optimiser."""
        tensors = {f"model/{name}": value for name, value in self.model.module.state_dict().items()}
        for member in self.trained:
            for key, value in self.optimiser.state[member.parameter].items():
                tensors[f"optimiser/{member.name}/{key}"] = value

        def write_files(folder: Path) -> list[str]:
            own = {
                name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()
            }
            write_safetensors(own, folder / _TENSORS)
            write_bytes(folder / METRICS, self.log.path.read_bytes())
            return [_TENSORS, METRICS]

        failures = {str(place): reason for place, reason in self.loader.failures.items()}
        state = {"summed": self.summed, "failures": failures, "run": self.identity}
        checkpoint_files.write(self.checkpoints, self.step, state, write_files)

    def _restore(self) -> bytes | None:
        """Resume from the last checkpoint, if there is one; return its lines of the log."""

        def read(path: Path, state: dict[str, Any]) -> _Kept:
            # Checkpoints from earlier versions of Sparsight have no log.
            lines = (path / METRICS).read_bytes() if METRICS in state["sha256"] else None
            return state, read_safetensors(path / _TENSORS), lines

        found, problems = checkpoint_files.read_latest(self.checkpoints, read)
        warn_of_damage(problems)
        if found is None:
            return None
        state, tensors, lines = found
        refuse_other_checkpoint(self.checkpoints, state.get("run"), self.identity)
        self.step = self.kept_step = state["step"]
        self.summed = dict(state["summed"])
        self.loader.failures = {int(place): why for place, why in state["failures"].items()}
        head = "model/"
        own = {name[len(head) :]: x for name, x in tensors.items() if name.startswith(head)}
        self.model.module.load_state_dict(own)
        for member in self.trained:
            head = f"optimiser/{member.name}/"
            moments = {name[len(head) :]: x for name, x in tensors.items() if name.startswith(head)}
            if moments:
                device = member.parameter.device
                self.optimiser.state[member.parameter] = {
                    key: x if key == "step" else x.to(device) for key, x in moments.items()
                }
        return lines

    def _width(self) -> int:
        return self.model.d_in("blocks.0.resid_pre")

    def export(self, layout: Layout) -> None:
        """Write the model atomically, under its final name."""
        to_plain(self.model.module)
        save_model(self.model, self.run.folder, layout)
        shutil.rmtree(
            self.checkpoints, ignore_errors=True
        )  # three times the model's size, and no longer useful


def working_copy(original: VisionModel, geometric: bool = False) -> VisionModel:
    """Return a float32 copy to train; its MLPs are W = r θ/‖θ‖ if `geometric`."""
    model = copy.deepcopy(original)
    model.__dict__.pop("weights_hash", None)  # these weights will change
    model.module.float()
    if geometric:
        parametrize(model.module)
    return model


@contextmanager
def _own_random_numbers(seed: int, step: int) -> Iterator[None]:
    """Make dropout, if the model has any, depend only on seed and step."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield
