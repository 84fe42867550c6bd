"""`metrics.json` as the tiles and tables of the report: every score beside its baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Metrics = Mapping[str, Any]

BASELINES = {"untrained": "untrained SAE", "pca": "PCA", "neurons": "neurons", "kmeans": "k-means"}
REPLACEMENTS = {"mean": "mean instead", "zero": "zero instead"}
TRUTH_SCORES = {"auc": "AUC", "f1": "F1", "iou": "IoU"}
EVERYWHERE = "iou_everywhere"
ALL_PATCHES = "all patches"
NOT_MEASURED = "not measured"
CLS_WORSE = 2.0
"""From this ratio to the patches' FVU on, a worse FVU of CLS is pointed out."""

GLOSSARY: dict[str, str] = {
    "FVU": "Fraction of variance unexplained: squared error of the reconstruction over the "
    "variance of the activations, over the whole data set. 0 is perfect, 1 is no better than the "
    "mean.",
    "L0": "Mean number of latents that are active on a vector.",
    "vector": "One activation vector: one position of one image at one site.",
    "dead": "Share of latents that were not active once in the last N vectors; N stands beside it.",
    "density": "Share of vectors on which a latent is active.",
    "mean activation": "Mean of a latent's activation over the vectors on which it is active.",
    "label entropy": "How mixed the labels of a latent's strongest images are, weighted by "
    "activation, in nats. 0: all of one label. Not given under 10 labelled images.",
    "zero-shot": "The model's own classification by text, with the activations at this site "
    "replaced by their reconstruction, by their mean, or by zero. Reconstruction should be close "
    "to the original and far above the other two.",
    "AUC": "How well the activation of the single best latent tells images with an attribute from "
    "those without. Chosen on one half of the images, scored on the other. 0.5 is chance.",
    "F1": "Harmonic mean of precision and recall of that latent at the best threshold of the first "
    "half.",
    "IoU": "Overlap of that latent's heatmap, above a threshold, with where the attribute truly "
    "is: intersection over union of patches.",
    "all patches": "IoU of a heatmap that is lit everywhere: what an attribute scores for being "
    "large.",
    "KL": "Divergence of the classes' probabilities from the original's, in nats.",
    "loss": "Contrastive loss of pictures and their captions, in nats: how well the model still "
    "pairs them within a batch.",
    "untrained SAE": "An SAE of the same shape with its starting weights. What it scores comes "
    "from the architecture, not from learning.",
    "PCA": "Principal components, as many as the SAE has active latents.",
    "neurons": "The dimensions of the activations themselves, without an SAE.",
    "heatmap": "Activation of the latent at every patch, laid over what the model saw: dark where "
    "it is not active, clear at the strongest patch on the card.",
    "quantiles": "Images that activate the latent, in order of strength, cut into equally large "
    "bands; drawn at random from each.",
}


@dataclass(frozen=True)
class Beside:
    """A baseline's figure under a tile."""

    name: str
    value: str


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    name: str
    term: str
    value: str
    beside: tuple[Beside, ...]
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str
    term: str
    cells: tuple[str, ...]
    strong: bool = False
    """Whether all of it stands out."""
    group: str = ""
    """Heading above it, where a group of rows begins."""


@dataclass(frozen=True)
class Table:
    """A table: the first column names the rows; `columns` head the cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    strong: int = 0
    """Column that stands out: the SAE's own."""


