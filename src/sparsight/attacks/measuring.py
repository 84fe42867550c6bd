"""Measure how well words fool a model: success, accuracy and margins, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsight.attacks.outcomes import ORIGINAL, Outcome, outcomes
from sparsight.attacks.pairs import AttackPairs
from sparsight.editing.edits import Edit
from sparsight.errors import UserError
from sparsight.files import write_json
from sparsight.intervals import (
    bootstrap,
    bootstrap_interval,
    paired_difference,
    wilson_interval,
)
from sparsight.vision import PassSettings, VisionModel

EDITED = "edited"
CHANGES = (("attacked", "clean"), ("control", "clean"), ("attacked", "control"), ("same", "clean"))
"""Which kinds are compared."""


@dataclass(frozen=True)
class Share:
    """A share of images, and its 95 % interval: Wilson's, or that of paired shares."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Mean:
    """A mean over images, and its 95 % percentile bootstrap interval (None for one image)."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class AttackReport:
    """What a typographic attack does to a model.

    Attributes:
        model: the model's id.
        n: number of images, each in every kind.
        accuracy: share classified correctly, by kind.
        fooled: share for which the attacking word's class wins, by kind: for `attacked`, the
            success of the attack; for the others, which lack that word, the rate by chance.
        accuracy_change: share classified correctly in one kind minus that in another, over the same
            images: `attacked - clean`, …
        margin: mean logit of an image's own class minus that of the attacking word's, by kind.
        margin_shift: mean of the margin's paired change between kinds.
        failed: number of images that did not load, by kind; they are left out of every kind.
        reasons: reasons for the first failures.
        templates: sentences for the class names.
        edits: descriptions of the edits of the model.
        pairs: how the words were made.
    """

    model: str
    n: int
    accuracy: dict[str, Share]
    fooled: dict[str, Share]
    accuracy_change: dict[str, Share]
    margin: dict[str, Mean]
    margin_shift: dict[str, Mean]
    failed: dict[str, int]
    reasons: tuple[str, ...]
    templates: str | list[str]
    edits: list[str]
    pairs: dict[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return asdict(self)

    def save(self, path: str | Path) -> Path:
        """Write the figures as JSON."""
        write_json(Path(path), self.to_dict())
        return Path(path)

    def table(self) -> list[tuple[str, ...]]:
        """Return rows for a terminal, the header first: one line per kind."""
        rows: list[tuple[str, ...]] = [("images", "accuracy", "attacking word wins", "margin")]
        for kind, share in self.accuracy.items():
            margin = self.margin[kind]
            rows.append((kind, _percent(share), _percent(self.fooled[kind]), _logits(margin)))
        for name, change in self.accuracy_change.items():
            rows.append((name, _points(change), "", _logits(self.margin_shift[name], sign="+")))
        return rows


def measure_attack(
    model: VisionModel,
    pairs: AttackPairs,
    *,
    templates: str | Sequence[str] = "simple",
    edits: Sequence[Edit] | Edit = (),
    check: bool = True,
    batch_size: int = 64,
    workers: int | None = None,
    quiet: bool = True,
) -> AttackReport:
    """Measure how far words on images mislead a model.

    Args:
        model: a model with a text tower.
        pairs: from `make_pairs`.
        templates: sentences for class names: `simple`, `openai80`, or a sentence with {} in it.
        edits: edits of the model, in force during the measurement.
        check: see `intervene`.
        batch_size: images at a time.
        workers: processes that decode and draw.
        quiet: show no progress line.

    Raises:
        UserError: no image loads, the model has no text tower, or an edit does not fit it.
    """
    given = [edits] if isinstance(edits, Edit) else list(edits)
    found = outcomes(
        model,
        pairs,
        {EDITED: given} if given else None,
        templates=templates,
        check=check,
        settings=PassSettings(batch_size, workers, quiet),
    )
    kinds = found.by_variant[EDITED if given else ORIGINAL]
    changes = [pair for pair in CHANGES if set(pair) <= set(kinds)]
    return AttackReport(
        model=model.id,
        n=found.n,
        accuracy={kind: share_of(outcome.right) for kind, outcome in kinds.items()},
        fooled={kind: share_of(outcome.fooled) for kind, outcome in kinds.items()},
        accuracy_change={
            f"{a} - {b}": change_of(kinds[b].right, kinds[a].right) for a, b in changes
        },
        margin={kind: mean_of(outcome.margin) for kind, outcome in kinds.items()},
        margin_shift={f"{a} - {b}": mean_of(kinds[a].margin - kinds[b].margin) for a, b in changes},
        failed=found.failed,
        reasons=found.reasons,
        templates=templates if isinstance(templates, str) else list(templates),
        edits=[describe(edit) for edit in given],
        pairs=pairs.about,
    )


def share_of(hits: npt.NDArray[np.bool_]) -> Share:
    """Return the share of hits."""
    n = int(hits.sum())
    return Share(n / len(hits), wilson_interval(n, len(hits)))


def change_of(before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> Share:
    """Return the share of hits after minus that before, over the same images."""
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    return Share(*paired_difference(lost, won, len(before)))


def mean_of(values: npt.NDArray[np.float64]) -> Mean:
    """Return the mean over images."""
    return Mean(float(values.mean()), bootstrap_interval(values.tolist()))


def won_back(
    clean: npt.NDArray[np.bool_],
    attacked: npt.NDArray[np.bool_],
    edited: npt.NDArray[np.bool_],
    seed: int,
) -> Mean:
    """Return the share of the attack's loss that an edit wins back; 0 if there is no loss.

    Args:
        clean: whether an image is classified correctly.
        attacked: whether it is with words on it.
        edited: whether it is with words on it and with the edit.
        seed: seed of the resampling.
    """

    def share(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        before, after, best = (weights @ hits for hits in (attacked, edited, clean))
        loss = best - before
        return np.divide(after - before, loss, out=np.zeros_like(loss), where=loss != 0)

    value = float(share(np.ones((1, len(clean))))[0])
    return Mean(value, bootstrap(share, len(clean), seed))


def describe(edit: Edit) -> str:
    """Describe an edit in words, for reports."""
    site, tokens = getattr(edit, "site", None), getattr(edit, "tokens", None)
    chosen = getattr(edit, "latents", None)
    kind = "latents"
    if chosen is None and hasattr(edit, "neurons"):
        chosen, kind = edit.neurons, "neurons"
    action = getattr(edit, "action", None)
    count = "all" if chosen is None else f"{len(chosen)}"
    what = type(action).__name__ if action is not None else type(edit).__name__
    return f"{what}: {count} {kind} at {site}, {tokens}"


def require_loss(clean: Outcome, attacked: Outcome) -> float:
    """Return how much accuracy the words cost.

    Raises:
        UserError: they cost none, so that there is nothing to win back.
    """
    loss = float(clean.right.mean() - attacked.right.mean())
    if loss <= 0:
        raise UserError(
            f"Words do not lower this model's accuracy ({clean.right.mean():.1%} clean, "
            f"{attacked.right.mean():.1%} attacked), so there is no loss to win back. Write larger "
            "words, or use more images."
        )
    return loss


def _percent(share: Share) -> str:
    low, high = share.interval
    return f"{100 * share.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _points(share: Share) -> str:
    low, high = share.interval
    return f"{100 * share.value:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def _logits(mean: Mean, sign: str = "") -> str:
    if mean.interval is None:
        return f"{mean.value:{sign}.2f}"
    low, high = mean.interval
    return f"{mean.value:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"
