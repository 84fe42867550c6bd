"""The report's plots of an index and of `metrics.json`; `plots` has public versions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from sparsight.pages import plots


def density_histogram(table: pa.Table) -> Figure:
    """Plot how often latents are active.

    Args:
        table: table of an index.
    """
    density = table["density"].to_numpy()
    return plots.density_histogram(density, int((density == 0).sum()))


def density_scatter(table: pa.Table) -> Figure:
    """Plot density against mean activation, coloured by the share of the most frequent label.

    Args:
        table: table of an index.
    """
    share = table["top_label_share"].to_numpy().astype(float)
    mean = table["mean_activation"].to_numpy()
    return plots.density_scatter(table["density"].to_numpy(), mean, share)


def error_by_position(metrics: Mapping[str, Any], tokens: str, model: Mapping[str, Any]) -> Figure:
    """Plot the FVU of each token.

    Args:
        metrics: figures with `fvu_by_position`.
        tokens: which positions were measured.
        model: facts about the model: `patch_grid`, `n_prefix`.
    """
    values = [math.nan if value is None else value for value in metrics["fvu_by_position"]]
    grid = model.get("patch_grid")
    n_prefix = int(model.get("n_prefix", 0)) if tokens == "all" else 0
    return plots.error_by_position(np.array(values, dtype=float), grid and tuple(grid), n_prefix)
