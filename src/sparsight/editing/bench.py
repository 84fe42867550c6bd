"""Compare variants of a model: the images that they are measured on, and the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.errors import UserError
from sparsight.evaluation.recall import distinct, image_text_recall
from sparsight.images import ImageSource
from sparsight.intervals import paired_difference, wilson_interval
from sparsight.vision import ImagePass, PassSettings, VisionModel, classify, embed_variants

VARIANTS = 64
"""Variants of an image in memory at a time."""


@dataclass(frozen=True)
class Halves:
    """Two halves of the images: one to choose latents on, one to measure on."""

    choose: dict[str, list[int]]
    measure: dict[str, list[int]]

    @classmethod
    def of(cls, labels: Sequence[str | None], classes: Sequence[str]) -> Halves:
        """Split the images of each class alternately; without classes, all images."""
        groups: dict[str, list[int]] = {label: [] for label in classes} or {"": []}
        for i, label in enumerate(labels):
            if not classes:
                groups[""].append(i)
            elif label in groups:
                groups[label].append(i)
        return cls(
            {label: places[::2] for label, places in groups.items()},
            {label: places[1::2] for label, places in groups.items()},
        )


class Tally:
    """The figures of one variant, compared with the original's."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        n = len(bench.classes)
        self.n = self.hits = self.lost = self.won = 0
        self.probability = torch.zeros(n, dtype=torch.float64)
        self.change = torch.zeros(n, dtype=torch.float64)
        self.own = self.kl = 0.0
        self.per_class = torch.zeros(n, 2, dtype=torch.int64)
        self.embeddings: list[Tensor] = []
        self.captioned: list[int] = []

    def add(
        self,
        embeddings: Float[Tensor, "batch d_embed"],
        original: Float[Tensor, "batch d_embed"],
        targets: Int[Tensor, " batch"],
        indices: Sequence[int],
        *,
        captions: bool,
    ) -> None:
        """Count images; either all or none of them have a class."""
        self.n += len(embeddings)
        if self.bench.weights is not None:
            scale = self.bench.model.logit_scale
            logs = [
                classify(x, self.bench.weights, scale).double().log_softmax(dim=1).cpu()
                for x in (embeddings, original)
            ]
            now, before = (log.exp() for log in logs)
            self.probability += now.sum(dim=0)
            self.change += (now - before).sum(dim=0)
            self.kl += float((before * (logs[1] - logs[0])).sum())
            if self.bench.targets:
                right, was_right = ((p.argmax(dim=1) == targets) for p in (now, before))
                self.hits += int(right.sum())
                self.won += int((right & ~was_right).sum())
                self.lost += int((was_right & ~right).sum())
                self.own += float(now.gather(1, targets[:, None]).sum())
                n = len(self.per_class)
                self.per_class[:, 0] += torch.bincount(targets[right], minlength=n)
                self.per_class[:, 1] += torch.bincount(targets, minlength=n)
        if captions:
            kept = [j for j, i in enumerate(indices) if i in self.bench.captions]
            self.embeddings.append(embeddings[kept].cpu())
            self.captioned += [indices[j] for j in kept]

    def result(self) -> dict[str, Any]:
        """Return the figures, JSON-able."""
        out: dict[str, Any] = {"n": self.n}
        if self.bench.weights is not None:
            names = self.bench.classes
            changes = dict(zip(names, (self.change / self.n).tolist(), strict=True))
            out |= {
                "kl": max(0.0, self.kl / self.n),
                "probability": dict(zip(names, (self.probability / self.n).tolist(), strict=True)),
                "change": changes,
                "most_raised": max(changes, key=lambda name: changes[name]),
                "most_lowered": min(changes, key=lambda name: changes[name]),
            }
        if self.bench.targets:
            difference, interval = paired_difference(self.lost, self.won, self.n)
            seen = self.per_class[:, 1] > 0
            shares = self.per_class[seen, 0].double() / self.per_class[seen, 1]
            out |= {
                "top1": self.hits / self.n,
                "interval": wilson_interval(self.hits, self.n),
                "difference": difference,
                "difference_interval": interval,
                "own_probability": self.own / self.n,
                "mean_of_classes": float(shares.mean()),
            }
        if self.captioned and sum(map(len, self.embeddings)) > 1:
            own = [self.bench.captions[i] for i in self.captioned]
            _, text_of = distinct(own)
            to_text, to_image = image_text_recall(
                torch.cat(self.embeddings), self.bench.texts(own), text_of
            )
            out |= {"image_to_text": to_text.to_dict(), "text_to_image": to_image.to_dict()}
        return out


class Bench:
    """Run variants over the images to measure on."""

    def __init__(
        self,
        model: VisionModel,
        images: ImageSource,
        site: str,
        halves: Halves,
        by_label: Mapping[str, str],
        weights: Float[Tensor, "classes d_embed"] | None,
        captions: Mapping[int, str],
    ) -> None:
        self.model, self.images, self.site = model, images, site
        self.classes = list(by_label)
        self.weights, self.captions = weights, captions
        self.by_class = halves.measure
        self.targets = "" not in halves.measure
        self.failed = 0
        self._texts: dict[tuple[str, ...], Tensor] = {}

    def texts(self, captions: Sequence[str]) -> Float[Tensor, "texts d_embed"]:
        """Return embeddings of the distinct captions, computed once."""
        found = tuple(distinct(captions)[0])
        if found not in self._texts:
            self._texts[found] = self.model.embed_texts(list(found)).cpu()
        return self._texts[found]

    def run(
        self,
        edits: Mapping[str, Callable[[Tensor], Tensor]],
        title: str,
        *,
        begin: Callable[[Int[Tensor, " batch"]], None] | None = None,
        captions: bool = True,
        settings: PassSettings | None = None,
    ) -> dict[str, Tally]:
        """Return tallies by variant, `original` first.

        Args:
            edits: edits of the site, by variant.
            title: title of the progress line.
            begin: called with the classes of the images that come next.
            captions: keep embeddings for retrieval.
            settings: settings of the pass over the images.

        Raises:
            UserError: no image is left to measure on.
        """
        class_of = {
            i: self.classes.index(label) if self.targets else 0
            for label, places in self.by_class.items()
            for i in places
        }
        tallies: dict[str, Tally] = {}
        with ImagePass(self.model, self.images, title, settings, classes=class_of) as seen:
            for batch in seen:
                targets = seen.classes_of(batch)
                found = self._embed(batch.pixels.to(self.model.device), targets, edits, begin)
                for name, x in found.items():
                    tally = tallies.setdefault(name, Tally(self))
                    tally.add(x, found["original"], targets, batch.indices, captions=captions)
        if not tallies:
            raise UserError(
                f"{self.images.spec}: no image is left to measure on. Half of each class is used "
                "to choose latents: give at least two images per class."
            )
        self.failed = len(seen.failures)
        return tallies

    def _embed(
        self,
        pixels: Tensor,
        targets: Int[Tensor, " batch"],
        edits: Mapping[str, Callable[[Tensor], Tensor]],
        begin: Callable[[Int[Tensor, " batch"]], None] | None,
    ) -> dict[str, Tensor]:
        """Call `embed_variants` for any number of variants."""
        found: dict[str, Tensor] = {}
        names = list(edits)
        for start in range(0, max(1, len(names)), VARIANTS):
            if begin is not None:
                begin(targets)
            chunk = {name: edits[name] for name in names[start : start + VARIANTS]}
            found |= embed_variants(self.model, pixels, self.site, chunk)
        return found
