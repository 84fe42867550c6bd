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
"""Files that fine-tuning writes into its folder."""


@dataclass(frozen=True)
class FinetuneRun(RunFolder):
    """A finished or unfinished run.

    Attributes:
        out: its folder, with `config.toml`, `metrics.jsonl`, `checkpoints/`, and `model/` at the
            end.
    """

    doing: ClassVar[str] = "fine-tuning into"

    @property
    def folder(self) -> Path:
        """The folder of the fine-tuned model, for `load_model` and the library of its layout."""
        return self.out / MODEL

    @property
    def is_finished(self) -> bool:
        """Whether the model is written."""
        return self.folder.is_dir()

    @property
    def recipe(self) -> FinetuneRecipe:
        """Model, data and settings of the run."""
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
            scale_jpegs: see `load_model`; to compare with the original model, use its value.

        Raises:
            UserError: the run has not finished.
        """
        if not self.is_finished:
            raise UserError(
                f"{self.out}: fine-tuning has not finished; run the same command again to continue."
            )
        of_open_clip = (self.folder / OPEN_CLIP_CONFIG).exists()
        prefix = "open_clip:local-dir:" if of_open_clip else ""
        return load_model(f"{prefix}{self.folder}", device=device, scale_jpegs=scale_jpegs)

    def written(self) -> list[tuple[Path, Collection[str]]]:
        """Return the run folder and the checkpoints, with the files that fine-tuning writes."""
        return [(self.out, WRITTEN), (self.checkpoints, checkpoint_files.PARTIAL)]

    def has_leftovers(self) -> bool:
        """Return whether a killed process left traces, such as checkpoints in a finished run."""
        return super().has_leftovers() or (self.is_finished and self.checkpoints.exists())

    def clear(self) -> None:
        """Remove what a killed process left. The folder must be claimed."""
        super().clear()
        if self.is_finished:
            shutil.rmtree(self.checkpoints, ignore_errors=True)


def identity(recipe: FinetuneRecipe) -> dict[str, Any]:
    """Return what two parts of a run share: fingerprints, since folders may have moved."""
    return to_dict(dataclasses.replace(recipe, model="", data="", attack=None, layout=""))
