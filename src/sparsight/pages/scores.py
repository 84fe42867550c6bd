"""`metrics.json` as tiles and tables of the report: every score next to its baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sparsight.figures import (
    BASELINES,
    FIGURES,
    NOT_MEASURED,
    TRUTH_SCORES,
    Figure,
    count,
    dig,
    figure_of,
    glossary,
    interval,
    is_number,
    rounded,
    shown_in,
    truth_score,
)
from sparsight.pages.tables import Beside, Row, Table, Tile

Metrics = Mapping[str, Any]

REPLACEMENTS = {"mean": "mean instead", "zero": "zero instead"}
EVERYWHERE = "iou_everywhere"
CLS_WORSE = 2.0
"""A warning appears if the FVU of CLS is at least this many times that of the patches."""

GLOSSARY: dict[str, str] = {
    **glossary("FVU", "L0"),
    "vector": "One activation vector: one position of one image at one site.",
    **glossary("dead"),
    "density": "Share of vectors on which a latent is active.",
    "mean activation": "Mean of a latent's activation over the vectors on which it is active.",
    "label share": "Share of its most frequent label among a latent's strongest images, weighted "
    "by activation.",
    **glossary("zero-shot", "AUC", "F1", "IoU", "all patches"),
    **glossary(),
    "untrained SAE": "An SAE of the same shape with its initial weights. Its score comes "
    "from the architecture, not from learning.",
    "PCA": "The first principal components, as many as the SAE has active latents per vector.",
    "neurons": "The dimensions of the activations themselves, without an SAE.",
    "outline": "It encloses the region in which a latent reaches at least half of its strongest "
    "activation in that image. The image is shown as the model saw it: scaled and cropped.",
    "decoder row": "The direction in the activations that a latent stands for; latents with "
    "similar rows mean similar things.",
    "quantiles": "The images that activate the latent, sorted by strength and split into equal "
    "bands; from each band, a random sample.",
}


def tiles(metrics: Metrics, n_latents: int | None = None, k: int | None = None) -> list[Tile]:
    """Return the headline figures of an SAE; "not measured" for a missing one.

    Args:
        metrics: contents of `metrics.json`.
        n_latents: number of latents of the SAE.
        k: number of active latents per vector, if the sparsity sets it; an L0 that is always k has
            no tile.
    """
    shot = metrics.get("zero_shot") or {}
    kinds = truth_by_kind(metrics)
    kind = "symbol" if "symbol" in kinds else next(iter(kinds), None)
    window = metrics.get("dead_window")
    top1 = figure_of("zero_shot.*.top1")
    made = [_tile(metrics, "fvu", "; ".join(_about_fvu(metrics)))]
    if metrics.get("fvu_cls") is not None:
        made.append(_tile(metrics, "fvu_cls", "the CLS position alone, on its own mean"))
    if k is None or not is_number(metrics.get("l0")) or abs(metrics["l0"] - k) > 1e-3:
        made.append(_tile(metrics, "l0", "latents per vector"))
    of = f"of {count(n_latents)} latents" if n_latents else "of the latents"
    silent = f"{of}: never active in the last {count(window)} vectors" if window else of
    made.append(_tile(metrics, "dead", silent))
    if shot:
        others = [
            ("original", shot.get("original") or {}),
            *((name, _variant(block, "reconstructed")[0]) for name, block in baselines(metrics)),
            (REPLACEMENTS["zero"], shot.get("zero") or {}),
        ]
        made.append(
            Tile(
                _capitalised(top1.label),
                top1.term,
                top1.show(dig(shot, "reconstructed.top1")),
                tuple(Beside(name, top1.show(of["top1"])) for name, of in others if "top1" in of),
                interval(shot.get("reconstructed")),
            )
        )
    if kind is not None:
        made.append(
            Tile(
                f"Mean AUC, {kinds[kind]['n']} {kind.replace('_', ' ')}s",
                "AUC",
                rounded(kinds[kind].get("auc")),
                tuple(
                    Beside(name, rounded(truth_by_kind(block).get(kind, {}).get("auc")))
                    for name, block in baselines(metrics)
                    if truth_by_kind(block)
                ),
                interval(dig(metrics, f"truth_summary.{kind}.auc"), rounded)
                or "best single latents, held-out images",
            )
        )
    return made


def measured_on(metrics: Metrics) -> str:
    """Say in a sentence whether the figures are from the training data; "" if unknown."""
    same = metrics.get("trained_on_these")
    if same is None:
        return ""
    if same:
        return "Measured on the training data; on new images an SAE does somewhat worse."
    if metrics.get("held_out"):
        return "Measured on held-out images, which the SAE was not trained on."
    return "Measured on images that the SAE was not trained on."


def cls_warning(metrics: Metrics) -> str:
    """Warn in a sentence if the overall FVU hides that CLS is reconstructed much worse."""
    cls, patches = metrics.get("fvu_cls"), metrics.get("fvu_patches")
    if cls is None or patches is None or cls < CLS_WORSE * patches:
        return ""
    return (
        f"CLS is reconstructed far worse (FVU {rounded(cls)}) than the patches "
        f"({rounded(patches)}), which outnumber it: before you read CLS latents, train on CLS "
        "alone."
    )


def _about_fvu(metrics: Metrics) -> Iterator[str]:
    """Yield the notes under the tile of the FVU."""
    if n_vectors := metrics.get("n_vectors"):
        yield f"{count(n_vectors)} vectors"
    if metrics.get("fvu_patches") is not None:
        yield f"patches alone {rounded(metrics['fvu_patches'])}"
    if (same := metrics.get("trained_on_these")) is not None:
        other = "held-out" if metrics.get("held_out") else "other"
        yield "measured on the training data" if same else f"measured on {other} images"


def reconstruction_table(metrics: Metrics) -> Table | None:
    """Tabulate reconstruction, sparsity and dead latents, with the baselines."""
    lines = [each for each in shown_in("table") if not each.variants]
    blocks = [("SAE", metrics), *baselines(metrics)]
    blocks = [(name, block) for name, block in blocks if any(line.key in block for line in lines)]
    rows = tuple(
        Row(
            line.label,
            line.term,
            tuple(line.show(line.of(block)) for _, block in blocks),
            best=best([line.of(block) for _, block in blocks], line),
        )
        for line in lines
        if any(line.of(block) is not None for _, block in blocks)
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


def sites_table(runs: Sequence[tuple[str, Metrics]]) -> Table | None:
    """Tabulate the main figures of several SAEs, one row each; None if nothing was measured.

    Args:
        runs: heading and figures of each.
    """
    columns: list[tuple[str, Callable[[Metrics], str]]] = [("FVU", figure_of("fvu").shown)]
    for key, name in BASELINES.items():
        columns.append((f"FVU, {name}", _baseline_cell(key)))
    for key in ("fvu_cls", "fvu_patches", "l0", "dead"):
        columns.append((figure_of(key).label, figure_of(key).shown))
    for variant in ("original", "reconstructed"):
        figure = figure_of("zero_shot.*.top1").at(variant)
        columns.append((figure.label, figure.shown))
    columns = [
        (name, show)
        for name, show in columns
        if any(show(metrics) != NOT_MEASURED for _, metrics in runs)
    ]
    if not columns:
        return None
    return Table(
        "Sites side by side",
        tuple(name for name, _ in columns),
        tuple(Row(name, "", tuple(show(of) for _, show in columns)) for name, of in runs),
        "Sites differ in how hard their activations are to reconstruct: compare each SAE with its "
        "own baselines first. "
        + " ".join(dict.fromkeys(text for _, of in runs if (text := measured_on(of)))),
    )


def _baseline_cell(key: str) -> Callable[[Metrics], str]:
    figure = figure_of("fvu")
    return lambda metrics: figure.show(figure.of(dig(metrics, f"baselines.{key}")))


def downstream_table(metrics: Metrics) -> Table | None:
    """Tabulate what the model can still do with the site replaced, by the SAE or otherwise."""
    lines: list[tuple[str, str, Metrics, Metrics]] = []
    for key, name in (("original", "original"), ("reconstructed", "SAE")):
        lines.append((name, "", *_variant(metrics, key)))
    lines += [(name, name, *_variant(block, "reconstructed")) for name, block in baselines(metrics)]
    lines += [(name, "", *_variant(metrics, key)) for key, name in REPLACEMENTS.items()]
    lines = [line for line in lines if line[2] or line[3]]
    if not lines:
        return None
    columns: list[tuple[str, Callable[[Metrics, Metrics], str], Figure | None]] = []
    for each in FIGURES:
        if each.variants:
            columns.append((each.name, _downstream_cell(each), each))
        if each.key == "zero_shot.*.top1":
            columns.append(("95 % interval", lambda shot, _: interval(shot), None))
    columns = [
        column
        for column in columns
        if any(column[1](*line[2:]) not in ("", NOT_MEASURED) for line in lines)
    ]
    winners = {
        (line, i)
        for i, (_, _, figure) in enumerate(columns)
        if figure is not None
        for line in best(
            [None if name == "original" else _downstream(figure, *of) for name, _, *of in lines],
            figure,
        )
    }
    rows = tuple(
        Row(
            name,
            term,
            tuple(show(shot, contrastive) or NOT_MEASURED for _, show, _ in columns),
            best=frozenset(i for line, i in winners if line == place),
        )
        for place, (name, term, shot, contrastive) in enumerate(lines)
    )
    n, classes = dig(metrics, "zero_shot.original.n"), dig(metrics, "zero_shot.original.n_classes")
    note = f"Zero-shot on {count(n)} images" if n else ""
    note += f", {count(classes)} classes" if n and classes else ""
    return Table(
        "The model with this site replaced",
        tuple(name for name, *_ in columns),
        rows,
        " ".join(part for part in (note and f"{note}.", _above_original(lines)) if part),
    )


def _above_original(lines: Sequence[tuple[str, str, Metrics, Metrics]]) -> str:
    """Explain in a sentence that replacements classify better than the original; "" if none."""
    top1 = {name: shot.get("top1") for name, _, shot, _ in lines}
    original = top1.get("original")
    above = [name for name, x in top1.items() if x is not None and original and x > original]
    if not above:
        return ""
    return (
        f"{' and '.join(above)} above the original: a reconstruction also leaves out directions "
        "that disturb this classification, and gaps within the 95 % intervals are chance. It is "
        "no proof of a better reconstruction; FVU measures that."
    )


def best(values: Sequence[Any], figure: Figure) -> frozenset[int]:
    """Return the places of the best values; none if all look equal or no direction is better.

    The number of active latents is a price, not a merit: no L0 is the best.
    """
    shown = {i: figure.show(value) for i, value in enumerate(values) if is_number(value)}
    if figure.better is None or figure.term == "L0" or len(set(shown.values())) < 2:
        return frozenset()
    choose = min if figure.better == "lower" else max
    winner = choose(shown, key=lambda i: values[i])
    return frozenset(i for i, text in shown.items() if text == shown[winner])


def _downstream_cell(figure: Figure) -> Callable[[Metrics, Metrics], str]:
    """Return a function that shows a figure, given the two kinds of figures of a replacement."""

    def show(shot: Metrics, contrastive: Metrics) -> str:
        return figure.show(_downstream(figure, shot, contrastive))

    return show


def _downstream(figure: Figure, shot: Metrics, contrastive: Metrics) -> Any:
    """Return a figure of a replacement, whichever of the two kinds it belongs to."""
    family, _, key = figure.key.split(".")
    return (shot if family == "zero_shot" else contrastive).get(key)


def _variant(block: Metrics, name: str) -> tuple[Metrics, Metrics]:
    """Return zero-shot and contrastive figures of one replacement; {} if there are none."""
    return (dig(block, f"zero_shot.{name}") or {}, dig(block, f"contrastive.{name}") or {})


def truth_table(metrics: Metrics) -> Table | None:
    """Tabulate the mean scores of the best single latents by kind of attribute, with baselines."""
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
        for score in TRUTH_SCORES:
            figure = truth_score(score)
            if summary.get(score) is None:
                continue
            cells = [figure.show(own.get(kind, {}).get(score)) for _, own in found]
            if everywhere:
                cells.append(figure.show(summary.get(EVERYWHERE)) if score == "iou" else "")
            values = [own.get(kind, {}).get(score) for _, own in found]
            won = best(values, figure)
            rows.append(Row(figure.label, figure.term, tuple(cells), group=group, best=won))
            group = ""
    columns = [name for name, _ in found] + ([truth_score(EVERYWHERE).label] if everywhere else [])
    note = (
        "Means over the best single latents, chosen on half of the images and scored on the rest."
    )
    return Table("Known attributes", tuple(columns), tuple(rows), note)


def attribute_table(metrics: Metrics) -> Table | None:
    """Tabulate the best latent of every attribute."""
    truth = metrics.get("truth") or {}
    blocks = [(name, block["truth"]) for name, block in baselines(metrics) if block.get("truth")]
    rows = tuple(
        Row(
            attribute,
            "",
            (
                str(scores.get("latent", "–")),
                *(rounded(scores.get(score)) for score in TRUTH_SCORES),
                *(rounded(dig(block.get(attribute) or {}, "auc")) for _, block in blocks),
            ),
        )
        for attribute, scores in truth.items()
        if isinstance(scores, Mapping)
    )
    if not rows:
        return None
    auc = truth_score("auc").label
    columns = (
        "latent",
        *(truth_score(score).label for score in TRUTH_SCORES),
        *(f"{auc}, {name}" for name, _ in blocks),
    )
    return Table(f"All {len(rows)} attributes", columns, rows)


def not_measured(metrics: Metrics) -> list[str]:
    """List the families of scores that `metrics.json` lacks, each with a reason.

    Known attributes are not listed: only rendered images have them, and nobody misses them else.
    """
    omitted = metrics.get("omitted") or {}
    families = {
        "baselines": ("Baselines", "`sparsight evaluate` measures them by default."),
        "zero_shot": ("Zero-shot accuracy", "it needs the model and labelled images."),
    }
    return [
        f"{name}: not measured; {omitted.get(family) or reason}"
        for family, (name, reason) in families.items()
        if not metrics.get(family)
    ]


def truth_by_kind(block: Metrics) -> dict[str, dict[str, Any]]:
    """Return the means of the measured scores by kind of attribute, with the number `n`."""
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
    """Return the name and figures of each measured baseline."""
    found = metrics.get("baselines") or {}
    return [
        (BASELINES.get(name, name), block)
        for name, block in sorted(found.items(), key=lambda item: _place(item[0]))
        if isinstance(block, Mapping)
    ]


def _tile(metrics: Metrics, key: str, note: str) -> Tile:
    figure = figure_of(key)
    return Tile(
        _capitalised(figure.label),
        figure.term,
        figure.show(figure.of(metrics)),
        _beside(metrics, figure),
        note,
    )


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _beside(metrics: Metrics, figure: Figure) -> tuple[Beside, ...]:
    return tuple(
        Beside(name, figure.show(figure.of(block)))
        for name, block in baselines(metrics)
        if figure.of(block) is not None
    )


def _place(name: str) -> int:
    names = list(BASELINES)
    return names.index(name) if name in names else len(names)


def _mean(values: Any) -> float | None:
    known = [float(value) for value in values if is_number(value)]
    return math.fsum(known) / len(known) if known else None
