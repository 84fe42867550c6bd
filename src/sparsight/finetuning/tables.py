"""The tables of the fine-tuning report, and its headline figures for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparsight.figures import TRUTH_SCORES, dig, interval, percent, rounded, truth_score
from sparsight.pages.tables import Row, Table

_SHOT = {"image_to_text": "caption of an image", "text_to_image": "image of a caption"}
_KINDS = {
    "clean": "no words",
    "attacked": "another class's name",
    "same": "its own name",
    "control": "nonsense",
}


def table_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return the headline figures as name, before, after and change, for a terminal."""
    rows: list[tuple[str, str, str, str]] = []
    for kind, words in _KINDS.items():
        each = dig(found, f"attack.{kind}")
        if each:
            change = f"{100 * each['change']['value']:+.1f} points"
            was, now = (percent(each[name]["accuracy"]) for name in ("before", "after"))
            rows.append((f"accuracy, {words}", was, now, change))
    for name, path, show in LINES:
        first, second = _both(found, path)
        if first is not None:
            points = f"{100 * (second - first):+.1f} points" if show is percent else ""
            rows.append((name, show(first), show(second), points))
    return rows


LINES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("zero-shot, other images", "zero_shot.*.top1", percent),
    ("in-batch accuracy (zer0int)", "in_batch_accuracy.*.accuracy", percent),
    ("recall@1, image to caption", "retrieval.*.image_to_text.1.recall", percent),
    ("recall@1, caption to image", "retrieval.*.text_to_image.1.recall", percent),
    ("modality gap", "modality_gap.*.distance", rounded),
    ("modality predicted correctly", "modality_gap.*.separability", percent),
)
"""The headline figures besides attacks: name, path and format."""


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Make the tables of everything that was measured."""
    made = [_attack_table(found), _kept_table(found), _modality_table(found)]
    made += [_latents_table(found), _truth_table(found)]
    return [table for table in made if table is not None]


def _attack_table(found: Mapping[str, Any]) -> Table:
    rows: list[Row] = []
    for kind, words in _KINDS.items():
        each = found["attack"].get(kind)
        if not each:
            continue
        cells = [percent(each[name]["accuracy"]) for name in ("before", "after")]
        rows.append(Row("accuracy", "accuracy", (*cells, _points(each["change"])), group=words))
        rows.append(
            Row("95 % interval", "", (*(interval(each[n]) for n in ("before", "after")), ""))
        )
        cells = [percent(each[name]["fooled"]) for name in ("before", "after")]
        rows.append(Row("fooled", "fooled", (*cells, "")))
        margins = [each[name]["margin"] for name in ("before", "after")]
        change = f"{margins[1] - margins[0]:+.2f}"
        rows.append(Row("margin (logits)", "", (*(f"{m:.2f}" for m in margins), change)))
    return Table(
        "Words on images",
        ("before", "after", "change"),
        tuple(rows),
        f"{found['n']:,} images, each in every kind; {found['n_classes']:,} classes. Margin: "
        "logit of the image's class minus that of the attacking word's class.",
        strong=1,
    )


def _kept_table(found: Mapping[str, Any]) -> Table | None:
    lines: list[tuple[str, str, str, str]] = [
        ("top-1", "zero-shot", "zero_shot.*.top1", "N-way zero-shot, other images"),
        ("top-5", "zero-shot", "zero_shot.*.top5", ""),
        ("accuracy", "in-batch accuracy", "in_batch_accuracy.*.accuracy", "in-batch, zer0int's"),
    ]
    for way, words in _SHOT.items():
        for k, group in ((1, f"retrieval, {words}"), (5, "")):
            lines.append((f"recall@{k}", "recall", f"retrieval.*.{way}.{k}.recall", group))
    rows = [
        Row(name, term, (*map(percent, values), f"{100 * (values[1] - values[0]):+.1f} points"),
            group=group)
        for name, term, path, group in lines
        if (values := _both(found, path))[0] is not None
    ]  # fmt: skip
    if not rows:
        return None
    notes = []
    if shot := dig(found, "zero_shot.after"):
        notes.append(f"Zero-shot: {shot['n']:,} images, {shot['n_classes']:,} classes.")
    if batch := dig(found, "in_batch_accuracy.after"):
        notes.append(
            f"In-batch: {batch['n']:,} images, {batch['ways']:.0f} different labels per batch of "
            f"{batch['batch_size']}."
        )
    if pairs := dig(found, "retrieval.after"):
        notes.append(f"Retrieval: among {pairs['n']:,} pairs.")
    return Table(
        "What it still knows", ("before", "after", "change"), tuple(rows), " ".join(notes), strong=1
    )


def _modality_table(found: Mapping[str, Any]) -> Table | None:
    lines: list[tuple[str, str, str, Callable[[Any], str]]] = [
        ("distance of the means", "modality gap", "modality_gap.*.distance", rounded),
        ("linearly separable", "separability", "modality_gap.*.separability", percent),
        ("cosine with own caption", "", "modality_gap.*.matched_cosine", rounded),
        ("cosine with another's", "", "modality_gap.*.random_cosine", rounded),
        ("logit scale", "", "logit_scale.*", rounded),
    ]
    rows = tuple(
        Row(name, term, (*map(show, values), f"{values[1] - values[0]:+.3f}" if show is rounded
            else f"{100 * (values[1] - values[0]):+.1f} points"))
        for name, term, path, show in lines
        if (values := _both(found, path))[0] is not None
    )  # fmt: skip
    return Table("Images and captions", ("before", "after", "change"), rows, strong=1)


def _latents_table(found: Mapping[str, Any]) -> Table | None:
    each = found.get("latents")
    if not each:
        return None
    drift = each["drift"]
    kept = each["found_before"]
    rows = [
        Row("text-salient latents", "text-salient", (f"{kept:,}", f"{each['found_after']:,}")),
        Row("of those before, still salient", "", (f"{kept:,}", f"{each['kept']:,}")),
        Row("newly so", "", ("", f"{each['new']:,}")),
        Row(
            "their summed response",
            "",
            (rounded(each["effect_before"]), rounded(each["effect_after"])),
        ),
        Row("active on any image", "", (f"{drift['n_alive']:,}", _left(drift))),
        Row("correlation with itself", "drift", ("", rounded(drift["own"])), group="drift"),
    ]
    if "matched" in drift:
        rows.append(Row("with its best match", "drift", ("", rounded(drift["matched"]))))
        rows.append(Row("matched by another latent", "drift", ("", f"{drift['moved']:,}")))
    return Table(
        f"Latents at {each['site']}",
        ("before", "after"),
        tuple(rows),
        f"One SAE of the original model reads both models: {each['n_latents']:,} latents. Found on "
        f"other pairs, tested again and compared on {each['n_pairs']:,}; false discovery rate "
        f"{each['fdr']:g}.",
        strong=1,
    )


def _left(drift: Mapping[str, Any]) -> str:
    return f"{drift['n_alive'] - drift['fell_silent']:,}"


def _truth_table(found: Mapping[str, Any]) -> Table | None:
    truth = dig(found, "latents.truth")
    if not truth:
        return None
    rows = []
    for kind, before in truth["before"].items():
        group = f"{kind.replace('_', ' ')} · {before['n']}"
        for score in TRUTH_SCORES:
            title = truth_score(score).label
            values = [dig(truth[side].get(kind), f"{score}.mean") for side in ("before", "after")]
            if None not in values:
                change = f"{values[1] - values[0]:+.3f}"
                cells = (*map(rounded, values), change)
                rows.append(Row(title, title, cells, group=group))
                group = ""
    return Table(
        "Known attributes",
        ("before", "after", "change"),
        tuple(rows),
        "Means over the best single latents of the same SAE, chosen again for each model on half "
        "of "
        "the scenes and scored on the rest.",
        strong=1,
    )


def _both(found: Mapping[str, Any], path: str) -> list[Any]:
    return [dig(found, path.replace("*", side)) for side in ("before", "after")]


def _points(change: Mapping[str, Any]) -> str:
    low, high = change["interval"]
    return f"{100 * change['value']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
