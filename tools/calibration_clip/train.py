"""Train the calibration CLIP: `python -m tools.calibration_clip.train --out DIR --minutes 60`.

A contrastive loss alone is solved by colours and never gets to the symbols. So the truth helps:
each patch predicts what covers it (symbol, colour, written word, letters), the class token what
the scene shows; and the two towers are tied by contrastive losses over hard candidates: the names
of all symbols under one template, the written words, the grounds, and the batch's own captions,
32 scenes of which share one ground. A name written on a scene takes a share of the target
(`--word-share`) from what is drawn, in the prompts for symbols: that is how the model learns to be
fooled by words, as CLIPs trained on the web are.

A run with `--steps` is the same bits again for a seed, also when it was cut and resumed; with
`--minutes` the schedule follows the clock. `--start-from` trains a further leg on new scenes, with
a schedule of its own and without the curriculum: words are learnt last, and gain most from it.

The heads that predict the truth are not exported.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from sparsight.calibration.captions import (
    make_tokenizer,
)
from sparsight.calibration.clip import (
    export,
    new_clip,
    to_input,
    zero_shot_figures,
)
from sparsight.devices import choose_device
from sparsight.errors import SparsightError, UserError
from sparsight.files import atomic_path
from sparsight.interruption import STOPS, Stop, Terminated, kept, noted, postponed, raise_terminated
from sparsight.leftovers import remove_temporaries
from sparsight.pace import SECONDS, Pace
from sparsight.runs.folder import claimed
from sparsight.runs.loop import CheckpointedLoop
from tools.calibration_clip.batches import Batch, difficulty, draw_batch
from tools.calibration_clip.card import Making, write_card
from tools.calibration_clip.losses import Prompts, TruthHeads, contrastive_loss

WARM_UP_STEPS = 300


@dataclass(frozen=True)
class Settings:
    """What to train, for how long, where.

    Args:
        out: folder for `checkpoint.pt`, `log.jsonl` and `export/`.
        steps: number of steps; or None, and `minutes` decides.
        minutes: time budget, over all resumed parts of the run.
        batch_size: scenes a step.
        lr: peak learning rate.
        seed: of weights and scenes.
        word_share: share of a written name in the target where the prompts ask for symbols, in
            [0, 1); the rest is what is drawn.
        start_from: checkpoint of an earlier run, to go on from with new scenes.
        device: "cpu", "cuda", …; default a GPU if there is one.
        compile: compile the vision tower (needs a C++ compiler on the CPU).
        evaluate_every: minutes between evaluations; each writes `export/` and a checkpoint.
        held_out: scenes of an evaluation.
    """

    out: Path
    steps: int | None = None
    minutes: float = 60.0
    batch_size: int = 128
    lr: float = 1.5e-3
    seed: int = 0
    word_share: float = 0.5
    start_from: Path | None = None
    device: str | None = None
    compile: bool = False
    evaluate_every: float = 3.0
    held_out: int = 512

    def __post_init__(self) -> None:
        for name in ("steps", "minutes", "batch_size", "lr", "evaluate_every", "held_out"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}; it must be above 0.")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be 0 or more.")
        if not 0 <= self.word_share < 1:
            raise UserError(f"word_share is {self.word_share}; it must be in [0, 1).")
        if self.start_from is not None and not self.start_from.is_file():
            raise UserError(f"{self.start_from}: no such checkpoint to start from.")

    def options(self) -> str:
        """The command line's options that decide the weights."""
        length = f"--minutes {self.minutes:g}" if self.steps is None else f"--steps {self.steps}"
        start = "" if self.start_from is None else f" --start-from {self.start_from.name}"
        return (
            f"{length} --batch-size {self.batch_size} --lr {self.lr:g} --seed {self.seed} "
            f"--word-share {self.word_share:g}{start}"
        )


