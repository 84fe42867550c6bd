"""What a model makes of each picture of a pair, as it is and with edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsight.attacks.pairs import AttackPairs
from sparsight.editing.edits import Edit
from sparsight.editing.interventions import Intervention, interventions
from sparsight.errors import SparsightError, UserError
from sparsight.images import load_batches
from sparsight.progress import progress
from sparsight.vision import VisionModel, classifier_weights, classify, embed_variants

ORIGINAL = "original"


@dataclass(frozen=True)
class Outcome:
    """Of each picture that loaded in every kind.

    Attributes:
        right: whether its own class scored highest.
        fooled: whether the class of the attacking word did, be that word written or not.
        margin: logit of its own class minus that of the attacking word's.
    """

    right: npt.NDArray[np.bool_]
    fooled: npt.NDArray[np.bool_]
    margin: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of the same pictures under each variant of a model, in each kind.

    Attributes:
        by_variant: by variant, `original` first, and kind.
        n: pictures scored.
        failed: pictures that did not load in a kind; they are left out of all.
        reasons: of the first of them.
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
    batch_size: int = 64,
    workers: int | None = None,
    quiet: bool = True,
) -> Outcomes:
    """Classify the pictures of pairs among their classes, under several edits of the model.

    Args:
        model: one with a text tower.
        pairs: the pictures.
        variants: edits by name; the model as it is is always there, as `original`.
        kinds: which pictures.
        templates: see `classifier_weights`.
        check: see `intervene`.
        batch_size: pictures at a time.
        workers: processes that decode and draw.
        quiet: no progress line.

    Raises:
        UserError: no picture loads in every kind, or an edit does not fit the model.
        SparsightError: a logit is not finite.
    """
    labels = {label: i for i, label in enumerate(pairs.class_names)}
    weights = classifier_weights(model, list(pairs.class_names.values()), templates)
    scale = model.logit_scale
    own = torch.tensor([labels[label] for label in pairs.labels])
    word = torch.tensor([labels[label] for label in pairs.words])
    made = {
        name: interventions(model, edits, check=check) for name, edits in (variants or {}).items()
    }
    n = len(pairs)
    found: dict[tuple[str, str], dict[str, Tensor]] = {
        (name, kind): {
            "best": torch.zeros(n, dtype=torch.int64),
            "margin": torch.zeros(n, dtype=torch.float64),
        }
        for name in (ORIGINAL, *made)
        for kind in kinds
    }
    loaded = torch.ones(n, dtype=torch.bool)
    failed: dict[str, int] = {}
    reasons: list[str] = []
    with progress("attack", n * len(kinds), "images", quiet=quiet) as line:
        for kind in kinds:
            source = pairs.source(kind)
            for batch in load_batches(
                source, model.transform, batch_size, workers=workers, min_side=model.min_side
            ):
                line.advance(len(batch.indices) + len(batch.failures))
                for index, reason in batch.failures:
                    loaded[index] = False
                    failed[kind] = failed.get(kind, 0) + 1
                    if len(reasons) < 3:
                        reasons.append(f"{source.known(index).id} ({kind}): {reason}")
                if not batch.indices:
                    continue
                here = torch.tensor(batch.indices)
                for name, embedded in _embed(model, batch.pixels.to(model.device), made).items():
                    logits = classify(embedded, weights, scale).double().cpu()
                    if not bool(logits.isfinite().all()):
                        raise SparsightError(
                            f"{model.id}, {name}: logits of {kind} pictures are not finite."
                        )
                    rows = torch.arange(len(here))
                    into = found[name, kind]
                    # Of equal logits the first class counts, as in zero-shot classification.
                    into["best"][here] = logits.argsort(dim=1, descending=True, stable=True)[:, 0]
                    into["margin"][here] = logits[rows, own[here]] - logits[rows, word[here]]
    if not bool(loaded.any()):
        raise UserError(
            f"{pairs.clean.spec}: not one of {n:,} pictures loads with every kind of word on it "
            f"({'; '.join(reasons)})."
        )
    by_variant: dict[str, dict[str, Outcome]] = {}
    for (name, kind), each in found.items():
        best = each["best"][loaded]
        by_variant.setdefault(name, {})[kind] = Outcome(
            right=(best == own[loaded]).numpy(),
            fooled=(best == word[loaded]).numpy(),
            margin=each["margin"][loaded].numpy(),
        )
    return Outcomes(by_variant, int(loaded.sum()), failed, tuple(reasons))


def _embed(
    model: VisionModel, pixels: Tensor, made: Mapping[str, Mapping[str, Intervention]]
) -> dict[str, Tensor]:
    """Of the model as it is, and under each set of interventions."""
    sites = {tuple(each) for each in made.values()}
    if len(sites) == 1 and len(only := next(iter(sites))) == 1:
        site = only[0]
        edits = {name: each[site] for name, each in made.items()}
        return embed_variants(model, pixels, site, edits)
    embedded = {ORIGINAL: model.embed_images(pixels)}
    for name, each in made.items():
        with model.edit(each):
            embedded[name] = model.embed_images(pixels)
    return embedded
