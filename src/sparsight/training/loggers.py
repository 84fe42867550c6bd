"""Where metrics go: `metrics.jsonl` always; TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import json
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sparsight.errors import MissingExtra, SparsightError
from sparsight.files import write_bytes, write_text
from sparsight.redaction import without_folders, without_folders_in
from sparsight.training.run import METRICS, WANDB_ID, read_metrics


@runtime_checkable
class Logger(Protocol):
    """Takes a line of figures now and then."""

    def log(self, figures: Mapping[str, Any]) -> None:
        """Record figures; `vectors` among them is the position in the run."""

    def close(self) -> None:
        """Write what is left."""


class JsonLines:
    """`metrics.jsonl`; lines after the step that a run resumes from are dropped.

    Args:
        folder: of the file.
        step: that the run begins at, or goes on from.
        kept: the lines up to there, as a checkpoint has them; default those in the file.
    """

    def __init__(self, folder: Path, step: int, kept: bytes | None = None) -> None:
        self.path = folder / METRICS
        if step == 0:
            kept = b""
        elif kept is None:
            lines = [line for line in read_metrics(self.path) if line["step"] <= step]
            kept = "".join(json.dumps(line) + "\n" for line in lines).encode()
        elif self.path.exists() and not self.path.read_bytes().startswith(kept):
            warnings.warn(
                f"{self.path}: is damaged or was changed. Its lines up to step {step} are written "
                "again, as the checkpoint has them.",
                stacklevel=2,
            )
        write_bytes(self.path, kept)

    def log(self, figures: Mapping[str, Any]) -> None:
        """Append a line.

        Raises:
            SparsightError: the disk is full or the file cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(figures)) + "\n")
        except OSError as error:
            raise SparsightError(
                f"{self.path}: could not be written ({error.strerror or error})."
            ) from error

    def close(self) -> None:
        """Nothing is left."""


class TensorBoard:
    """Event files under `tensorboard/` in the run's folder; a resumed run hides later points."""

    def __init__(self, folder: Path, vectors: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("tensorboard", "tensorboard") from error
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=vectors + 1)

    def log(self, figures: Mapping[str, Any]) -> None:
        """Add a point to each curve."""
        for name, value in figures.items():
            if name not in ("step", "vectors") and not isinstance(value, str):
                self.writer.add_scalar(name, value, figures["vectors"])

    def close(self) -> None:
        """Flush the event file."""
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, named after the folder and continued by a run that resumes.

    Its id lies in the folder. What a resumed run logs a second time has the steps and the values
    that are there already; the service leaves it out.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra("wandb", "wandb") from error
        self.run = wandb.init(
            project="sparsight",
            name=without_folders(str(folder)),
            dir=str(folder),
            config=without_folders_in(config),
            reinit="create_new",
            id=_wandb_id(folder),
            resume="allow",
        )

    def log(self, figures: Mapping[str, Any]) -> None:
        """Send the figures."""
        self.run.log(dict(figures), step=figures["vectors"])

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def _wandb_id(folder: Path) -> str:
    """The id of the run in a folder, made and kept there before the service hears of it."""
    path = folder / WANDB_ID
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:8] + "\n")
    return path.read_text(encoding="utf-8").strip()


def open_loggers(
    folder: Path,
    names: Sequence[str],
    step: int,
    vectors: int,
    config: Mapping[str, Any],
    kept: bytes | None = None,
) -> list[Logger]:
    """The loggers of a run, at `step` (after so many vectors), where it begins or goes on.

    `kept` is what a checkpoint has of `metrics.jsonl`.

    Raises:
        MissingExtra: a library is not installed.
    """
    loggers: list[Logger] = []
    if "tensorboard" in names:
        loggers.append(TensorBoard(folder, vectors))
    if "wandb" in names:
        loggers.append(WeightsAndBiases(folder, config))
    return [JsonLines(folder, step, kept), *loggers]
