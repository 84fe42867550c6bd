"""The files of a taxonomy: kinds per latent, shares per layer, edges, and two plots."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from sparsight.files import write_bytes, write_json, write_text
from sparsight.folders import replaced
from sparsight.intervals import wilson_interval
from sparsight.latents.index_files import parquet
from sparsight.pages.style import PALETTE, figure, plot_style, save_svg
from sparsight.taxonomy.classifying import LayerKinds, truth_kind
from sparsight.taxonomy.following import Edge
from sparsight.taxonomy.kinds import KINDS

PARQUET, CSV, SUMMARY, EDGES, EDGES_CSV = (
    "taxonomy.parquet", "taxonomy.csv", "taxonomy.json", "edges.json", "edges.csv",
)  # fmt: skip
LAYERS_PLOT, EDGES_PLOT = "layers.svg", "edges.svg"
TABLE = "table.md"
SOURCES = ("truth", "name", "label", "spatial")
"""What decides a kind, in order of precedence."""
FILES = (TABLE, PARQUET, CSV, SUMMARY, EDGES, EDGES_CSV, LAYERS_PLOT, EDGES_PLOT)

COLOURS = dict(zip(KINDS, (*PALETTE, "#c9a227", "#d8dde1"), strict=True))


def write_taxonomy(layers: Sequence[LayerKinds], edges: Sequence[Edge], out: str | Path) -> Path:
    """Write all files into a folder, replacing those of an earlier taxonomy together.

    Args:
        layers: result of `classify`.
        edges: result of `follow`.
        out: the folder.
    """
    out, table = Path(out), table_of_kinds(layers)
    with replaced(out, FILES) as staged:
        write_bytes(staged / PARQUET, parquet(table))
        write_text(staged / CSV, _csv(table.column_names, [list(r.values()) for r in _rows(table)]))
        write_text(staged / TABLE, table_markdown(layers))
        write_json(staged / SUMMARY, summary(layers))
        named = [{**dataclasses.asdict(edge), "from": layers[edge.layer].name,
                  "to": layers[edge.layer + 1].name} for edge in edges]  # fmt: skip
        nodes = [
            {"layer": layer.name, "latent": int(i), "kind": str(layer.kind[i])}
            for layer in layers
            for i in np.flatnonzero(layer.measures.images > 0)
        ]
        write_json(staged / EDGES, {"nodes": nodes, "edges": named})
        head = ["from", "latent", "to", "next_latent", "correlation"]
        write_text(staged / EDGES_CSV, _csv(head, [[e[key] for key in head] for e in named]))
        save_svg(layers_plot(layers), staged / LAYERS_PLOT)
        if len(layers) > 1:
            save_svg(edges_plot(layers, edges), staged / EDGES_PLOT)
    return out


def table_of_kinds(layers: Sequence[LayerKinds]) -> pa.Table:
    """Return one row per latent: layer, site, latent, kind, its source, truth and all measures."""
    parts = []
    for layer in layers:
        truth = [layer.truth.get(i) for i in range(layer.n_latents)]
        columns: dict[str, Any] = {
            "layer": pa.array([layer.name] * layer.n_latents, pa.string()),
            "site": pa.array([layer.site] * layer.n_latents, pa.string()),
            "latent": pa.array(range(layer.n_latents), pa.int32()),
            "kind": pa.array(layer.kind.tolist(), pa.string()),
            "source": pa.array(layer.source.tolist(), pa.string()),
            "by_rule": pa.array(layer.by_rule.tolist(), pa.string()),
            "truth": pa.array([t and str(t["attribute"]) for t in truth], pa.string()),
            "truth_f1": pa.array([t and float(t["f1"]) for t in truth], pa.float64()),
        }
        for name, values in vars(layer.measures).items():
            columns[name] = pa.array(values, pa.float64(), mask=~np.isfinite(values))
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)


def summary(layers: Sequence[LayerKinds]) -> list[dict[str, Any]]:
    """Return one entry per layer: counts and shares of kinds among its active latents.

    Each share comes with Wilson's 95 % interval; where there is ground truth, also the agreement
    of the rule with it, the confusion counts, and the share of the most frequent true kind.
    """
    found = []
    for layer in layers:
        active = layer.measures.images > 0
        n = int(active.sum())
        kinds = {}
        for kind in KINDS:
            count = int((layer.kind[active] == kind).sum())
            share = count / n if n else 0.0
            kinds[kind] = {"n": count, "share": share, "interval": wilson_interval(count, n)}
        entry: dict[str, Any] = {
            "layer": layer.name, "site": layer.site, "sae": layer.sae, "n_latents": layer.n_latents,
            "n_active": n, "n_images": layer.n_images, "kinds": kinds,
            "untrained_with_kind": layer.null_share,
            "sources": {name: int((layer.source[active] == name).sum()) for name in SOURCES},
        }  # fmt: skip
        if layer.truth:
            entry["truth"] = _against_truth(layer)
        found.append(entry)
    return found


def _against_truth(layer: LayerKinds) -> dict[str, Any]:
    hits, known = layer.agreement()
    clear_hits, clear = layer.agreement(0.9)
    confusion: dict[str, dict[str, int]] = {}
    for latent, about in layer.truth.items():
        row = confusion.setdefault(str(truth_kind(about)), {})
        guess = str(layer.by_rule[latent])
        row[guess] = row.get(guess, 0) + 1
    largest = max(sum(row.values()) for row in confusion.values())
    return {
        "agreement": hits / known, "interval": wilson_interval(hits, known), "n": known,
        "agreement_f1_0.9": clear_hits / clear if clear else None, "n_f1_0.9": clear,
        "majority": largest / known, "confusion": confusion,
    }  # fmt: skip


def table_rows(layers: Sequence[LayerKinds], *, intervals: bool) -> list[list[str]]:
    """Return a table for people: one row per layer, the share of each kind among active latents.

    Args:
        layers: result of `classify`.
        intervals: show Wilson's 95 % intervals, too.
    """
    rows = [["layer", "active", *KINDS, "rule = truth"]]
    for entry in summary(layers):
        cells = []
        for kind in KINDS:
            about = entry["kinds"][kind]
            low, high = (100 * end for end in about["interval"])
            ends = f" [{low:.1f}, {high:.1f}]" if intervals else ""
            cells.append(f"{100 * about['share']:.1f} %{ends}")
        truth = entry.get("truth")
        agreed = f"{100 * truth['agreement']:.0f} % of {truth['n']}" if truth else "–"
        rows.append([entry["layer"], f"{entry['n_active']:,}", *cells, agreed])
    return rows


def table_markdown(layers: Sequence[LayerKinds]) -> str:
    """Return the table with intervals in Markdown."""
    head, *body = table_rows(layers, intervals=True)
    rows = [head, ["---"] * len(head), *body]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    note = "Shares of active latents, in brackets Wilson's 95 % intervals."
    decided = [["layer", *SOURCES], ["---"] * (1 + len(SOURCES))]
    for entry in summary(layers):
        decided.append([entry["layer"], *(f"{entry['sources'][name]:,}" for name in SOURCES)])
    lines += ["", note, "", "Active latents by what decided their kind:", ""]
    lines += ["| " + " | ".join(row) + " |" for row in decided]
    return "\n".join(lines) + "\n"


def layers_plot(layers: Sequence[LayerKinds]) -> Figure:
    """Plot the share of each kind among the active latents, one bar per layer."""
    entries = summary(layers)
    with plot_style():
        drawn = figure(1.3 + 0.42 * len(layers), 5.6)
        ax = drawn.subplots()
        left = np.zeros(len(entries))
        for kind in KINDS:
            share = np.array([100 * entry["kinds"][kind]["share"] for entry in entries])
            ax.barh(range(len(entries)), share, left=left, color=COLOURS[kind], label=kind)
            left += share
        ax.set_yticks(range(len(entries)), [entry["layer"] for entry in entries])
        ax.invert_yaxis()
        ax.set_xlim(0, 100)
        ax.set_xlabel("share of active latents, %")
        ax.grid(axis="y", visible=False)
        drawn.legend(loc="outside lower center", ncols=4)
        return drawn


def edges_plot(layers: Sequence[LayerKinds], edges: Sequence[Edge], shown: int = 300) -> Figure:
    """Plot the strongest edges between layers; latents are sorted and coloured by kind.

    Args:
        layers: one column each, from left to right.
        edges: the edges.
        shown: number of edges to draw, the strongest ones.
    """
    strongest = sorted(edges, key=lambda edge: -edge.correlation)[:shown]
    heights = []
    for layer in layers:
        order = np.argsort([KINDS.index(str(kind)) for kind in layer.kind], kind="stable")
        height = np.empty(layer.n_latents)
        height[order] = np.linspace(0, 1, layer.n_latents)
        heights.append(height)
    with plot_style():
        drawn = figure(3.6, 1.2 + 1.5 * len(layers))
        ax = drawn.subplots()
        for edge in strongest:
            ends = heights[edge.layer][edge.latent], heights[edge.layer + 1][edge.next_latent]
            colour = COLOURS[str(layers[edge.layer + 1].kind[edge.next_latent])]
            x = [edge.layer, edge.layer + 1]
            ax.plot(x, ends, color=colour, linewidth=0.6, alpha=0.6)
        for place, (layer, height) in enumerate(zip(layers, heights, strict=True)):
            colours = [COLOURS[str(kind)] for kind in layer.kind]
            ax.scatter([place] * len(height), height, c=colours, s=3, linewidths=0, zorder=3,
                       rasterized=len(height) > 4096)  # fmt: skip
        ax.set_xticks(range(len(layers)), [layer.name for layer in layers])
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.spines["left"].set_visible(False)
        for kind in KINDS:
            ax.scatter([], [], color=COLOURS[kind], s=12, label=kind)
        drawn.legend(loc="outside lower center", ncols=4)
        return drawn


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return out.getvalue()