class Trainer(CheckpointedLoop):
    """The state of a run: model, heads, optimiser, step and the time spent."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.out, Pace(SECONDS))
        self.settings = settings
        torch.manual_seed(settings.seed)
        self.device = choose_device(settings.device)
        self.tokenizer = make_tokenizer()
        self.prompts = Prompts(self.tokenizer)
        self.model = new_clip(len(self.tokenizer)).to(self.device)
        self.heads = TruthHeads(self.model.config.vision_config.hidden_size).to(self.device)
        vision = self.model.vision_model
        self.vision = torch.compile(vision) if settings.compile else vision
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.parameters = parameters
        self.first_step = 0
        self.losses: list[Tensor] = []  # since the last line of the log
        self.seconds = self.earlier_seconds = 0.0
        settings.out.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self.load()
        elif settings.start_from is not None:
            self.start_from(settings.start_from)

    @property
    def checkpoint(self) -> Path:
        """Where the state of the run is kept."""
        return self.settings.out / "checkpoint.pt"

    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        if self.settings.steps is not None:
            return min((self.step - self.first_step) / self.settings.steps, 1.0)
        return min(self.seconds / (60 * self.settings.minutes), 1.0)

    def newest_checkpoint(self) -> Path | None:
        """Where the state of the run is kept, if it was written."""
        return self.checkpoint if self.checkpoint.exists() else None

    def tell(self, text: str) -> None:
        """Tell the user something beside the log, which goes to standard output."""
        print(text, file=sys.stderr, flush=True)

    def keep(self) -> None:
        """Write a checkpoint, if every loss since the last line of the log is finite."""
        if self.losses:
            self._mean_loss()
        super().keep()

    def save(self) -> None:
        """Write everything that a resumed run needs."""
        state = {
            "made_with": self._identity(),
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "first_step": self.first_step,
            "seconds": self.seconds,
            "earlier_seconds": self.earlier_seconds,
        }
        with atomic_path(self.checkpoint) as path:
            torch.save(state, path)

    def _identity(self) -> dict[str, float]:
        """The settings that must not change within a run."""
        names = ("seed", "batch_size", "lr", "word_share")
        return {name: getattr(self.settings, name) for name in names}

    def load(self) -> None:
        """Continue from the last checkpoint.

        Raises:
            UserError: the checkpoint belongs to a run with another seed, batch size or rate.
        """
        state = _read_checkpoint(self.checkpoint, self.device)
        made_with = state.get("made_with", {})
        for name, value in self._identity().items():
            if made_with.get(name) != value:
                raise UserError(
                    f"{self.checkpoint}: made with {name} {made_with.get(name)}, not {value}. "
                    "Give the same settings, or another --out."
                )
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = self.kept_step = state["step"]
        self.first_step = state["first_step"]
        self.seconds, self.earlier_seconds = state["seconds"], state["earlier_seconds"]

    def start_from(self, checkpoint: Path) -> None:
        """Take over weights and heads of an earlier run, and go on behind its last scene."""
        state = _read_checkpoint(checkpoint, self.device)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.step = self.first_step = self.kept_step = state["step"]
        self.earlier_seconds = state.get("earlier_seconds", 0.0) + state["seconds"]

    def curriculum(self, step: int) -> float:
        """How far the curriculum is at a step, 0 to 1; a further leg has it behind it."""
        if self.first_step:
            return 1.0
        return self.progress() if self.settings.steps is None else step / self.settings.steps

    def train_step(self, batch: Batch) -> Float[Tensor, ""]:
        """One step on one batch; returns the loss."""
        progress = self.progress()
        done = self.step - self.first_step + 1
        lr = self.settings.lr * min(1.0, done / WARM_UP_STEPS) * (1 - progress)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        weight = min(0.3 + 0.7 * self.curriculum(self.step) / 0.3, 1.0)
        with torch.autocast(self.device.type, torch.bfloat16):
            out = self.vision(pixel_values=to_input(batch.pixels))
            embedded = self.model.visual_projection(out.pooler_output)
            truth = self.heads(out.last_hidden_state[:, 1:], out.pooler_output, batch)
            images = functional.normalize(embedded.float(), dim=-1)
            ties = contrastive_loss(
                self.model, self.prompts, images, batch, self.step, self.settings.word_share
            )
        loss: Tensor = truth + weight * ties
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.step += 1
        return loss.detach()

    def evaluate(self) -> dict[str, float]:
        """Held-out figures; the model as it stands is exported beside them."""
        settings, folder = self.settings, self.settings.out / "export"
        self.model.eval()
        figures = zero_shot_figures(self.model, self.tokenizer, settings.held_out)
        export(self.model, self.tokenizer, folder)
        self.model.train()
        cores = f"{torch.get_num_threads()} CPU cores"
        making = Making(
            steps=self.step,
            batch_size=settings.batch_size,
            minutes=(self.earlier_seconds + self.seconds) / 60,
            last_leg=self.step - self.first_step if self.first_step else None,
            options=settings.options(),
            word_share=settings.word_share,
            seed=settings.seed,
            device=cores if self.device.type == "cpu" else "a GPU",
        )
        write_card(folder, figures, settings.held_out, making)
        return figures

    def run(self) -> dict[str, float]:
        """Train to the end of the budget, with a line of log every 20 seconds."""
        with claimed(self.settings.out, "training into"):
            remove_temporaries(self.settings.out, [self.checkpoint.name])
            if self.progress() >= 1:
                return self.evaluate()
            with postponed() as stop, closing(self._batches()) as batches:
                return self._train(batches, stop)

    def _train(self, batches: Iterator[Batch], stop: Stop) -> dict[str, float]:
        settings = self.settings
        log = settings.out / "log.jsonl"
        logged, evaluated = self.seconds, self.seconds
        seen = 0
        last = time.monotonic()
        for batch in batches:
            self.losses.append(self.train_step(batch))
            seen += settings.batch_size
            self.seconds += time.monotonic() - last
            last = time.monotonic()
            done = self.progress() >= 1
            due = self.seconds - evaluated >= 60 * settings.evaluate_every
            if self.seconds - logged >= 20 or due or done:
                loss = self._mean_loss()
                line: dict[str, Any] = {
                    "step": self.step,
                    "minutes": round(self.seconds / 60, 2),
                    "progress": round(self.progress(), 4),
                    "loss": round(loss, 4),
                    "pictures_per_second": round(seen / max(self.seconds - logged, 1e-9), 1),
                }
                if due or done:
                    line |= self.evaluate()
                    self.keep()
                    evaluated = self.seconds
                print(json.dumps(line), flush=True)
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                logged, seen, self.losses = self.seconds, 0, []
                last = time.monotonic()
            if done:
                return {name: line[name] for name in ("clean", "attacked", "fooled", "reads")}
            if self.pace.due():
                self.keep()
                last = time.monotonic()
            with noted(self._what_is_kept), self.kept_when_stopped():
                stop.check()
        raise AssertionError("the batches are endless")

    def _mean_loss(self) -> float:
        loss = torch.stack(self.losses).mean().item()
        if not math.isfinite(loss):
            raise SparsightError(f"The loss is {loss} at step {self.step}; training stops.")
        return loss

    def _what_is_kept(self) -> str:
        """What a stopped run says, once the checkpoint is written."""
        if self.settings.steps is not None:
            return kept(self.step - self.first_step, self.settings.steps, "steps")
        minutes = f"{self.seconds / 60:.1f} of {self.settings.minutes:g} minutes"
        return f"Kept {minutes}; the same command goes on."

    def _batches(self) -> Generator[Batch]:
        """Batches from the present step on, drawn one ahead in a thread."""
        step = self.step
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = pool.submit(self._draw, step)
            while True:
                batch = ahead.result()
                step += 1
                ahead = pool.submit(self._draw, step)
                for name, value in vars(batch).items():
                    if isinstance(value, Tensor):
                        setattr(batch, name, value.to(self.device))
                yield batch

    def _draw(self, step: int) -> Batch:
        # By steps, the curriculum is that of the batch being drawn, not of the one in training.
        settings, progress = self.settings, self.curriculum(step)
        return draw_batch(settings.seed, step, settings.batch_size, difficulty(progress))


def _read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        state["model"], state["heads"], state["step"]
    except UnpicklingError as error:  # torch's own text advises to run what the file brings
        raise SparsightError(
            f"{path}: is damaged, or holds more than tensors; code in it is not run."
        ) from error
    except (RuntimeError, OSError, EOFError, KeyError, TypeError) as error:
        raise SparsightError(f"{path}: is damaged, or no checkpoint of a run ({error}).") from error
    return state


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, help="number of steps (instead of --minutes)")
    parser.add_argument("--minutes", type=float, default=60.0, help="time budget")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--word-share", type=float, default=0.5, help="pull of a written name")
    parser.add_argument("--start-from", type=Path, help="checkpoint of an earlier run")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--compile", action="store_true", help="compile the vision tower")
    parser.add_argument("--evaluate-every", type=float, default=3.0, help="minutes")
    parser.add_argument("--held-out", type=int, default=512, help="scenes of an evaluation")
    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        figures = Trainer(Settings(**vars(parser.parse_args()))).run()
    except STOPS as stop:
        name, code = ("Terminated.", 143) if isinstance(stop, Terminated) else ("Interrupted.", 130)
        told = " ".join([name, *getattr(stop, "__notes__", ["Run the same command again."])])
        parser.exit(code, f"{parser.prog}: {told}\n")
    except UserError as error:
        parser.error(str(error))
    except SparsightError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
