"""The plots of the report, each a function from numbers to a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from sparsight.figures import figure_of, is_number, shown_in
from sparsight.pages.style import PALETTE, SEQUENTIAL, figure, plot_style

Floats = npt.NDArray[np.float64]

MARKERS = ("o", "s", "^", "D")
CONSTANT = 1e-3
"""An L0 that varies by less has no curve."""

LONG_LABEL = 34
"""Characters beyond which a legend has one column."""


def training_curves(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot FVU, L0 and the share of dead latents, where logged, over the vectors seen.

    An L0 that never changes is left out.
    """
    logged = {each: [each.of(row) for row in log] for each in shown_in("log")}
    logged = {each: list(filter(is_number, values)) for each, values in logged.items()}
    # With TopK, L0 is always k: a curve would show nothing.
    shown = [
        each
        for each, values in logged.items()
        if values and not (each.key == "l0" and max(values) - min(values) < CONSTANT)
    ]
    with plot_style():
        drawn = figure(0.55 + 1.15 * max(1, len(shown)))
        axes = drawn.subplots(max(1, len(shown)), 1, sharex=True, squeeze=False)[:, 0]
        for i, (ax, each) in enumerate(zip(axes, shown, strict=False)):
            rows = [row for row in log if is_number(each.of(row)) and is_number(row.get("vectors"))]
            x = np.array([row["vectors"] for row in rows], dtype=float)
            y = np.array([each.of(row) for row in rows], dtype=float)
            y *= 100 if each.is_share else 1
            ax.plot(x, y, color=PALETTE[i], linestyle="-")
            ax.set_title(each.axis, loc="left")
            if each.key == "fvu" and len(y) and y.min() > 0 and y.max() / y.min() > 8:
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                ax.yaxis.set_minor_formatter(FuncFormatter(_minor))
            else:
                ax.yaxis.set_major_locator(MaxNLocator(4))
                if each.key != "l0":
                    ax.set_ylim(0, 1 if each.is_share and y.max(initial=0) < 1 else None)
        axes[-1].set_xlabel("vectors seen")
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes[-1].xaxis.set_major_locator(MaxNLocator(5))
        return drawn


def density_histogram(density: Floats, never: int) -> Figure:
    """Plot log10 of the density of each latent, and say how many are `never` active."""
    alive = density[density > 0]
    with plot_style():
        drawn = figure(2.3)
        ax = drawn.subplots()
        if len(alive):
            low = math.floor(np.log10(alive).min() * 4) / 4
            bins = np.arange(low, 0.26, 0.25) if low < 0 else np.array([0.0, 0.25])
            ax.hist(np.log10(alive), bins=bins.tolist(), color=PALETTE[0], rwidth=0.92)
        if never:
            left = ax.get_xlim()[0]
            ax.bar([left - 0.25], [never], width=0.23, color=PALETTE[1], label="never active")
            ax.legend(loc="best")
        ax.grid(axis="x", visible=False)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(_ten_to))
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.set_xlabel("density (share of vectors)")
        ax.set_ylabel("latents")
        return drawn


def density_scatter(density: Floats, mean_activation: Floats, label_share: Floats) -> Figure:
    """Plot density against mean activation per latent, coloured by label share (NaN: grey)."""
    alive = density > 0
    x, y, colour = density[alive], mean_activation[alive], label_share[alive]
    known = ~np.isnan(colour)
    with plot_style():
        drawn = figure(2.9)
        ax = drawn.subplots()
        common: dict[str, Any] = {"s": 5.0, "linewidths": 0, "rasterized": True}
        ax.scatter(x[~known], y[~known], color=PALETTE[5], alpha=0.5, **common)
        if known.any():
            dots = ax.scatter(
                x[known],
                y[known],
                c=colour[known],
                cmap=SEQUENTIAL,
                vmin=0,
                vmax=1,
                alpha=0.85,
                **common,
            )
            bar = drawn.colorbar(dots, ax=ax, pad=0.02, aspect=28)
            bar.set_label("share of the most frequent label")
            bar.outline.set_visible(False)
        if len(x):
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter(FuncFormatter(_power_of_ten))
            ax.xaxis.set_minor_formatter(NullFormatter())
        if len(y) and y.min() > 0 and y.max() / y.min() > 20:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            minor = FuncFormatter(_minor) if y.max() / y.min() < 300 else NullFormatter()
            ax.yaxis.set_minor_formatter(minor)
        ax.set_xlabel("density (share of vectors)")
        ax.set_ylabel("mean activation when active")
        return drawn