def tiles(metrics: Metrics) -> list[Tile]:
    """The five figures by which an SAE is judged first; "not measured" where one is not there."""
    shot = metrics.get("zero_shot") or {}
    kinds = truth_by_kind(metrics)
    kind = "symbol" if "symbol" in kinds else next(iter(kinds), None)
    window = metrics.get("dead_window")
    made = [
        Tile(
            "FVU",
            "FVU",
            figure(metrics.get("fvu")),
            _beside(metrics, "fvu"),
            "; ".join(_about_fvu(metrics)),
        ),
        Tile("L0", "L0", figure(metrics.get("l0")), _beside(metrics, "l0"), "latents a vector"),
        Tile(
            "Dead latents",
            "dead",
            percent(metrics.get("dead")),
            _beside(metrics, "dead", percent),
            f"of the last {count(window)} vectors" if window else "",
        ),
    ]
    if shot:
        others = [
            ("original", shot.get("original") or {}),
            *((name, _variant(block, "reconstructed")[0]) for name, block in baselines(metrics)),
            (REPLACEMENTS["zero"], shot.get("zero") or {}),
        ]
        made.append(
            Tile(
                "Zero-shot top-1",
                "zero-shot",
                percent(dig(shot, "reconstructed.top1")),
                tuple(Beside(name, percent(of["top1"])) for name, of in others if "top1" in of),
                interval(shot.get("reconstructed")),
            )
        )
    if kind is not None:
        made.append(
            Tile(
                f"Mean AUC, {kinds[kind]['n']} {kind.replace('_', ' ')}s",
                "AUC",
                figure(kinds[kind].get("auc")),
                tuple(
                    Beside(name, figure(truth_by_kind(block).get(kind, {}).get("auc")))
                    for name, block in baselines(metrics)
                    if truth_by_kind(block)
                ),
                interval(dig(metrics, f"truth_summary.{kind}.auc"), figure)
                or "best single latents, held-out images",
            )
        )
    return made


def measured_on(metrics: Metrics) -> str:
    """A sentence that says whether the figures are of the training data; "" if it is not known."""
    same = metrics.get("trained_on_these")
    if same is None:
        return ""
    if same:
        return "Measured on the training data: on new images an SAE does somewhat worse."
    if metrics.get("held_out"):
        return "Measured on held-out images, which the SAE was not trained on."
    return "Measured on images that the SAE was not trained on."


def cls_warning(metrics: Metrics) -> str:
    """A sentence where the FVU over all positions hides that CLS is reconstructed much worse."""
    cls, patches = metrics.get("fvu_cls"), metrics.get("fvu_patches")
    if cls is None or patches is None or cls < CLS_WORSE * patches:
        return ""
    return (
        f"CLS is reconstructed far worse (FVU {figure(cls)}) than the patches ({figure(patches)}), "
        "which outnumber it: before you read CLS latents, train on CLS alone."
    )


def _about_fvu(metrics: Metrics) -> Iterator[str]:
    """What stands under the tile of the FVU."""
    if n_vectors := metrics.get("n_vectors"):
        yield f"{count(n_vectors)} vectors"
    if metrics.get("fvu_cls") is not None:
        yield f"CLS {figure(metrics['fvu_cls'])}, patches {figure(metrics.get('fvu_patches'))}"
    if (same := metrics.get("trained_on_these")) is not None:
        other = "held-out" if metrics.get("held_out") else "other"
        yield "measured on the training data" if same else f"measured on {other} images"


def reconstruction_table(metrics: Metrics) -> Table | None:
    """Reconstruction, sparsity and life, with the baselines."""
    lines: list[tuple[str, str, str, Callable[[Any], str]]] = [
        ("FVU", "FVU", "fvu", figure),
        ("FVU of CLS", "FVU", "fvu_cls", figure),
        ("FVU of patches", "FVU", "fvu_patches", figure),
        ("cosine", "", "cosine", figure),
        ("MSE", "", "mse", figure),
        ("relative bias", "", "relative_bias", figure),
        ("explained variance (CLIP-Scope)", "", "clipscope_ev", figure),
        ("MSE (CLIP-Scope)", "", "clipscope_mse", figure),
        ("dead (CLIP-Scope)", "", "clipscope_dead", percent),
        ("L0", "L0", "l0", figure),
        ("L0 of CLS", "L0", "l0_cls", figure),
        ("L0 of patches", "L0", "l0_patches", figure),
        ("dead latents", "dead", "dead", percent),
    ]
    blocks = [("SAE", metrics), *baselines(metrics)]
    blocks = [(name, block) for name, block in blocks if any(line[2] in block for line in lines)]
    rows = tuple(
        Row(name, term, tuple(show(block.get(key)) for _, block in blocks))
        for name, term, key, show in lines
        if any(block.get(key) is not None for _, block in blocks)
    )
    if not rows:
        return None
    n = metrics.get("n_vectors")
    return Table(
        "Reconstruction and sparsity",
        tuple(name for name, _ in blocks),
        rows,
        " ".join(
            part
            for part in (
                f"Over {count(n)} vectors, in the units of the activations." if n else "",
                measured_on(metrics),
                cls_warning(metrics),
            )
            if part
        ),
    )


