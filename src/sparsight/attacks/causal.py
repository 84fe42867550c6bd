"""Check whether the latents found cause the attack: ablate them, and compare with random ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.attacks.measuring import (
    Mean,
    Share,
    change_of,
    describe,
    require_loss,
    share_of,
    won_back,
)
from sparsight.attacks.outcomes import ORIGINAL, Outcome, outcomes
from sparsight.attacks.pairs import AttackPairs
from sparsight.attacks.salience_table import SalienceTable, picture_marks
from sparsight.config import check_seed
from sparsight.editing.actions import Action, Off
from sparsight.editing.edits import Edit, LatentEdit, NeuronEdit, Positions
from sparsight.errors import UserError
from sparsight.files import write_json
from sparsight.intervals import t_interval
from sparsight.sae import SparseAutoencoder
from sparsight.vision import PassSettings, VisionModel

FOUND = "found"
NEAREST = 8
"""Number of neighbours in density from which a random latent is drawn."""

_KINDS = ("clean", "attacked", "same", "control")
_RANDOM_KINDS = ("clean", "attacked")


@dataclass(frozen=True)
class Effect:
    """What an edit does to images with words, and to those without.

    Attributes:
        accuracy: share classified correctly, by kind.
        fooled: share of attacked images for which the written word's class wins.
        won_back: share of the loss (accuracy clean − attacked, without the edit) that the edit wins
            back on attacked images, with a percentile bootstrap interval over images.
        clean_change: accuracy on clean images with the edit minus without it.
    """

    accuracy: dict[str, Share]
    fooled: Share
    won_back: Mean
    clean_change: Share


@dataclass(frozen=True)
class RandomEffects:
    """The effects of several draws of random latents of equal density.

    Attributes:
        draws: share won back, for each draw.
        won_back: the mean of `draws`, with Student's 95 % interval over draws.
        clean_change: mean change in clean accuracy.
        accuracy: mean accuracy on clean and on attacked images.
        density: mean density of the latents drawn; compare with that of the latents found.
    """

    draws: list[float]
    won_back: Mean
    clean_change: float
    accuracy: dict[str, float]
    density: float


@dataclass(frozen=True)
class CausalReport:
    """The effects of switching off the latents found, and random ones.

    Attributes:
        n: number of images.
        original: accuracy by kind without an edit.
        fooled: share of attacked images for which the written word's class wins, without an edit.
        loss: accuracy on clean minus that on attacked images, without an edit.
        found: the effect of the latents found.
        random: the effect of random latents; None if none were drawn.
        density: mean density of the latents found.
        edits: descriptions of the edits.
        failed: number of images that did not load, by kind.
        pairs: how the words were made.
        same_pictures: how many of these images were also used to find the latents; should be 0.
    """

    n: int
    original: dict[str, Share]
    fooled: Share
    loss: float
    found: Effect
    random: RandomEffects | None
    density: float
    edits: list[str]
    failed: dict[str, int]
    pairs: dict[str, Any] = field(repr=False)
    same_pictures: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return asdict(self)

    def save(self, path: str | Path) -> Path:
        """Write the figures as JSON."""
        write_json(Path(path), self.to_dict())
        return Path(path)

    def table(self) -> list[tuple[str, ...]]:
        """Return rows for a terminal, the header first: unedited, found off, random off."""
        rows: list[tuple[str, ...]] = [
            ("", *self.original, "fooled", "loss won back", "clean change")
        ]
        rows.append(
            ("unedited", *(_percent(s.value) for s in self.original.values()),
             _percent(self.fooled.value), "", "")
        )  # fmt: skip
        effect = self.found
        rows.append(
            ("found", *(_percent(s.value) for s in effect.accuracy.values()),
             _percent(effect.fooled.value), _with_interval(effect.won_back),
             f"{100 * effect.clean_change.value:+.1f} points")
        )  # fmt: skip
        if self.random is not None:
            rows.append(
                (f"random ×{len(self.random.draws)}",
                 *(_percent(self.random.accuracy[kind]) if kind in self.random.accuracy else ""
                   for kind in self.original), "",
                 _with_interval(self.random.won_back),
                 f"{100 * self.random.clean_change:+.1f} points")
            )  # fmt: skip
        return rows


@dataclass(frozen=True)
class Target:
    """Latents of an SAE, or neurons of a site, that respond to words.

    Attributes:
        table: the test of all latents or neurons.
        chosen: which of them; default: those that were found and are selective.
        sae: the SAE that was tested; None for neurons.
        action: what is done to them.
        tokens: at which positions; default: those that were tested.
    """

    table: SalienceTable
    chosen: Sequence[int] | None = None
    sae: SparseAutoencoder | None = None
    action: Action = field(default_factory=Off)
    tokens: Positions | None = None

    def __post_init__(self) -> None:
        if (self.sae is None) == (self.table.about["unit"] == "latent"):
            raise UserError(
                f"The test at {self.table.site} is of {self.table.about['unit']}s; "
                + ("give the SAE, too." if self.sae is None else "leave the SAE out.")
            )
        if self.sae is not None and self.sae.fingerprint() != self.table.about["sae"]:
            raise UserError(
                f"The test at {self.table.site} was made with a different SAE, whose latents mean "
                "something else. Give that SAE, or run the test again with this one."
            )
        object.__setattr__(self, "chosen", self.table.chosen(self.chosen))

    def edit(self, chosen: Sequence[int] | None = None) -> Edit:
        """Return the edit of the chosen ones, or of others instead."""
        which = self.chosen if chosen is None else chosen
        tokens = self.tokens or self.table.about["tokens"]
        if self.sae is None:
            return NeuronEdit(self.table.site, which, self.action, tokens)
        return LatentEdit(self.sae, which, self.action, site=self.table.site, tokens=tokens)


def causal_check(
    model: VisionModel,
    pairs: AttackPairs,
    targets: Sequence[Target] | Target,
    *,
    draws: int = 10,
    seed: int = 0,
    templates: str | Sequence[str] = "simple",
    check: bool = True,
    batch_size: int = 64,
    workers: int | None = None,
    quiet: bool = True,
) -> CausalReport:
    """Measure a model with the latents found switched off, and with random ones switched off.

    Args:
        model: a model with a text tower.
        pairs: images, other than those on which the latents were found.
        targets: the latents found; those of several sites are edited together.
        draws: number of sets of random latents.
        seed: seed of the draws.
        templates: sentences for class names.
        check: see `intervene`.
        batch_size: images at a time.
        workers: processes that decode and draw.
        quiet: show no progress line.

    Raises:
        UserError: words do not lower the model's accuracy, or an edit does not fit the model.
    """
    check_seed(seed)
    if draws < 0:
        raise UserError(f"draws is {draws}; it must be 0 or more.")
    given = [targets] if isinstance(targets, Target) else list(targets)
    if not given:
        raise UserError("No target is given, so there is nothing to switch off. Give at least one.")
    drawn = _draw(given, draws, seed)
    options: dict[str, Any] = {
        "templates": templates,
        "check": check,
        "settings": PassSettings(batch_size, workers, quiet),
    }
    edits = [target.edit() for target in given]
    seen = outcomes(model, pairs, {FOUND: edits}, kinds=_KINDS, **options)
    before = seen.by_variant[ORIGINAL]
    loss = require_loss(before["clean"], before["attacked"])
    searched = {mark for target in given for mark in target.table.marks}
    return CausalReport(
        n=seen.n,
        original={kind: share_of(before[kind].right) for kind in _KINDS},
        fooled=share_of(before["attacked"].fooled),
        loss=loss,
        found=_effect(before, seen.by_variant[FOUND], seed),
        random=_random_effects(model, pairs, given, drawn, seed, options) if drawn else None,
        density=_density(given, [list(target.chosen or []) for target in given]),
        edits=[describe(edit) for edit in edits],
        failed=seen.failed,
        pairs=pairs.about,
        same_pictures=sum(mark in searched for mark in picture_marks(pairs)),
    )


def _draw(targets: Sequence[Target], draws: int, seed: int) -> list[list[list[int]]]:
    """Return for each draw and target as many random latents as were chosen."""
    rng = np.random.default_rng(seed)
    return [
        [draw_like(target.table, target.chosen or [], rng) for target in targets]
        for _ in range(draws)
    ]


def _random_effects(
    model: VisionModel,
    pairs: AttackPairs,
    targets: Sequence[Target],
    drawn: Sequence[Sequence[Sequence[int]]],
    seed: int,
    options: dict[str, Any],
) -> RandomEffects:
    """Measure the effect of switching off each set of random latents."""
    variants: dict[str, list[Edit]] = {
        f"random {number}": [
            target.edit(others) for target, others in zip(targets, draw, strict=True)
        ]
        for number, draw in enumerate(drawn)
    }
    seen = outcomes(model, pairs, variants, kinds=_RANDOM_KINDS, **options).by_variant
    effects = [_effect(seen[ORIGINAL], seen[name], seed) for name in variants]
    won = [effect.won_back.value for effect in effects]
    return RandomEffects(
        draws=won,
        won_back=Mean(float(np.mean(won)), t_interval(won)),
        clean_change=float(np.mean([effect.clean_change.value for effect in effects])),
        accuracy={
            kind: float(np.mean([effect.accuracy[kind].value for effect in effects]))
            for kind in _RANDOM_KINDS
        },
        density=float(np.mean([_density(targets, draw) for draw in drawn])),
    )


def draw_like(table: SalienceTable, chosen: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Draw as many other latents, each with about the density of a chosen one.

    Each is drawn from the `NEAREST` in density that were not chosen, found or drawn before.

    Raises:
        UserError: there are too few other latents that are ever active.
    """
    barred = np.zeros(len(table), bool)
    barred[list(chosen)] = True
    barred[table.found] = True
    pool = np.flatnonzero(~barred & (table.density > 0))
    if len(pool) < len(chosen):
        raise UserError(
            f"{table.site}: {len(chosen):,} {table.about['unit']}s need as many others for "
            f"comparison, but only {len(pool):,} of {len(table):,} are active and were not found. "
            "Switch off fewer."
        )
    pool = pool[np.argsort(table.density[pool], kind="stable")]
    free = table.density[pool]
    drawn: list[int] = []
    # In random order, so that it is not always the same ones that are left with few neighbours.
    for latent in np.asarray(chosen)[np.argsort(rng.random(len(chosen)), kind="stable")]:
        width = min(NEAREST, len(pool))
        middle = int(np.searchsorted(free, table.density[latent]))
        start = min(max(0, middle - width // 2), len(pool) - width)
        place = start + int(rng.random() * width)
        drawn.append(int(pool[place]))
        pool, free = np.delete(pool, place), np.delete(free, place)
    return drawn


def _density(targets: Sequence[Target], chosen: Sequence[Sequence[int]]) -> float:
    parts = [
        target.table.density[list(which)] for target, which in zip(targets, chosen, strict=True)
    ]
    return float(np.concatenate(parts).mean())


def _effect(before: dict[str, Outcome], after: dict[str, Outcome], seed: int) -> Effect:
    return Effect(
        accuracy={kind: share_of(outcome.right) for kind, outcome in after.items()},
        fooled=share_of(after["attacked"].fooled),
        won_back=won_back(
            before["clean"].right, before["attacked"].right, after["attacked"].right, seed
        ),
        clean_change=change_of(before["clean"].right, after["clean"].right),
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _with_interval(mean: Mean) -> str:
    if mean.interval is None:
        return _percent(mean.value)
    low, high = mean.interval
    return f"{100 * mean.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
