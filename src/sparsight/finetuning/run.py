"""A fine-tuning run on disk."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsight.config import load
from sparsight.errors import UserError
from sparsight.files import lock, remove_temporaries, temporaries
from sparsight.finetuning.config import FinetuneRecipe
from sparsight.training.run import CONFIG, LOCK, METRICS, read_metrics
from sparsight.vision import VisionModel, load_model
from sparsight.vision.saving import OPEN_CLIP_CONFIG

MODEL = "model"
WRITTEN = (MODEL, CONFIG, METRICS, "before-after.json", "report.html")
"""What fine-tuning writes into its folder."""


@dataclass(frozen=True)
class FinetuneRun:
    """A finished or unfinished run.

    Attributes:
        out: its folder: `config.toml`, `metrics.jsonl`, `checkpoints/`, and `model/` in the end.
    """

    out: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.out / "checkpoints"

    @property
    def folder(self) -> Path:
        """The fine-tuned model, as `load_model` and the library of its layout read it."""
        return self.out / MODEL

    @property
    def is_finished(self) -> bool:
        """Whether the model is there."""
        return self.folder.is_dir()

    @property
    def recipe(self) -> FinetuneRecipe:
        """What was trained on what, and how."""
        return load(FinetuneRecipe, self.out / CONFIG)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return read_metrics(self.out / METRICS)

    def model(self, device: str | torch.device | None = None) -> VisionModel:
        """Load the fine-tuned model.

        Raises:
            UserError: the run has not finished.
        """
        if not self.is_finished:
            raise UserError(f"{self.out}: the fine-tuning has not finished; the same call goes on.")
        of_open_clip = (self.folder / OPEN_CLIP_CONFIG).exists()
        prefix = "open_clip:local-dir:" if of_open_clip else ""
        return load_model(f"{prefix}{self.folder}", device=device)

    def claimed(self) -> AbstractContextManager[None]:
        """While it lasts no other process may train into the folder.

        Raises:
            UserError: another process does.
            SparsightError: the folder cannot be made or written.
        """
        return lock(self.out / LOCK, f"{self.out}: another process is fine-tuning into it.")

    def clear_leftovers(self) -> None:
        """Remove what a process left that was killed in the moment when the run was finished."""
        if not self.is_finished:
            return
        lying = (self.out / LOCK).exists() or temporaries(self.out, WRITTEN)
        if lying or self.checkpoints.exists():
            # Whoever holds the lock still clears up behind itself.
            with suppress(UserError), self.claimed():
                remove_temporaries(self.out, WRITTEN)
                shutil.rmtree(self.checkpoints, ignore_errors=True)
