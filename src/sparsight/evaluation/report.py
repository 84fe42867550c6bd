"""The result of `evaluate`: figures for JSON, and counts per latent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsight.evaluation.sparsity import LatentCounts
from sparsight.figures import BASELINES, TRUTH_SCORES, Figure, shown_in, truth_score
from sparsight.files import write_json
from sparsight.notebooks import data_frame, html_grid

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class EvaluationReport:
    """Every number about an SAE and its baselines.

    Attributes:
        metrics: nested figures for JSON; docs/concepts/metrics.md explains the keys. An undefined
            figure is None; if a family was left out, `omitted` has the reason.
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
        """Return rows for a terminal: the head, then per figure its name, the SAE's and the
        baselines'.
        """
        blocks = self._blocks()
        rows = [("", *blocks)]
        for figure in self._figures():
            values = [figure.of(block) for block in blocks.values()]
            if any(value is not None for value in values):
                cells = ("" if value is None else figure.precise(value) for value in values)
                rows.append((figure.label, *cells))
        return rows

    def to_pandas(self) -> pandas.DataFrame:
        """Return the table as numbers in a pandas data frame: one row per figure, one column per
        block (`SAE`, and each baseline); the index is the figure's name.

        Raises:
            MissingExtra: pandas is not installed.
        """
        blocks, figures = self._blocks(), list(self._figures())
        found = {
            name: [math.nan if (value := each.of(block)) is None else value for each in figures]
            for name, block in blocks.items()
        }
        frame = data_frame(found)
        frame.index = [each.label for each in figures]
        return frame.dropna(how="all")

    def __repr__(self) -> str:
        shown = (each for each in shown_in("log") if each.of(self.metrics) is not None)
        figures = ", ".join(f"{each.name} {each.show(each.of(self.metrics))}" for each in shown)
        beside = ", ".join(self.metrics.get("baselines") or {}) or "no baselines"
        return f"EvaluationReport({figures}; baselines: {beside})"

    def _repr_html_(self) -> str:
        head, *rows = self.table()
        gaps = (f"No {what}: {why}" for what, why in (self.metrics.get("omitted") or {}).items())
        return html_grid(head, rows, " ".join(gaps))

    def _blocks(self) -> dict[str, Any]:
        beside = self.metrics.get("baselines") or {}
        return {"SAE": self.metrics} | {BASELINES.get(k, k): block for k, block in beside.items()}

    def _figures(self) -> Iterator[Figure]:
        """Yield the figures of the table's rows, one per variant."""
        for figure in shown_in("table"):
            yield from [figure.at(variant) for variant in figure.variants] or [figure]
        for kind in self.metrics.get("truth_summary") or {}:
            for name in TRUTH_SCORES:
                score = truth_score(name)
                yield dataclasses.replace(
                    score,
                    key=f"truth_summary.{kind}.{name}.mean",
                    label=f"{kind.replace('_', ' ')}, mean {score.label}",
                )


def finite(value: Any, path: str = "", gaps: dict[str, str] | None = None) -> Any:
    """Return the same value with None for every number that is NaN or infinite.

    Args:
        value: nested dictionaries, lists and numbers.
        path: path of the value.
        gaps: receives the path of each replaced number, and what it was.
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
