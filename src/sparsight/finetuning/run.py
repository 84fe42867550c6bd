"""A fine-tuning run on disk."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from sparsight.config import load, to_dict
from sparsight.errors import UserError
from sparsight.finetuning.config import FinetuneRecipe
from sparsight.runs import checkpoint_files
from sparsight.runs.folder import RunFolder
from sparsight.training.run import CONFIG, METRICS, read_metrics
from sparsight.vision import VisionModel, load_model
from sparsight.vision.saving import OPEN_CLIP_CONFIG

MODEL = "model"
WRITTEN = (MODEL, CONFIG, METRICS, "before-after.json", "report.html")
"""What fine-tuning writes into its folder."""


@dataclass(frozen=True)
class FinetuneRun(RunFolder):
    """A finished or unfinished run.

    Attributes:
        out: its folder: `config.toml`, `metrics.jsonl`, `checkpoints/`, and `model/` in the end.
    """

    doing: ClassVar[str] = "fine-tuning into"

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

    def model(
        self, device: str | torch.device | None = None, *, scale_jpegs: bool = False
    ) -> VisionModel:
        """Load the fine-tuned model.

        Args:
            device: see `load_model`.
            scale_jpegs: see `load_model`; as the model it began with, where the two are compared.

        Raises:
            UserError: the run has not finished.
        """
        if not self.is_finished:
            raise UserError(f"{self.out}: the fine-tuning has not finished; the same call goes on.")
        of_open_clip = (self.folder / OPEN_CLIP_CONFIG).exists()
        prefix = "open_clip:local-dir:" if of_open_clip else ""
        return load_model(f"{prefix}{self.folder}", device=device, scale_jpegs=scale_jpegs)

    def written(self) -> list[tuple[Path, Collection[str]]]:
        """The run's folder and the checkpoints, with what fine-tuning writes there."""
        return [(self.out, WRITTEN), (self.checkpoints, checkpoint_files.PARTIAL)]

    def has_leftovers(self) -> bool:
        """Whether a process was killed here: in a finished run, checkpoints are such a trace."""
        return super().has_leftovers() or (self.is_finished and self.checkpoints.exists())

    def clear(self) -> None:
        """Remove what such a process left. The folder must be claimed."""
        super().clear()
        if self.is_finished:
            shutil.rmtree(self.checkpoints, ignore_errors=True)


def identity(recipe: FinetuneRecipe) -> dict[str, Any]:
    """What two parts of a run share. Folders may have moved; fingerprints know the contents."""
    return to_dict(dataclasses.replace(recipe, model="", data="", attack=None, layout=""))
