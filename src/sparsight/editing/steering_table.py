"""The results of steering as one table: the model as it is, latents by strength, curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

COLUMNS = (
    "part", "latent", "name", "strength", "activation", "curve", "chosen", "k", "n", "top1", "low",
    "high", "difference", "difference_low", "difference_high", "mean_of_classes",
    "own_probability", "kl", "most_raised", "raised_by", "most_lowered", "lowered_by",
    "image_to_text_recall_1", "image_to_text_recall_5", "image_to_text_median_rank",
    "text_to_image_recall_1", "text_to_image_recall_5", "text_to_image_median_rank",
)  # fmt: skip


def rows_of(
    original: Mapping[str, Any],
    latents: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Yield a row for the model as it is, one per latent and strength, and one per curve point.

    Args:
        original: figures of the model as it is.
        latents: see `SteerReport`.
        curves: see `SteerReport`.
    """
    yield {"part": "original", **_flat(original)}
    for row in latents:
        for point in row["strengths"]:
            about = {"part": "latent", "latent": row["latent"], "name": row["name"] or ""}
            about |= {key: point[key] for key in ("strength", "activation")}
            yield about | _flat(point)
    for row in curves:
        about = {"part": "curve", "curve": row["kind"]}
        about |= {"chosen": row["latents"] or "", "k": "" if row["k"] is None else row["k"]}
        yield about | _flat(row)


def _flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    same = ("n", "top1", "difference", "mean_of_classes", "own_probability", "kl")
    flat = {key: figures[key] for key in (*same, "most_raised", "most_lowered") if key in figures}
    for key, names in {
        "interval": ("low", "high"),
        "difference_interval": ("difference_low", "difference_high"),
    }.items():
        flat |= dict(zip(names, figures.get(key, ()), strict=False))
    for key, name in {"most_raised": "raised_by", "most_lowered": "lowered_by"}.items():
        if key in figures:
            flat[name] = figures["change"][figures[key]]
    for key in ("image_to_text", "text_to_image"):
        for score in ("recall_1", "recall_5", "median_rank"):
            if key in figures:
                flat[f"{key}_{score}"] = figures[key][score]
    return flat