def downstream_table(metrics: Metrics) -> Table | None:
    """What the model still does with the site replaced, by the SAE and by other things."""
    lines: list[tuple[str, str, Metrics, Metrics]] = []
    for key, name in (("original", "original"), ("reconstructed", "SAE")):
        lines.append((name, "", *_variant(metrics, key)))
    lines += [(name, name, *_variant(block, "reconstructed")) for name, block in baselines(metrics)]
    lines += [(name, "", *_variant(metrics, key)) for key, name in REPLACEMENTS.items()]
    lines = [line for line in lines if line[2] or line[3]]
    if not lines:
        return None
    columns: list[tuple[str, Callable[[Metrics, Metrics], str]]] = [
        ("top-1", lambda shot, _: percent(shot.get("top1"))),
        ("95 % interval", lambda shot, _: interval(shot)),
        ("top-5", lambda shot, _: percent(shot.get("top5"))),
        ("KL", lambda shot, _: figure(shot.get("kl"))),
        ("loss", lambda _, contrastive: figure(contrastive.get("loss"))),
    ]
    columns = [
        (name, show)
        for name, show in columns
        if any(show(shot, contrastive) not in ("", NOT_MEASURED) for *_, shot, contrastive in lines)
    ]
    rows = tuple(
        Row(
            name,
            term,
            tuple(show(shot, contrastive) or NOT_MEASURED for _, show in columns),
            strong=name == "SAE",
        )
        for name, term, shot, contrastive in lines
    )
    n, classes = dig(metrics, "zero_shot.original.n"), dig(metrics, "zero_shot.original.n_classes")
    note = f"Zero-shot on {count(n)} images" if n else ""
    note += f", {count(classes)} classes" if n and classes else ""
    return Table(
        "The model with this site replaced",
        tuple(name for name, _ in columns),
        rows,
        note and f"{note}.",
        strong=-1,
    )


def _variant(block: Metrics, name: str) -> tuple[Metrics, Metrics]:
    """Zero-shot and contrastive figures of one replacement; {} where there are none."""
    return (dig(block, f"zero_shot.{name}") or {}, dig(block, f"contrastive.{name}") or {})


def truth_table(metrics: Metrics) -> Table | None:
    """Mean scores of the best single latents over every kind of attribute, beside baselines."""
    blocks = [("SAE", metrics), *baselines(metrics)]
    found = [(name, truth_by_kind(block)) for name, block in blocks]
    found = [(name, kinds) for name, kinds in found if kinds]
    if not found or found[0][0] != "SAE":
        return None
    kinds = found[0][1]
    everywhere = any(summary.get(EVERYWHERE) is not None for summary in kinds.values())
    rows: list[Row] = []
    for kind, summary in kinds.items():
        group = f"{kind.replace('_', ' ')} · {summary['n']}"
        for score, title in TRUTH_SCORES.items():
            if summary.get(score) is None:
                continue
            cells = [figure(own.get(kind, {}).get(score)) for _, own in found]
            if everywhere:
                cells.append(figure(summary.get(EVERYWHERE)) if score == "iou" else "")
            rows.append(Row(title, title, tuple(cells), group=group))
            group = ""
    columns = [name for name, _ in found] + ([ALL_PATCHES] if everywhere else [])
    note = "Means of the best single latents: chosen on half of the images, scored on the rest."
    return Table("Known attributes", tuple(columns), tuple(rows), note)


