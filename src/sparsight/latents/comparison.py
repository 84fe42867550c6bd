"""`compare`: one table and the Pareto plots of a sweep.

In the sweep's folder: `table.json` (all figures), `table.csv` (one row per autoencoder), `table.md`
(one row per setting, with intervals over seeds), `plots/fvu-l0.svg` and `plots/accuracy-l0.svg`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure as MatplotlibFigure

from sparsight.activations import ActivationSource
from sparsight.errors import SparsightError
from sparsight.evaluation import SweepMeasures, measure_sweep
from sparsight.figures import Figure, figure_of, shown_in
from sparsight.files import read_json, write_json, write_text
from sparsight.folders import replaced, settled
from sparsight.images import ImageSource
from sparsight.pages.plots import Spot, pareto
from sparsight.pages.scores import measured_on
from sparsight.pages.style import save_svg
from sparsight.redaction import without_folders
from sparsight.training import Sweep
from sparsight.vision import VisionModel

TABLE = "table.json"
_SPARSITY = "sae.sparsity"
_SHORT = {"sae.sparsity": "sparsity", "sae.sparsity.k": "k", "sae.n_latents": "latents"}


def compare(
    sweep: Sweep,
    source: ActivationSource,
    measures: SweepMeasures | None = None,
    *,
    model: VisionModel | Callable[[], VisionModel] | None = None,
    images: ImageSource | None = None,
    device: str | torch.device | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure the unmeasured members of a sweep; write its table and its plots.

    Args:
        sweep: the sweep.
        source: activations to measure on, e.g. a store of images that training did not see.
        measures: how much to measure.
        model: the model for zero-shot accuracy, or a function that loads it; default: that of live
            activations.
        images: the images for zero-shot accuracy; default: those of the activations.
        device: "cpu", "cuda", …; a GPU if there is one.
        quiet: show no progress bars.

    Returns:
        The contents of `table.json`; see `measure_sweep`.

    Raises:
        UserError: the activations are of another model than the members, or lack a site.
        SparsightError: an activation is not finite.
    """
    path = sweep.out / TABLE
    found = measure_sweep(
        sweep,
        source,
        measures,
        model=model,
        images=images,
        previous=_previous(path),
        device=device,
        quiet=quiet,
    )
    with replaced(sweep.out, ()) as staged:
        if _previous(path) != json.loads(json.dumps(found)):
            write_json(staged / TABLE, found)
        write_text(staged / "table.csv", table_csv(found))
        write_text(staged / "table.md", table_markdown(found, sweep.out.resolve().name))
        _plot(found, staged / "plots")
        _drop_what_is_there(staged, sweep.out)
    return found


def _plot(found: Mapping[str, Any], folder: Path) -> None:
    for figure in shown_in("pareto"):
        drawn = draw_pareto(found, figure.key)
        if drawn is not None:
            save_svg(drawn, folder / f"{figure.key}-l0.svg")


def draw_pareto(table: Mapping[str, Any], key: str) -> MatplotlibFigure | None:
    """Plot a figure over L0; None if it was not measured.

    Args:
        table: result of `compare`.
        key: key of the figure.
    """
    spots = spots_of(table["groups"], key)
    if not spots:
        return None
    figure = figure_of(key)
    return pareto(
        spots,
        figure.label,
        higher_is_better=figure.better == "higher",
        reference=_original(table) if key == "accuracy" else None,
    )


def table_csv(table: Mapping[str, Any]) -> str:
    """Make a CSV table for other programs: one row per autoencoder, settings and raw figures."""
    keys = list(dict.fromkeys(key for row in table["members"] for key in row["settings"]))
    own = [
        "n_latents",
        "n_alive",
        *(each.key for each in shown_in("sweep")),
        "vectors_per_second",
        "diverged",
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "site", "folder", *keys, *own])
    for row in table["members"]:
        settings = [row["settings"].get(key) for key in keys]
        plain = [json.dumps(each) if isinstance(each, dict | list) else each for each in settings]
        about = [row["name"], row["site"], row["folder"]]
        writer.writerow([*about, *plain, *(row.get(key) for key in own)])
    return out.getvalue()


def table_markdown(table: Mapping[str, Any], title: str) -> str:
    """Make a Markdown table for people: one row per setting, 95 % intervals over seeds."""
    groups = table["groups"]
    keys = list(dict.fromkeys(key for group in groups for key in group["settings"]))
    places = _varying(groups, "site") + [
        key for key in _varying(groups, "tokens") if key not in keys
    ]
    figures = [each for each in shown_in("sweep") if any(each.key in group for group in groups)]
    seeds = any(group["n"] > 1 for group in groups)
    head = [*places, *(_SHORT.get(key, key) for key in keys), "latents"] + ["seeds"] * seeds
    if "sae.n_latents" in keys:
        head.remove("latents")
    head += [*(each.name for each in figures), *(["stability"] * seeds)]
    lines = []
    for group in groups:
        line = [f"`{group[key]}`" for key in places]
        line += [worded(group["settings"].get(key, "")) for key in keys]
        line += [f"{group['n_latents']:,}"] * ("sae.n_latents" not in keys)
        line += [str(group["n"])] * seeds
        line += [_cell(group.get(each.key), each) for each in figures]
        line += [_stability(group.get("stability"))] * seeds
        lines.append(line)
    rows = [head, ["---"] * len(head), *lines]
    parts = [f"# Sweep {title}", "\n".join("| " + " | ".join(row) + " |" for row in rows)]
    parts += _notes(table, seeds)
    plots = [each for each in shown_in("pareto") if spots_of(groups, each.key)]
    parts += [f"![{each.label} over L0](plots/{each.key}-l0.svg)" for each in plots]
    return "\n\n".join(parts) + "\n"