def axes_place(drawn: Figure) -> dict[str, Any]:
    """Return where the first axes of a drawn figure lie: a page finds the data under a click.

    Returns:
        `box`: left, top, width and height, as shares of the figure; `x` and `y`: the limits;
        `log`: whether x and y are logarithmic.
    """
    ax = drawn.axes[0]
    place = ax.get_position()
    return {
        "box": [round(v, 5) for v in (place.x0, 1 - place.y1, place.width, place.height)],
        "x": list(map(float, ax.get_xlim())),
        "y": list(map(float, ax.get_ylim())),
        "log": [ax.get_xscale() == "log", ax.get_yscale() == "log"],
    }


def error_by_position(fvu: Floats, patch_grid: tuple[int, int] | None, n_prefix: int) -> Figure:
    """Plot the FVU at each position: patches on their grid, CLS (and registers) next to it.

    The patches set the colour scale; CLS has its number beside it.

    Args:
        fvu: one number per token, prefix first.
        patch_grid: rows and columns of patches.
        n_prefix: number of tokens before the patches.
    """
    with plot_style():
        if patch_grid is None or len(fvu) != n_prefix + patch_grid[0] * patch_grid[1]:
            drawn = figure(2.2)
            ax = drawn.subplots()
            ax.plot(np.arange(len(fvu)), fvu, color=PALETTE[0], marker="o", markersize=2.5)
            ax.set_xlabel("token")
            ax.set_ylabel(figure_of("fvu").axis)
            ax.set_ylim(bottom=0)
            return drawn
        grid = fvu[n_prefix:].reshape(patch_grid)
        # CLS is often far worse: it does not set the scale, or all patches would look alike.
        low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
        scale: dict[str, Any] = {
            "cmap": SEQUENTIAL,
            "vmin": low,
            "vmax": high if high > low else low + 1e-9,
        }
        drawn = figure(3.1)
        widths = [1, 8] if n_prefix else [8]
        axes = drawn.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        drawn_grid = axes[-1].imshow(grid, **scale)
        axes[-1].set_xlabel("patch column")
        axes[-1].set_ylabel("patch row")
        axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes[-1].yaxis.set_major_locator(MaxNLocator(8, integer=True))
        if n_prefix:
            axes[0].imshow(fvu[:n_prefix].reshape(-1, 1), **scale)
            axes[0].set_xticks([])
            names = ["CLS", *(f"reg {i}" for i in range(1, n_prefix))]
            names = [
                f"{name}\n{value:.2g}" for name, value in zip(names, fvu[:n_prefix], strict=True)
            ]
            axes[0].set_yticks(range(n_prefix), names)
        for ax in axes:
            ax.grid(visible=False)
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
        bar = drawn.colorbar(drawn_grid, ax=axes[-1], pad=0.03, aspect=24, shrink=0.9)
        bar.set_label(figure_of("fvu").axis)
        bar.outline.set_visible(False)
        return drawn


@dataclass(frozen=True)
class Spot:
    """A point of a Pareto plot.

    Attributes:
        x: mean, lower end and upper end.
        y: the same.
        series: name of the line that joins it with other points.
        place: name of the set of points that it is compared with, e.g. the site.
    """

    x: tuple[float, float, float]
    y: tuple[float, float, float]
    series: str
    place: str = ""


