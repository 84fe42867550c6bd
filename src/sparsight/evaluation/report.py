"""What `evaluate` gives back: figures for JSON, and what every latent counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsight.evaluation.sparsity import LatentCounts
from sparsight.files import write_json

ROWS = {
    "FVU": "fvu",
    "FVU, CLS": "fvu_cls",
    "FVU, patches": "fvu_patches",
    "cosine": "cosine",
    "relative bias": "relative_bias",
    "CLIP-Scope explained variance": "clipscope_ev",
    "L0": "l0",
    "L0, CLS": "l0_cls",
    "L0, patches": "l0_patches",
    "dead": "dead",
    "zero-shot top-1, original": "zero_shot.original.top1",
    "zero-shot top-1, reconstructed": "zero_shot.reconstructed.top1",
    "zero-shot top-1, mean": "zero_shot.mean.top1",
    "zero-shot top-1, zero": "zero_shot.zero.top1",
    "contrastive loss, original": "contrastive.original.loss",
    "contrastive loss, reconstructed": "contrastive.reconstructed.loss",
}
TRUTH_SCORES = ("auc", "f1", "iou")


@dataclass(frozen=True)
class EvaluationReport:
    """Every number about an SAE, with the baselines beside it.

    Attributes:
        metrics: nested, JSON-able; keys as in `docs/design.md`. A figure that is not defined is
            None; a family that was left out has its reason in `omitted`.
        latents: density and mean activation of every latent.
    """

    metrics: dict[str, Any]
    latents: LatentCounts = field(repr=False)

    def save(self, path: str | Path) -> Path:
        """Write `metrics.json`: to `path`, or into it if it is a folder."""
        path = Path(path)
        if path.is_dir():
            path = path / "metrics.json"
        write_json(path, self.metrics)
        return path

    def table(self) -> list[tuple[str, ...]]:
        """Rows for a terminal: the head, then name, the SAE's figure and each baseline's."""
        blocks = {"SAE": self.metrics, **(self.metrics.get("baselines") or {})}
        rows = [("", *blocks)]
        lines = dict(ROWS)
        for kind in self.metrics.get("truth_summary") or {}:
            for score in TRUTH_SCORES:
                name = f"{kind.replace('_', ' ')}, mean {score.upper()}"
                lines[name] = f"truth_summary.{kind}.{score}.mean"
        for name, key in lines.items():
            values = [_dig(block, key) for block in blocks.values()]
            if any(value is not None for value in values):
                rows.append((name, *("" if v is None else f"{v:.4g}" for v in values)))
        return rows


def finite(value: Any, path: str = "", gaps: dict[str, str] | None = None) -> Any:
    """The same value with None for every number that is NaN or infinite.

    Args:
        value: nested dictionaries, lists and numbers.
        path: where it stands.
        gaps: gets the path of each number that was replaced, and what it was.
    """
    if isinstance(value, Mapping):
        return {
            str(key): finite(each, f"{path}.{key}" if path else str(key), gaps)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [finite(each, f"{path}[{i}]", gaps) for i, each in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        if gaps is not None:
            gaps[path] = f"The figure was {value}."
        return None
    return value


def _dig(block: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(block, Mapping):
            return None
        block = block.get(key)
    return block
