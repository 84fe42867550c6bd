"""The plots of the report and of a sweep, each a function that returns a matplotlib figure.

Figures are on white; a notebook shows them when they are returned, and `savefig` saves them.
`sparsight.pages.plots` draws the same from plain numbers, for pages that follow a dark theme.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparsight.errors import UserError
from sparsight.figures import shown_in
from sparsight.files import read_json
from sparsight.latents import drawing
from sparsight.latents.comparison import TABLE, draw_pareto
from sparsight.latents.index import LatentIndex
from sparsight.latents.run_files import RunFiles, read_run
from sparsight.pages import plots as bare
from sparsight.pages.style import plot_style
from sparsight.training import Sweep


def training_curves(run: str | Path) -> Figure:
    """Plot FVU, L0 and dead latents during training.

    Args:
        run: folder of an SAE, `Run.folder(site)`.

    Raises:
        UserError: the folder holds no SAE, or no training log.
    """
    found = _run(run)
    if not found.log:
        raise UserError(f"{found.folder}: holds no metrics.jsonl, which `sparsight train` writes.")
    with plot_style(on_white=True):
        return bare.training_curves(found.log)


def error_by_position(run: str | Path) -> Figure:
    """Plot the FVU of each token: patches on their grid, CLS and registers next to it.

    Args:
        run: folder of an evaluated SAE.

    Raises:
        UserError: the folder holds no SAE, or no figures.
    """
    found = _run(run)
    if not found.metrics.get("fvu_by_position"):
        raise UserError(
            f"{found.folder}: holds no figures of this SAE; `sparsight evaluate` writes them."
        )
    with plot_style(on_white=True):
        return drawing.error_by_position(found.metrics, found.tokens, found.model)


def density_histogram(index: LatentIndex | str | Path) -> Figure:
    """Plot how often each latent is active, on a log10 axis; never active ones are separate.

    Args:
        index: the index, its folder, or the folder of its run.

    Raises:
        UserError: the folder holds no index.
    """
    with plot_style(on_white=True):
        return drawing.density_histogram(_index(index).table)


def density_scatter(index: LatentIndex | str | Path) -> Figure:
    """Plot density against mean activation, one dot per latent, coloured by the share of
    the most frequent label among its strongest images.

    Args:
        index: the index, its folder, or the folder of its run.

    Raises:
        UserError: the folder holds no index.
    """
    with plot_style(on_white=True):
        return drawing.density_scatter(_index(index).table)


def pareto(sweep: Sweep | Mapping[str, Any] | str | Path, figure: str = "fvu") -> Figure:
    """Plot a figure of a sweep's members over L0, with intervals over seeds.

    Args:
        sweep: the sweep or its folder, measured with `compare`; or the result of `compare`.
        figure: "fvu" or "accuracy".

    Raises:
        UserError: `compare` has not measured the sweep yet, or not this figure.
    """
    known = [each.key for each in shown_in("pareto")]
    if figure not in known:
        raise UserError(f"figure is {figure!r}; known: {', '.join(known)}.")
    if isinstance(sweep, Mapping):
        table, where = sweep, "the table"
    else:
        folder = sweep.out if isinstance(sweep, Sweep) else Path(sweep)
        where = str(folder)
        if not (folder / TABLE).exists():
            raise UserError(f"{folder}: holds no {TABLE}; `sparsight.compare` writes it.")
        table = read_json(folder / TABLE)
    with plot_style(on_white=True):
        drawn = draw_pareto(table, figure)
    if drawn is None:
        raise UserError(f"{where}: {figure} was not measured.")
    return drawn


def _run(folder: str | Path) -> RunFiles:
    return read_run(Path(folder), Path(folder).name)


def _index(index: LatentIndex | str | Path) -> LatentIndex:
    return index if isinstance(index, LatentIndex) else LatentIndex.open(index)