def pareto(
    spots: Sequence[Spot],
    y_label: str,
    *,
    higher_is_better: bool,
    reference: tuple[str, float] | None = None,
) -> Figure:
    """Plot a figure of merit over L0, with intervals; the Pareto front of each place is filled.

    Args:
        spots: the points; those of one series are joined in the order of L0.
        y_label: label of the vertical axis.
        higher_is_better: whether a high figure of merit is better; a low L0 always is.
        reference: name and height of a line for comparison.
    """
    best: set[int] = set()
    for place in {spot.place for spot in spots}:
        here = [j for j, spot in enumerate(spots) if spot.place == place]
        points = [(spots[j].x[0], spots[j].y[0]) for j in here]
        best |= {here[i] for i in front(points, higher_is_better)}
    names = list(dict.fromkeys(spot.series for spot in spots))
    shown = len(names) > 1 or bool(names and names[0])
    with plot_style():
        columns = 1 if max(map(len, names), default=0) > LONG_LABEL else min(2, len(names))
        rows = -(-len(names) // columns) if shown else 0
        drawn = figure(2.9 + 0.19 * rows, 5.2)
        ax = drawn.subplots()
        for i, name in enumerate(names):
            colour = PALETTE[i % len(PALETTE)]
            marker = MARKERS[i // len(PALETTE) % len(MARKERS)]
            mine = sorted((s.x[0], j) for j, s in enumerate(spots) if s.series == name)
            order = [j for _, j in mine]
            x, y = ([getattr(spots[j], axis)[0] for j in order] for axis in "xy")
            ax.plot(x, y, color=colour, linewidth=1, alpha=0.6, zorder=2)
            for j in order:
                spot, filled = spots[j], j in best
                ax.errorbar(
                    spot.x[0],
                    spot.y[0],
                    xerr=[[spot.x[0] - spot.x[1]], [spot.x[2] - spot.x[0]]],
                    yerr=[[spot.y[0] - spot.y[1]], [spot.y[2] - spot.y[0]]],
                    color=colour,
                    marker=marker,
                    markersize=5,
                    markerfacecolor=colour if filled else "#ffffff",
                    elinewidth=1,
                    capsize=2,
                    zorder=3,
                )
            ax.plot([], [], color=colour, marker=marker, markersize=5, label=name)
        if reference is not None:
            ax.axhline(reference[1], color=PALETTE[5], linewidth=1, linestyle="--")
            ax.annotate(
                reference[0], (1, reference[1]), xycoords=("axes fraction", "data"),
                xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=8,
                color=PALETTE[5],
            )  # fmt: skip
        _log_if_wide(ax, "x", [spot.x[0] for spot in spots], 4)
        if not higher_is_better:
            _log_if_wide(ax, "y", [spot.y[0] for spot in spots], 8)
        ax.set_xlabel(figure_of("l0").axis)
        ax.set_ylabel(y_label)
        if shown:
            drawn.legend(loc="outside lower center", ncols=columns)
        return drawn


def front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> set[int]:
    """Return the points that no other point equals in one coordinate and beats in the other.

    Args:
        points: x and y; a low x is better.
        higher_is_better: whether a high y is better.
    """
    sign = -1 if higher_is_better else 1
    costs = [(x, sign * y) for x, y in points]
    return {
        i
        for i, (x, y) in enumerate(costs)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in costs)
    }


def _log_if_wide(ax: Any, axis: str, values: Sequence[float], ratio: float) -> None:
    low, high = min(values, default=0), max(values, default=0)
    if low <= 0 or high / low < ratio:
        return
    getattr(ax, f"set_{axis}scale")("log")
    which = getattr(ax, f"{axis}axis")
    which.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    which.set_minor_formatter(FuncFormatter(_minor))


def short(value: float) -> str:
    """1234567 → 1.2M."""
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def _power_of_ten(value: float, _: object = None) -> str:
    return _ten_to(math.log10(value)) if value > 0 else ""


def _ten_to(exponent: float, _: object = None) -> str:
    rounded = round(exponent)
    return "1" if rounded == 0 else f"10{str(rounded).translate(_SUPERSCRIPTS)}"


def _minor(value: float, _: object = None) -> str:
    """Label a log axis between powers of ten: only at 2 and 5."""
    digit = round(value / 10 ** math.floor(math.log10(value) + 1e-9))
    return f"{value:g}" if digit in (2, 5) else ""


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
