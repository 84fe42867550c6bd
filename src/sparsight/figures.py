"""Every figure about an SAE: its key, label, gloss, format, direction and range, in one tuple.

A new metric is two edits: the line that computes it, and its `Figure` in `FIGURES`. The log of
training, the terminal, the report, the model card, the table of a sweep and the table in
docs/concepts/metrics.md read it here. `training` and `pages`, which are below `evaluation`, read it
too, so this is one of the modules that all rooms share.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Place = Literal["log", "card", "headline", "table", "sweep", "pareto"]
"""Where a figure is shown: in a line of training and its curves (`log`), on a model card as the
last line of the log (`card`), among the first figures in a terminal (`headline`), in the tables of
one SAE (`table`), in those of a sweep with an interval over seeds (`sweep`), or over L0 (`pareto`).
"""

NOT_MEASURED = "not measured"

BASELINES = {"untrained": "untrained SAE", "pca": "PCA", "neurons": "neurons", "kmeans": "k-means"}
"""What an SAE's figures are compared with, by its key in `metrics.json`."""

_ANY = "*"


def rounded(value: Any) -> str:
    """Write a number with three digits."""
    if not is_number(value):
        return NOT_MEASURED if value is None else str(value)
    if value == 0 or abs(value) >= 1e4:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if abs(value) >= 1e-3 else f"{value:.1e}"


def percent(value: Any) -> str:
    """Write a share as a percentage."""
    if not is_number(value):
        return NOT_MEASURED
    share = 100 * value
    return f"{share:.1f} %" if share >= 0.05 or share == 0 else f"{share:.2g} %"


def count(value: Any) -> str:
    """Write a whole number with separators between thousands."""
    return f"{value:,.0f}" if is_number(value) else NOT_MEASURED


def interval(scores: Any, show: Callable[[Any], str] | None = None) -> str:
    """Write a 95 % interval, in per cent unless `show` says otherwise; empty if there is none."""
    bounds = scores.get("interval") if isinstance(scores, Mapping) else None
    if not bounds or len(bounds) != 2:
        return ""
    if show is not None:
        return f"{show(bounds[0])}–{show(bounds[1])}"
    return f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f} %"


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def dig(metrics: Any, path: str) -> Any:
    """Return the value at a dotted path into nested mappings; None if nothing is there."""
    for key in path.split("."):
        if not isinstance(metrics, Mapping):
            return None
        metrics = metrics.get(key)
    return metrics


@dataclass(frozen=True)
class Figure:
    """One number about an SAE.

    Attributes:
        key: dotted path in `metrics.json`, or the key in a line of the log or a row of a sweep; `*`
            stands for one of `variants`, or for any attribute.
        label: its name in tables.
        gloss: what it says, in a sentence or two.
        show: its format.
        better: which direction is better; None if neither is.
        range: the lowest and the highest possible value; intervals are cut there.
        unit: its unit; empty for a ratio.
        short: its name where space is short; default: the label.
        term: the entry of the report's glossary that explains it, which is the gloss of the first
            figure with that term.
        places: where it is shown.
        variants: what `*` in the key stands for, the most important first.
    """

    key: str
    label: str
    gloss: str
    show: Callable[[Any], str] = rounded
    better: Literal["lower", "higher"] | None = None
    range: tuple[float, float] = (0.0, math.inf)
    unit: str = ""
    short: str = ""
    term: str = ""
    places: tuple[Place, ...] = ()
    variants: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The shortest name."""
        return self.short or self.label

    @property
    def is_share(self) -> bool:
        """Whether it is shown as a percentage."""
        return self.show is percent

    @property
    def axis(self) -> str:
        """The label of an axis, with the unit."""
        unit = "%" if self.is_share else self.unit
        return f"{self.label} ({unit})" if unit else self.label

    def at(self, variant: str) -> Figure:
        """Return the figure of one variant."""
        key = self.key.replace(_ANY, variant)
        return dataclasses.replace(self, key=key, label=f"{self.label}, {variant}", variants=())

    def of(self, metrics: Any) -> Any:
        """Return the figure's value in `metrics`; None if it was not measured."""
        return dig(metrics, self.key)

    def shown(self, metrics: Any) -> str:
        """Write the figure's value in `metrics`."""
        return self.show(self.of(metrics))

    def precise(self, value: Any) -> str:
        """Write the value with one digit more than `show` does."""
        if not is_number(value):
            return self.show(value)
        return f"{100 * value:.3g} %" if self.is_share else f"{value:.4g}"


