"""Write the results of steering as files: figures, a table, plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from sparsight.editing.steering import SteerReport
from sparsight.editing.steering_table import COLUMNS
from sparsight.files import write_json, write_text
from sparsight.folders import replaced
from sparsight.pages.style import PALETTE, figure, plot_style, save_png, save_svg

MARKERS = ("o", "s", "^", "D", "v", "P")


def save_steering(report: SteerReport, out: Path) -> list[Path]:
    """Write `steer.json`, `steer.csv`, `steer.png` and `steer.svg`.

    Args:
        report: the results.
        out: folder, created if necessary; files of these names in it are replaced, all at once.

    Raises:
        SparsightError: the disk is full or the folder cannot be written.
    """
    names = [f"steer.{kind}" for kind in ("json", "csv", "png", "svg")]
    with replaced(out, names) as staged:
        paths = [staged / name for name in names]
        write_json(paths[0], report.to_dict())
        write_text(paths[1], _csv(report))
        with plot_style(on_white=True):
            drawn = plot_steering(report)
            save_png(drawn, paths[2])
        save_svg(drawn, paths[3])
    return [out / name for name in names]


def label_of(row: Mapping[str, Any]) -> str:
    """Return a latent's number, with its name if it has one."""
    return f"{row['latent']} {row['name']}" if row["name"] else f"latent {row['latent']}"


def plot_steering(report: SteerReport) -> Figure:
    """Plot accuracy, the probability of the class that rises most, retrieval, and class curves.

    Call it inside `plot_style`.
    """
    panels: list[Any] = []
    if report.latents and "top1" in report.original:
        panels.append(_accuracy)
    if report.latents and "change" in report.latents[0]["strengths"][0]:
        panels.append(_raised)
    if report.latents and "image_to_text" in report.original:
        panels.append(_retrieval)
    if report.curves:
        panels.append(_curves)
    columns = min(2, len(panels))
    rows = -(-len(panels) // max(1, columns))
    drawn = figure(3.1 * rows, 4.6 * columns)
    axes = drawn.subplots(rows, columns, squeeze=False).flatten()
    for ax, panel in zip(axes, panels, strict=False):
        panel(ax, report)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    return drawn


def _accuracy(ax: Axes, report: SteerReport) -> None:
    ax.axhline(report.original["top1"], color=PALETTE[5], linewidth=1, linestyle="--")
    for i, row in enumerate(report.latents):
        _line(ax, i, row, lambda point: (point["top1"], *point["interval"]))
    _finish(ax, report, "zero-shot accuracy (dashed: unsteered)")


def _raised(ax: Axes, report: SteerReport) -> None:
    for i, row in enumerate(report.latents):
        strongest = max(row["strengths"], key=lambda point: point["strength"])
        name = strongest["most_raised"]
        _line(ax, i, row, lambda point, name=name: (point["change"][name],), f" → {name}")
    ax.axhline(0, color=PALETTE[5], linewidth=1, linestyle="--")
    _finish(ax, report, "change in the mean probability of a class")


def _retrieval(ax: Axes, report: SteerReport) -> None:
    for key, style, words in (
        ("image_to_text", "-", "image → text"),
        ("text_to_image", ":", "text → image"),
    ):
        for i, row in enumerate(report.latents):
            x, y = _points(row, lambda point, key=key: (point[key]["recall_1"],))
            ax.plot(x, y[0], color=PALETTE[i % len(PALETTE)], linestyle=style)
        ax.plot([], [], color=PALETTE[5], linestyle=style, label=words)
        ax.axhline(report.original[key]["recall_1"], color=PALETTE[5], linewidth=1, linestyle="--")
    _finish(ax, report, "recall at 1 of captions and images")


def _curves(ax: Axes, report: SteerReport) -> None:
    whole = next(row for row in report.curves if row["kind"] == "original")
    ax.axhline(whole["top1"], color=PALETTE[5], linewidth=1, linestyle="--")
    styles = {
        ("on", "class"): ("only the class's k", PALETTE[0], "-"),
        ("on", "random"): ("only k random latents", PALETTE[0], ":"),
        ("off", "class"): ("without the class's k", PALETTE[1], "-"),
        ("off", "random"): ("without k random latents", PALETTE[1], ":"),
    }
    for (kind, chosen), (words, colour, style) in styles.items():
        rows = [r for r in report.curves if (r["kind"], r["latents"]) == (kind, chosen)]
        x = [row["k"] for row in rows]
        ax.plot(x, [row["top1"] for row in rows], color=colour, linestyle=style, label=words)
        low, high = ([row["interval"][side] for row in rows] for side in (0, 1))
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("k latents of each image's class")
    ax.set_title("zero-shot accuracy (dashed: unedited)", loc="left")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend()


def _points(row: Mapping[str, Any], pick: Any) -> tuple[list[float], list[list[float]]]:
    points = sorted(row["strengths"], key=lambda point: point["strength"])
    lines = zip(*(pick(point) for point in points), strict=True)
    return [point["strength"] for point in points], [list(line) for line in lines]


def _line(ax: Axes, i: int, row: Mapping[str, Any], pick: Any, suffix: str = "") -> None:
    colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
    x, y = _points(row, pick)
    ax.plot(x, y[0], color=colour, marker=marker, markersize=3.5, label=label_of(row) + suffix)
    if len(y) == 3:
        ax.fill_between(x, y[1], y[2], color=colour, alpha=0.12, linewidth=0)


def _finish(ax: Axes, report: SteerReport, title: str) -> None:
    words = {
        "max": "strength (1: the latent's largest activation; 0: off)",
        "absolute": "strength (activation)",
        "factor": "factor on the latent's activation (0: off)",
    }
    ax.set_xlabel(words[report.about["strength"]])
    ax.set_title(title, loc="left")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    ax.legend()


def _csv(report: SteerReport) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(report.table())
    return out.getvalue()


def rows_to_print(report: SteerReport) -> Sequence[tuple[str, ...]]:
    """Return one line per latent and strength, for people to read."""
    rows = []
    for row in report.latents:
        for point in row["strengths"]:
            cells = [label_of(row), f"{point['strength']:g}"]
            if "top1" in point:
                cells.append(f"{point['top1']:.1%}")
                change, (low, high) = point["difference"], point["difference_interval"]
                cells.append(f"{100 * change:+.1f} [{100 * low:+.0f}, {100 * high:+.0f}]")
            if "change" in point:
                raised = point["most_raised"]
                cells.append(f"{raised} {100 * point['change'][raised]:+.1f}")
                cells.append(f"{point['kl']:.3f}")
            if "image_to_text" in point:
                for key in ("image_to_text", "text_to_image"):
                    cells.append(f"{point[key]['recall_1']:.0%}")
            rows.append(tuple(cells))
    return rows
