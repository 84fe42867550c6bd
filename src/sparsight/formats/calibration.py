"""What CLIP-Scope's autoencoders need and their files lack: mean and deviation of the activations.

They were trained on activations standardised batch by batch, x_n = (x − mean) / (deviation + 1e-6),
and their published figures apply to that space, but the statistics were not kept. So they are
estimated again, on activations of all tokens, and kept in a JSON file beside the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.files import read_json, write_json
from sparsight.pickles import shown
from sparsight.sae.precision import wide

EPSILON = 1e-6
FORMAT = "sparsight-clipscope-calibration"
FORMAT_VERSION = 1
_KEYS = {"format", "format_version", "n_vectors", "about", "mean", "deviation"}


@dataclass(frozen=True)
class Calibration:
    """Mean and standard deviation of each dimension of the activations that an SAE reads."""

    mean: Float[Tensor, " d_in"]
    """The mean of each dimension."""

    deviation: Float[Tensor, " d_in"]
    """The standard deviation of each dimension, with n − 1."""

    n_vectors: int
    """The number of vectors on which both were estimated."""

    about: dict[str, Any] = field(default_factory=dict)
    """What is known about model, site and images; JSON-compatible."""

    @classmethod
    def estimate(
        cls, batches: Iterable[Tensor], about: dict[str, Any] | None = None
    ) -> Calibration:
        """Estimate from activations `[…, d_in]`, batch by batch; the sums run in float64.

        Raises:
            UserError: there are fewer than two vectors, or batches of different widths.
            SparsightError: an activation is not finite.
        """
        n, mean, squares = 0, torch.zeros(0, dtype=torch.float64), torch.zeros(0)
        for batch in batches:
            x = batch.detach().flatten(0, -2).to("cpu", torch.float64)
            if n and x.shape[1] != len(mean):
                raise UserError(
                    f"The activations are {len(mean)} wide in one batch, {x.shape[1]} in another."
                )
            if not len(x):
                continue
            # Means and squares of two samples are merged without subtracting large numbers.
            own = x.mean(dim=0)
            own_squares = (x - own).square().sum(dim=0)
            if n == 0:
                n, mean, squares = len(x), own, own_squares
                continue
            both = n + len(x)
            step = own - mean
            mean = mean + step * (len(x) / both)
            squares = squares + own_squares + step.square() * (n * len(x) / both)
            n = both
        if n < 2:
            raise UserError(f"A calibration needs two activation vectors or more; there are {n}.")
        deviation = (squares / (n - 1)).sqrt()
        if not (torch.isfinite(mean).all() and torch.isfinite(deviation).all()):
            raise SparsightError("The activations to calibrate on are not finite.")
        return cls(mean.float(), deviation.float(), n, dict(about or {}))

    @property
    def scale(self) -> Float[Tensor, " d_in"]:
        """The divisor of activations: deviation + 1e-6."""
        return self.deviation + EPSILON

    def standardise(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Convert to the space in which the SAE was trained."""
        x = wide(x)
        return (x - self.mean.to(x)) / self.scale.to(x)

    def restore(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Convert back to the model's units."""
        x = wide(x)
        return x * self.scale.to(x) + self.mean.to(x)

    def save(self, path: Path) -> Path:
        """Write a JSON file, whole or not at all.

        Raises:
            SparsightError: the disk is full or the folder cannot be written.
        """
        write_json(
            path,
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "n_vectors": self.n_vectors,
                "about": self.about,
                "mean": self.mean.tolist(),
                "deviation": self.deviation.tolist(),
            },
        )
        return path

    @classmethod
    def open(cls, path: Path) -> Calibration:
        """Read a JSON file.

        Raises:
            UserError: the file is missing, not JSON, or has another format.
            SparsightError: its content is damaged.
        """
        values = read_json(path)
        if values.get("format") != FORMAT or values.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path}: format is {shown(values.get('format'))}, version "
                f"{shown(values.get('format_version'))}; expected {FORMAT!r}, {FORMAT_VERSION}."
            )
        if set(values) != _KEYS:
            raise SparsightError(f"{path}: holds {sorted(values)}, expected {sorted(_KEYS)}.")
        rows = [values["mean"], values["deviation"]]
        plain = all(isinstance(row, list) and all(map(_is_number, row)) for row in rows)
        if not plain or len(rows[0]) != len(rows[1]) or not rows[0] or min(rows[1]) < 0:
            raise SparsightError(
                f"{path}: mean and deviation are not two lists of the same length with "
                "deviations of 0 or more. Calibrate again."
            )
        if not isinstance(values["n_vectors"], int) or not isinstance(values["about"], dict):
            raise SparsightError(f"{path}: n_vectors is not a number, or about is not an object.")
        return cls(
            torch.tensor(rows[0], dtype=torch.float32),
            torch.tensor(rows[1], dtype=torch.float32),
            values["n_vectors"],
            values["about"],
        )

    @staticmethod
    def beside(checkpoint: Path) -> Path:
        """Return the path of a checkpoint's calibration: `1200013184.calibration.json`, say."""
        return checkpoint.with_name(f"{checkpoint.stem}.calibration.json")

    @classmethod
    def of(cls, checkpoint: Path, d_in: int) -> Calibration | None:
        """Read the calibration beside a checkpoint; None if there is none.

        Raises:
            SparsightError: it is damaged, or belongs to activations of another width.
        """
        path = cls.beside(checkpoint)
        if not path.is_file():
            return None
        calibration = cls.open(path)
        if len(calibration.mean) != d_in:
            raise SparsightError(
                f"{path}: is of activations {len(calibration.mean)} wide; the autoencoder's are "
                f"{d_in}. Delete it, or calibrate again."
            )
        return calibration


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