REPLACEMENTS = ("original", "reconstructed", "mean", "zero")
"""What replaces a site's activations, in `zero_shot` and `contrastive`."""

_SHARE = (0.0, 1.0)

FIGURES: tuple[Figure, ...] = (
    Figure(
        "vectors", "vectors", "Number of activation vectors used in training so far.",
        count,
        places=("card",),
    ),
    Figure(
        "fvu", "FVU",
        "Fraction of variance unexplained: the squared error of the reconstruction divided by the "
        "variance of the activations, over the whole data set. 0 is perfect; 1 is no better than "
        "the mean.",
        better="lower", term="FVU",
        places=("log", "card", "headline", "table", "sweep", "pareto"),
    ),
    Figure(
        "fvu_cls", "FVU of CLS", "FVU of the CLS position alone, centred on its own mean.",
        better="lower", term="FVU", places=("headline", "table", "sweep"),
    ),
    Figure(
        "fvu_patches", "FVU of patches", "FVU of the patches alone, centred on their own mean.",
        better="lower", term="FVU", places=("headline", "table", "sweep"),
    ),
    Figure(
        "explained_variance", "explained variance", "One minus the FVU.",
        better="higher", range=(-math.inf, 1.0),
    ),
    Figure(
        "fvu_batch", "FVU within a batch",
        "FVU of each batch, averaged over batches; it depends on the batch size.",
        better="lower",
    ),
    Figure(
        "cosine", "cosine", "Mean cosine between an activation vector and its reconstruction.",
        better="higher", range=(-1.0, 1.0), places=("table", "sweep"),
    ),
    Figure(
        "mse", "MSE", "Mean squared error over vectors and dimensions.",
        better="lower", places=("table",),
    ),
    Figure(
        "relative_bias", "relative bias",
        "Shrinkage of the reconstruction: its mean square divided by its mean product with the "
        "vector; 1 means that there is no shrinkage.",
        range=(-math.inf, math.inf), places=("table",),
    ),
    Figure(
        "clipscope_ev", "explained variance (CLIP-Scope)",
        "CLIP-Scope's explained variance, which centres a vector on the mean of its own entries.",
        better="higher", range=(-math.inf, 1.0), places=("table",),
    ),
    Figure(
        "clipscope_mse", "MSE (CLIP-Scope)",
        "CLIP-Scope's mean squared error, summed over the dimensions of a vector.",
        better="lower", places=("table",),
    ),
    Figure(
        "clipscope_dead", "dead (CLIP-Scope)",
        "Share of latents that CLIP-Scope counts as dead.",
        percent, "lower", _SHARE,
    ),
    Figure(
        "l0", "L0", "Mean number of latents that are active on a vector.",
        better="lower", unit="latents per vector", term="L0",
        places=("log", "card", "headline", "table", "sweep"),
    ),
    Figure(
        "l0_cls", "L0 of CLS", "L0 of the CLS position alone.",
        better="lower", unit="latents per vector", term="L0", places=("table",),
    ),
    Figure(
        "l0_patches", "L0 of patches", "L0 of the patches alone.",
        better="lower", unit="latents per vector", term="L0", places=("table",),
    ),
    Figure(
        "dead", "dead latents",
        "Share of latents that were never active in the last N vectors; N is shown next to it.",
        percent, "lower", _SHARE, short="dead", term="dead",
        places=("log", "card", "headline", "table", "sweep"),
    ),
    Figure(
        "loss", "loss", "What training minimises, including penalties.",
        better="lower", range=(-math.inf, math.inf), places=("card",),
    ),
    Figure(
        "vectors_per_second", "vectors per second", "Speed of training.", count,
        "higher", short="vectors/s",
    ),
    Figure(
        "zero_shot.*.top1", "zero-shot top-1",
        "The model's own classification by text, with the activations at this site replaced by "
        "their reconstruction, by their mean, or by zero. The accuracy with the reconstruction "
        "should be close to the original and far above the other two.",
        percent, "higher", _SHARE, short="top-1", term="zero-shot",
        places=("headline", "table"), variants=REPLACEMENTS,
    ),
    Figure(
        "accuracy", "zero-shot accuracy",
        "Zero-shot top-1 accuracy with reconstructed activations at the site.",
        percent, "higher", _SHARE, short="accuracy", term="zero-shot",
        places=("sweep", "pareto"),
    ),
    Figure(
        "zero_shot.*.top5", "zero-shot top-5",
        "Share of images whose own class is among the best five.",
        percent, "higher", _SHARE, short="top-5", variants=REPLACEMENTS,
    ),
    Figure(
        "zero_shot.*.kl", "KL",
        "Divergence of the class probabilities from those of the original model, in nats.",
        better="lower", term="KL", variants=REPLACEMENTS,
    ),
    Figure(
        "contrastive.*.loss", "contrastive loss",
        "Contrastive loss of images and their captions, in nats: how well the model still pairs "
        "them within a batch.",
        better="lower", short="loss", term="loss", places=("table",), variants=REPLACEMENTS,
    ),
    Figure(
        "truth.*.auc", "AUC",
        "How well the activation of the single best latent separates images with an attribute from "
        "those without. The latent is chosen on one half of the images and scored on the other. "
        "0.5 is chance.",
        better="higher", range=_SHARE, term="AUC",
    ),
    Figure(
        "truth.*.f1", "F1",
        "Harmonic mean of the precision and recall of that latent, at the threshold that is best "
        "on the first half.",
        better="higher", range=_SHARE, term="F1",
    ),
    Figure(
        "truth.*.iou", "IoU",
        "Overlap of that latent's heatmap, above a threshold, with the patches that really show "
        "the attribute: intersection over union of patches.",
        better="higher", range=_SHARE, term="IoU",
    ),
    Figure(
        "truth.*.iou_everywhere", "all patches",
        "IoU of a heatmap that covers the whole image: the score that an attribute gets just for "
        "being large.",
        range=_SHARE, term="all patches",
    ),
)  # fmt: skip
"""All figures, in the order of tables."""

_BY_KEY = {figure.key: figure for figure in FIGURES}

TRUTH_SCORES = ("auc", "f1", "iou")
"""Scores of the best latent for an attribute, in `truth` and `truth_summary`."""


def figure_of(key: str) -> Figure:
    """Return the figure with a key."""
    return _BY_KEY[key]


def shown_in(place: Place) -> tuple[Figure, ...]:
    """Return the figures of a place, in order; a sweep has the headlines first."""
    found = [figure for figure in FIGURES if place in figure.places]
    if place == "sweep":
        found.sort(key=lambda figure: "headline" not in figure.places)
    return tuple(found)


def truth_score(score: str) -> Figure:
    """Return the figure of AUC, F1 or IoU."""
    return figure_of(f"truth.{_ANY}.{score}")


def glossary(*terms: str) -> dict[str, str]:
    """Return what terms mean: for each, the gloss of the first figure that has it.

    Args:
        terms: the terms; all by default, in the order of the tuple.
    """
    found: dict[str, str] = {}
    for figure in FIGURES:
        if figure.term:
            found.setdefault(figure.term, figure.gloss)
    return {term: found[term] for term in terms} if terms else found