def spots_of(groups: Sequence[Mapping[str, Any]], key: str) -> list[Spot]:
    """Return the points of a Pareto plot; settings of sparsity do not split a series."""
    keys = list(dict.fromkeys(each for group in groups for each in group["settings"]))
    varies = [
        each for each in keys if len({json.dumps(g["settings"].get(each)) for g in groups}) > 1
    ]
    sites = _varying(groups, "site")
    spots = []
    for group in groups:
        if key not in group or "l0" not in group:
            continue
        words = [group["site"]] if sites else []
        for each in varies:
            if each not in group["settings"] or each.startswith(f"{_SPARSITY}."):
                continue
            value = group["settings"][each]
            if each == _SPARSITY:
                words.append(str(value["kind"]))
            elif isinstance(value, Mapping) or each == "tokens":
                words.append(worded(value))
            else:
                words.append(f"{_SHORT.get(each, each)} {worded(value)}")
        place = f"{group['tokens']}/{group['site']}"
        spots.append(Spot(_ends(group["l0"]), _ends(group[key]), ", ".join(words), place))
    return spots


def worded(value: Any) -> str:
    """Write a value of a grid for people."""
    if isinstance(value, Mapping):
        inside = (f"{key} {worded(each)}" for key, each in value.items() if key != "kind")
        return " ".join([str(value.get("kind", "")), *inside]).strip()
    if isinstance(value, list | tuple):
        return ", ".join(map(worded, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _notes(table: Mapping[str, Any], seeds: bool) -> list[str]:
    measured = table["measured"]
    rows = [row for row in table["members"] if "n_vectors" in row]
    counts = sorted({row["n_vectors"] for row in rows})
    span = " to ".join(f"{n:,}" for n in dict.fromkeys((*counts[:1], *counts[-1:])))
    notes = [f"Measured on {span} vectors of {measured['images']}." if rows else ""]
    notes += list(dict.fromkeys(map(measured_on, rows)))
    if seeds:
        notes[0] += " In brackets: Student's 95 % interval of the mean over seeds."
        if any(group.get("stability") for group in table["groups"]):
            notes[0] += (
                " Stability: mean cosine of the alive latents of two seeds, matched one to one; "
                "in brackets, that of random rows."
            )
    for place, figures in table["original"].items():
        notes.append(
            f"Zero-shot accuracy of the unchanged model ({place}): {100 * figures['top1']:.1f} % "
            f"of "
            f"{figures['n']:,} images."
        )
    gone = [row for row in table["members"] if "diverged" in row]
    notes += [f"{row['name']}, {row['site']}: {row['diverged']}" for row in gone]
    notes += [f"No {what}: {why}" for what, why in table["omitted"].items()]
    return [without_folders(note.strip()) for note in notes if note]


def _cell(block: Mapping[str, Any] | None, figure: Figure) -> str:
    if block is None:
        return "–"
    low, high = block["interval"] or (block["mean"], block["mean"])
    text, unit = figure.precise(block["mean"]), " %" if figure.is_share else ""
    if high != low:
        ends = ", ".join(figure.precise(end).removesuffix(unit) for end in (low, high))
        text = f"{text.removesuffix(unit)} [{ends}]{unit}"
    return text


def _stability(block: Mapping[str, Any] | None) -> str:
    return "–" if not block else f"{block['mean_cosine']:.3f} ({block['random']:.3f})"


def _ends(block: Mapping[str, Any]) -> tuple[float, float, float]:
    low, high = block["interval"] or (block["mean"], block["mean"])
    return block["mean"], low, high


def _original(table: Mapping[str, Any]) -> tuple[str, float] | None:
    found = {round(each["top1"], 6) for each in table["original"].values()}
    return ("unchanged model", found.pop()) if len(found) == 1 else None


def _varying(groups: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Return the key if the groups differ in it."""
    return [key] if len({group[key] for group in groups}) > 1 else []


def _previous(path: Path) -> dict[str, Any] | None:
    """Return what was measured before; after damage to the file, everything is measured again."""
    settled(path.parent)
    try:
        return read_json(path) if path.exists() else None
    except SparsightError:
        return None


def _drop_what_is_there(staged: Path, folder: Path) -> None:
    """Keep files on disk that would be replaced by equal ones."""
    for path in [each for each in staged.rglob("*") if each.is_file()]:
        there = folder / path.relative_to(staged)
        if there.is_file() and there.read_bytes() == path.read_bytes():
            path.unlink()
