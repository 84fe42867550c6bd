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
    """Receives metrics at intervals."""

    def log(self, figures: Mapping[str, Any]) -> None:
        """Record metrics; their key `vectors` is the position in the run."""

    def close(self) -> None:
        """Write what is pending."""


class JsonLines:
    """`metrics.jsonl`; lines after the step from which a run resumes are removed.

    Args:
        folder: folder of the file.
        step: step at which the run begins or continues.
        kept: the lines up to that step, from a checkpoint; by default those in the file.
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
                f"{self.path}: is damaged or was changed. Its lines up to step {step} are restored "
                "from the checkpoint.",
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
        """Do nothing; nothing is pending."""


class TensorBoard:
    """Event files in `tensorboard/` in the run's folder; a resumed run hides later points."""

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
    """A run of Weights & Biases, named after the folder and continued when the run resumes.

    Its id is kept in the folder. What a resumed run logs a second time has the same steps and
    values as before; the service ignores it.
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
        """Send the metrics."""
        self.run.log(dict(figures), step=figures["vectors"])

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def _wandb_id(folder: Path) -> str:
    """Return the id of the run in a folder; create and save it before the service learns of it."""
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
    """Open the loggers of a run that begins or continues at `step`, after `vectors` vectors.

    `kept` holds the lines of `metrics.jsonl` from a checkpoint.

    Raises:
        MissingExtra: a library is not installed.
    """
    loggers: list[Logger] = []
    if "tensorboard" in names:
        loggers.append(TensorBoard(folder, vectors))
    if "wandb" in names:
        loggers.append(WeightsAndBiases(folder, config))
    return [JsonLines(folder, step, kept), *loggers]