def attribute_table(metrics: Metrics) -> Table | None:
    """The best latent of every attribute."""
    truth = metrics.get("truth") or {}
    blocks = [(name, block["truth"]) for name, block in baselines(metrics) if block.get("truth")]
    rows = tuple(
        Row(
            attribute,
            "",
            (
                str(scores.get("latent", "–")),
                *(figure(scores.get(score)) for score in TRUTH_SCORES),
                *(figure(dig(block.get(attribute) or {}, "auc")) for _, block in blocks),
            ),
        )
        for attribute, scores in truth.items()
        if isinstance(scores, Mapping)
    )
    if not rows:
        return None
    columns = ("latent", *TRUTH_SCORES.values(), *(f"AUC, {name}" for name, _ in blocks))
    return Table(f"All {len(rows)} attributes", columns, rows, strong=1)


def not_measured(metrics: Metrics) -> list[str]:
    """Families of scores that `metrics.json` lacks, with the reason where it gives one."""
    omitted = metrics.get("omitted") or {}
    families = {
        "baselines": ("Baselines", "`sparsight evaluate` measures them by default."),
        "zero_shot": ("Zero-shot accuracy", "it takes the model and labelled images."),
        "truth": ("Known attributes", "they are known for calibration images alone."),
    }
    return [
        f"{name}: not measured; {omitted.get(family) or reason}"
        for family, (name, reason) in families.items()
        if not metrics.get(family)
    ]


def truth_by_kind(block: Metrics) -> dict[str, dict[str, Any]]:
    """Means over the attributes of each kind, `n` of them, of what was measured."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for attribute, scores in (block.get("truth") or {}).items():
        if isinstance(scores, Mapping):
            kinds.setdefault(attribute.split("/")[0], []).append(scores)
    return {
        kind: {"n": len(rows)}
        | {score: _mean(row.get(score) for row in rows) for score in (*TRUTH_SCORES, EVERYWHERE)}
        for kind, rows in kinds.items()
    }


def baselines(metrics: Metrics) -> list[tuple[str, Metrics]]:
    """Name and figures of each baseline that was measured."""
    found = metrics.get("baselines") or {}
    return [
        (BASELINES.get(name, name), block)
        for name, block in sorted(found.items(), key=lambda item: _place(item[0]))
        if isinstance(block, Mapping)
    ]


def dig(metrics: Any, path: str) -> Any:
    """The value at a dotted path, None if there is none."""
    for key in path.split("."):
        if not isinstance(metrics, Mapping):
            return None
        metrics = metrics.get(key)
    return metrics


def figure(value: Any) -> str:
    """A number to three digits."""
    if not _is_number(value):
        return NOT_MEASURED if value is None else str(value)
    if value == 0 or abs(value) >= 1e4:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if abs(value) >= 1e-3 else f"{value:.1e}"


def percent(value: Any) -> str:
    """A share as a percentage."""
    if not _is_number(value):
        return NOT_MEASURED
    share = 100 * value
    return f"{share:.1f} %" if share >= 0.05 or share == 0 else f"{share:.2g} %"


def count(value: Any) -> str:
    """A whole number with thousands apart."""
    return f"{value:,.0f}" if _is_number(value) else NOT_MEASURED


def interval(scores: Any, show: Callable[[Any], str] | None = None) -> str:
    """A 95 % interval, in per cent unless `show` says otherwise; empty where there is none."""
    bounds = scores.get("interval") if isinstance(scores, Mapping) else None
    if not bounds or len(bounds) != 2:
        return ""
    if show is not None:
        return f"{show(bounds[0])}–{show(bounds[1])}"
    return f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f} %"


def _beside(metrics: Metrics, key: str, show: Callable[[Any], str] = figure) -> tuple[Beside, ...]:
    return tuple(
        Beside(name, show(block[key]))
        for name, block in baselines(metrics)
        if block.get(key) is not None
    )


def _place(name: str) -> int:
    names = list(BASELINES)
    return names.index(name) if name in names else len(names)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mean(values: Any) -> float | None:
    known = [float(value) for value in values if _is_number(value)]
    return math.fsum(known) / len(known) if known else None
