"""What training logged about dead latents: how many, what was done about them, at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from sparsight.figures import percent, rounded
from sparsight.pages.tables import Row, Table
from sparsight.sae.remedies import Remedy


def dead_latents_table(
    log: Sequence[Mapping[str, Any]], remedies: Sequence[type[Remedy]], mean_to_spread: float | None
) -> Table | None:
    """Make a table from a run's log; None if the log lacks the figures.

    Args:
        log: lines of `metrics.jsonl`.
        remedies: the run's remedies; one at most, except in runs from earlier versions.
        mean_to_spread: ratio of the activations; see `sparsight.training.trainer.mean_to_spread`.
    """
    lines = [line for line in log if "revived" in line and "dead" in line]
    if not lines:
        return None
    last = lines[-1]
    window = last["dead_window"]
    rows = [
        ("remedy", ", ".join(each.label for each in remedies) or "none"),
        (f"dead at the end, in the last {window:,} vectors", percent(last["dead"])),
        ("highest share of dead latents", percent(max(line["dead"] for line in lines))),
        ("dead latents that fired again", f"{sum(line['revived'] for line in lines):,}"),
    ]
    if any(each.renews for each in remedies):
        rows.append(("resampled", f"{sum(line['resampled'] for line in lines):,}"))
    before = [line["vectors_per_second"] for line in lines if line["vectors"] <= window]
    after = [line["vectors_per_second"] for line in lines if line["vectors"] > window]
    if remedies and before and after:
        share = median(after) / max(median(before), 1e-9)
        rows.append(("speed once latents can be dead, relative to before", percent(share)))
    if mean_to_spread is not None:
        rows.append(("distance of the mean from 0, in spreads", rounded(mean_to_spread)))
    return Table(
        "Dead latents in training",
        ("value",),
        tuple(Row(name, "", (value,)) for name, value in rows),
        note="A dead latent that becomes active again counts as having fired again.",
    )
