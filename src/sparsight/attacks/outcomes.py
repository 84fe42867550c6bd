"""Classify the images of pairs with the model as it is and with edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsight.attacks.pairs import AttackPairs
from sparsight.attacks.passes import PairPass
from sparsight.editing.edits import Edit
from sparsight.editing.interventions import Intervention, interventions
from sparsight.errors import SparsightError, UserError
from sparsight.vision import (
    PassSettings,
    VisionModel,
    classifier_weights,
    classify,
    embed_variants,
)

ORIGINAL = "original"


@dataclass(frozen=True)
class Outcome:
    """The outcome for each image that loaded in every kind.

    Attributes:
        right: whether its own class scored highest.
        fooled: whether the class of the attacking word did, whether or not that word is written.
        margin: logit of its own class minus that of the attacking word's.
    """

    right: npt.NDArray[np.bool_]
    fooled: npt.NDArray[np.bool_]
    margin: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """Outcomes for the same images with each variant of a model, in each kind.

    Attributes:
        by_variant: outcomes by variant (`original` first) and kind.
        n: number of images scored.
        failed: number of images that did not load, by kind; they are left out of every kind.
        reasons: reasons for the first failures.
    """

    by_variant: dict[str, dict[str, Outcome]]
    n: int
    failed: dict[str, int] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


@torch.no_grad()
def outcomes(
    model: VisionModel,
    pairs: AttackPairs,
    variants: Mapping[str, Sequence[Edit] | Edit] | None = None,
    *,
    kinds: Sequence[str] = ("clean", "attacked", "same", "control"),
    templates: str | Sequence[str] = "simple",
    check: bool = True,
    settings: PassSettings | None = None,
) -> Outcomes:
    """Classify the images of pairs among their classes, with several edits of the model.

    Args:
        model: a model with a text tower.
        pairs: the images.
        variants: edits by name; the unedited model is always included, as `original`.
        kinds: which kinds of images.
        templates: see `classifier_weights`.
        check: see `intervene`.
        settings: settings of the pass over the images.

    Raises:
        UserError: no image loads in every kind, or an edit does not fit the model.
        SparsightError: a logit is not finite.
    """
    made = {
        name: interventions(model, edits, check=check) for name, edits in (variants or {}).items()
    }
    scores = _Scores(model, pairs, kinds, [ORIGINAL, *made], templates)
    with PairPass(model, pairs, kinds, "attack", settings) as seen:
        for kind, batch in seen:
            embedded = _embed(model, batch.pixels.to(model.device), made)
            scores.add(kind, batch.indices, embedded)
    if not seen.loaded.any():
        raise UserError(
            f"{pairs.clean.spec}: none of {len(pairs):,} images loads in every kind "
            f"({'; '.join(seen.reasons)})."
        )
    return Outcomes(
        scores.outcomes(seen.loaded), int(seen.loaded.sum()), seen.failed, tuple(seen.reasons)
    )


class _Scores:
    """The best class and the margin of each image, by variant and kind."""

    def __init__(
        self,
        model: VisionModel,
        pairs: AttackPairs,
        kinds: Sequence[str],
        variants: Sequence[str],
        templates: str | Sequence[str],
    ) -> None:
        self.model = model
        self.weights = classifier_weights(model, list(pairs.class_names.values()), templates)
        numbers = {label: i for i, label in enumerate(pairs.class_names)}
        self.own = torch.tensor([numbers[label] for label in pairs.labels])
        self.word = torch.tensor([numbers[label] for label in pairs.words])
        keys = [(name, kind) for name in variants for kind in kinds]
        n = len(pairs)
        self.best = {key: torch.zeros(n, dtype=torch.int64) for key in keys}
        self.margin = {key: torch.zeros(n, dtype=torch.float64) for key in keys}

    def add(self, kind: str, indices: Sequence[int], embedded: Mapping[str, Tensor]) -> None:
        """Classify a batch by its embeddings with each variant."""
        here, rows = torch.tensor(indices), torch.arange(len(indices))
        for name, embeddings in embedded.items():
            logits = classify(embeddings, self.weights, self.model.logit_scale).double().cpu()
            if not bool(logits.isfinite().all()):
                raise SparsightError(
                    f"{self.model.id}, {name}: logits of {kind} images are not finite."
                )
            # Ties go to the first class, as in zero-shot classification.
            best = logits.argsort(dim=1, descending=True, stable=True)[:, 0]
            self.best[name, kind][here] = best
            margin = logits[rows, self.own[here]] - logits[rows, self.word[here]]
            self.margin[name, kind][here] = margin

    def outcomes(self, loaded: npt.NDArray[np.bool_]) -> dict[str, dict[str, Outcome]]:
        """Return outcomes by variant and kind, for the images that loaded in every kind."""
        kept = torch.from_numpy(loaded)
        found: dict[str, dict[str, Outcome]] = {}
        for (name, kind), best in self.best.items():
            found.setdefault(name, {})[kind] = Outcome(
                right=(best == self.own)[kept].numpy(),
                fooled=(best == self.word)[kept].numpy(),
                margin=self.margin[name, kind][kept].numpy(),
            )
        return found


def _embed(
    model: VisionModel, pixels: Tensor, made: Mapping[str, Mapping[str, Intervention]]
) -> dict[str, Tensor]:
    """Embed images with the model as it is, and with each set of interventions."""
    sites = {tuple(by_site) for by_site in made.values()}
    if len(sites) == 1 and len(only := next(iter(sites))) == 1:
        site = only[0]
        edits = {name: by_site[site] for name, by_site in made.items()}
        return embed_variants(model, pixels, site, edits)
    embedded = {ORIGINAL: model.embed_images(pixels)}
    for name, by_site in made.items():
        with model.edit(by_site):
            embedded[name] = model.embed_images(pixels)
    return embedded
