"""The plots of the fine-tuning report, each a function from figures to a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sparsight.pages.style import PALETTE, figure, plot_style

KINDS = {
    "clean": "no words",
    "attacked": "another class",
    "same": "own class",
    "control": "nonsense",
}


def accuracy_bars(attack: Mapping[str, Any]) -> Figure:
    """Plot accuracy by the word on the images, before and after, with intervals."""
    with plot_style():
        drawn = figure(2.5)
        ax = drawn.subplots()
        kinds = [kind for kind in KINDS if kind in attack]
        for j, name in enumerate(("before", "after")):
            values = [attack[kind][name]["accuracy"] for kind in kinds]
            ends = [attack[kind][name]["interval"] for kind in kinds]
            errors = [
                [value - low for value, (low, _) in zip(values, ends, strict=True)],
                [high - value for value, (_, high) in zip(values, ends, strict=True)],
            ]
            ax.bar(
                np.arange(len(kinds)) + (j - 0.5) * 0.38,
                values,
                0.34,
                yerr=np.clip(errors, 0, None),
                color=(PALETTE[5], PALETTE[0])[j],
                error_kw={"elinewidth": 1, "capsize": 2, "ecolor": PALETTE[1]},
                label=name,
            )
        ax.set_xticks(range(len(kinds)), [KINDS[kind] for kind in kinds])
        ax.set_ylim(0, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set_ylabel("accuracy")
        ax.set_xlabel("word on the image")
        ax.grid(axis="x", visible=False)
        drawn.legend(loc="outside upper right", ncols=2)
        return drawn


def loss_curves(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the loss and its parts over the steps."""
    names = ("loss", "contrastive", "distillation", "pull", "penalty")
    with plot_style():
        drawn = figure(2.6)
        ax = drawn.subplots()
        for i, name in enumerate(name for name in names if name in log[0]):
            ax.plot(
                [line["step"] for line in log],
                [max(line[name], 1e-6) for line in log],
                color=PALETTE[i],
                linestyle="-" if i == 0 else "--",
                label="all together" if name == "loss" else name,
            )
        ax.set_yscale("log")
        ax.set_xlabel("optimiser step")
        ax.set_ylabel("nats, or 1 − cosine")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        drawn.legend(loc="outside lower center", ncols=3)
        return drawn


def gradient_norms(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the norm of each layer's gradient over the steps: rows are layers, light is large."""
    layers = list(log[-1]["gradient_norms"])
    order = [layer for layer in layers if layer.startswith("visual.")]
    order += [layer for layer in layers if layer.startswith("text.")]
    order += [layer for layer in layers if layer not in order]
    values = np.array(
        [[line["gradient_norms"].get(layer, np.nan) for line in log] for layer in order]
    )
    shown = np.log10(np.where(values > 0, values, np.nan))
    steps = [line["step"] for line in log]
    with plot_style():
        drawn = figure(max(1.6, 0.5 + 0.19 * len(order)))
        ax = drawn.subplots()
        grid = ax.imshow(
            shown,
            aspect="auto",
            interpolation="nearest",
            cmap="viridis",
            extent=(0, steps[-1], len(order) - 0.5, -0.5),
        )
        ax.set_yticks(range(len(order)), [name.replace("_", " ") for name in order])
        ax.set_xlabel("optimiser step")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.grid(visible=False)
        ax.tick_params(length=0)
        bar = drawn.colorbar(grid, ax=ax, pad=0.02, aspect=28)
        bar.set_label("log₁₀ of the norm")
        bar.ax.yaxis.set_major_locator(MaxNLocator(5))
        bar.outline.set_visible(False)
        return drawn


def learning(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the learning rate's factor, the logit scale and the gradient norm over the steps."""
    panels = [
        ("lr_factor", "learning rate, relative to its peak"),
        ("logit_scale", "logit scale"),
        ("gradient_norm", "gradient norm"),
    ]
    with plot_style():
        drawn = figure(0.5 + 1.05 * len(panels))
        axes = drawn.subplots(len(panels), 1, sharex=True)
        for i, (ax, (key, title)) in enumerate(zip(axes, panels, strict=True)):
            ax.plot([line["step"] for line in log], [line[key] for line in log], color=PALETTE[i])
            ax.set_title(title, loc="left")
            ax.yaxis.set_major_locator(MaxNLocator(3))
            if key != "logit_scale":
                ax.set_ylim(bottom=0)
        axes[-1].set_xlabel("optimiser step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return drawn


def latent_effects(latents: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot how strongly text-salient latents respond to words, before and after."""
    with plot_style():
        drawn = figure(0.7 + 0.2 * len(latents))
        ax = drawn.subplots()
        rows = np.arange(len(latents))
        before = [each["effect_before"] for each in latents]
        after = [each["effect_after"] for each in latents]
        ax.hlines(rows, before, after, color=PALETTE[5], linewidth=1)
        ax.scatter(before, rows, color=PALETTE[5], s=22, label="before", zorder=3)
        ax.scatter(after, rows, color=PALETTE[0], s=22, label="after", zorder=3)
        ax.axvline(0, color=PALETTE[5], linewidth=0.8)
        ax.set_yticks(rows, [f"latent {each['latent']}" for each in latents])
        ax.invert_yaxis()
        ax.set_xlabel("activation with minus without the word")
        ax.grid(axis="y", visible=False)
        drawn.legend(loc="outside upper right", ncols=2)
        return drawn
