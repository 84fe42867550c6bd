"""Turn latents up and down, and see what the model makes of the pictures."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.config import check_positive
from sparsight.editing.actions import Off, Scale, Set
from sparsight.editing.class_codes import ClassCodes, class_codes, matched_latents
from sparsight.editing.edits import NO_SITE, LatentEdit, Positions
from sparsight.editing.interventions import (
    WHERE,
    Change,
    CodeMemo,
    active_change,
    added,
    check_site,
    frozen,
    interventions,
    units,
)
from sparsight.editing.recall import distinct, image_text_recall
from sparsight.errors import UserError
from sparsight.images import ImageSource, load_batches
from sparsight.intervals import paired_difference, wilson_interval
from sparsight.progress import progress
from sparsight.sae import SparseAutoencoder
from sparsight.vision import (
    VisionModel,
    classifier_weights,
    classify,
    embed_variants,
    names_by_label,
)

VARIANTS = 64
"""Variants of a picture that are in memory at a time."""

STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
Unit = Literal["max", "absolute", "factor"]
"""What a strength of 1 is: the latent's largest activation; an activation of 1; or a factor on
whatever its activation is."""


@dataclass(frozen=True)
class SteerReport:
    """What came of steering.

    Attributes:
        about: model, SAE, site, tokens, images, sentences, how many images.
        original: figures of the model as it is.
        latents: for each latent a list of figures by strength.
        curves: figures with only the k strongest latents of each class, or without them; empty if
            left out.
        omitted: what was left out, and why.
    """

    about: dict[str, Any]
    original: dict[str, Any]
    latents: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    omitted: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return dict(vars(self))


@dataclass(frozen=True)
class _Halves:
    """Images to choose latents on, and others to measure on."""

    choose: dict[str, list[int]]
    measure: dict[str, list[int]]

    @classmethod
    def of(cls, labels: Sequence[str | None], classes: Sequence[str]) -> _Halves:
        """Every other image of each class; without classes, of all."""
        groups: dict[str, list[int]] = {label: [] for label in classes} or {"": []}
        for i, label in enumerate(labels):
            if not classes:
                groups[""].append(i)
            elif label in groups:
                groups[label].append(i)
        return cls(
            {label: found[::2] for label, found in groups.items()},
            {label: found[1::2] for label, found in groups.items()},
        )


@torch.no_grad()
def steer(
    model: VisionModel,
    images: ImageSource,
    sae: SparseAutoencoder,
    latents: Sequence[int] = (),
    *,
    strengths: Sequence[float] = STRENGTHS,
    unit: Unit = "max",
    site: str | None = None,
    tokens: Positions | None = None,
    class_names: Sequence[str] | Mapping[str, str] | None = None,
    templates: str | Sequence[str] = "openai80",
    curves: bool = True,
    ks: Sequence[int] | None = None,
    names: Mapping[int, str] | None = None,
    max_images: int | None = None,
    batch_images: int = 64,
    workers: int | None = None,
    seed: int = 0,
    check: bool = True,
    quiet: bool = True,
) -> SteerReport:
    """Measure zero-shot probabilities and retrieval over a range of strengths of some latents, and
    accuracy with only, or without, the latents of each class.

    Every other image of a class serves to choose (the classes' latents, the largest activations),
    the others to measure.

    The curves are those of PatchSAE (Lim et al. 2025, "Sparse autoencoders reveal selective
    remapping of visual concepts during adaptation", section 3.3): a class's latents are those with
    the largest mean activation over its images; on-k keeps only the k first of them, off-k switches
    them off, and accuracy is over all classes. Beside them stand as many random latents of equal
    density. Edits keep what the SAE does not reconstruct.

    Args:
        model: one with a text tower.
        images: with labels for probabilities of their own class, with captions for retrieval.
        sae: an autoencoder.
        latents: which to steer, each by itself.
        strengths: in `unit`; 0 switches a latent off (unit "factor", too).
        unit: see `Unit`; "max" and "absolute" set the latent at every position that is edited.
        site: default that of the SAE.
        tokens: default those of the SAE.
        class_names: see `sparsight.vision.zero_shot`.
        templates: see `sparsight.vision.classifier_weights`.
        curves: measure the on-k and off-k curves, too.
        ks: of the curves; default 1, 2, 5, 10, … and all latents.
        names: of latents, for the report.
        max_images: only the first so many images.
        batch_images: images at a time.
        workers: processes that decode.
        seed: of the random latents.
        check: see `intervene`.
        quiet: no progress line.

    Raises:
        UserError: model, images, SAE and latents do not fit each other, or there is nothing to
            measure.
    """
    check_positive(max_images=max_images, batch_images=batch_images)
    asked_ks = _checked_ks(ks, sae.n_latents)
    total = len(images) if max_images is None else min(max_images, len(images))
    infos = [images.info(i) for i in range(total)]
    labels = sorted({each.label for each in infos if each.label})
    by_label = names_by_label(labels, class_names)
    known = [label for label in by_label if label in set(labels)]
    halves = _Halves.of([each.label for each in infos], known)
    captions = {i: each.caption for i, each in enumerate(infos) if each.caption}
    omitted = _omitted(model, images, by_label, known, captions, curves)
    plan = LatentEdit(sae, list(latents), Off(), site, tokens)
    if plan.site is None:
        raise UserError(NO_SITE)
    if not latents and ("curves" in omitted or not curves):
        raise UserError(
            "Nothing to steer: name latents (by number or by name), or take images with labels, "
            "for which the curves of their classes can be drawn."
        )
    _check_strengths(strengths)
    where = check_site(model, plan, check=check)
    assert plan.tokens is not None
    each_class = class_codes(
        model, images, sae, where, _position(model, where, plan.tokens), halves.choose,
        batch_images=batch_images, workers=workers, quiet=quiet,
    )  # fmt: skip
    weights = classifier_weights(model, list(by_label.values()), templates) if by_label else None
    bench = _Bench(model, images, where, halves, by_label, weights, captions)
    settings: dict[str, Any] = {"batch_images": batch_images, "workers": workers, "quiet": quiet}

    unit_of = _units(each_class, latents, unit)
    edits: dict[str, LatentEdit] = {}
    for latent in latents:
        for strength in strengths:
            action = Scale(strength) if unit == "factor" else Set(strength * unit_of[latent])
            edits[f"{latent} {strength}"] = LatentEdit(sae, [latent], action, where, plan.tokens)
    memo = CodeMemo()
    made = {
        name: interventions(model, edit, check=check, memo=memo)[where]
        for name, edit in edits.items()
    }
    tallies = bench.run(made, "steering", **settings)
    original = tallies.pop("original").result()
    rows = []
    for latent in latents:
        found = []
        for strength in strengths:
            figures = tallies[f"{latent} {strength}"].result()
            # A factor makes another activation of each.
            value = None if unit == "factor" else strength * unit_of[latent]
            found.append({"strength": strength, "activation": value, **figures})
        rows.append(
            {
                "latent": int(latent),
                "name": (names or {}).get(int(latent)),
                "unit": unit_of[latent],
                "density": float(each_class.density[latent]),
                "strengths": found,
            }
        )
    shown = []
    if curves and "curves" not in omitted:
        shown = _curves(bench, sae, where, plan.tokens, each_class, asked_ks, seed, **settings)
    about = {
        "model": {"id": model.id, "weights_hash": model.weights_hash},
        "sae": sae.fingerprint(),
        "site": where,
        "tokens": plan.tokens,
        "images": images.spec,
        "templates": templates if isinstance(templates, str) else list(templates),
        "n_classes": len(by_label),
        "n_choose": int(each_class.n_images.sum()),
        "n_measure": sum(map(len, halves.measure.values())) - bench.failed,
        "failed": each_class.failed + bench.failed,
        "strength": unit,
        "seed": seed,
    }
    return SteerReport(about, original, rows, shown, omitted)


def _checked_ks(ks: Sequence[int] | None, n_latents: int) -> list[int]:
    asked = sorted(set(ks)) if ks is not None else default_ks(n_latents)
    if not asked or asked[0] < 1 or asked[-1] > n_latents:
        raise UserError(f"ks are {asked}; give numbers from 1 to {n_latents}.")
    return asked


def default_ks(n_latents: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … up to all latents."""
    steps = [m * 10**e for e in range(int(math.log10(n_latents)) + 1) for m in (1, 2, 5)]
    return [k for k in steps if k < n_latents] + [n_latents]


class _Tally:
    """Figures of one variant beside the original's."""

    def __init__(self, bench: _Bench) -> None:
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
        """Count images, of which all or none have a class."""
        self.n += len(embeddings)
        if self.bench.weights is not None:
            scale = self.bench.model.logit_scale
            logs = [
                classify(x, self.bench.weights, scale).double().log_softmax(dim=1).cpu()
                for x in (embeddings, original)
            ]
            now, before = (each.exp() for each in logs)
            self.probability += now.sum(dim=0)
            self.change += (now - before).sum(dim=0)
            self.kl += float((before * (logs[1] - logs[0])).sum())
            if self.bench.targets:
                right, was = ((each.argmax(dim=1) == targets) for each in (now, before))
                self.hits += int(right.sum())
                self.won += int((right & ~was).sum())
                self.lost += int((was & ~right).sum())
                self.own += float(now.gather(1, targets[:, None]).sum())
                n = len(self.per_class)
                self.per_class[:, 0] += torch.bincount(targets[right], minlength=n)
                self.per_class[:, 1] += torch.bincount(targets, minlength=n)
        if captions:
            kept = [j for j, i in enumerate(indices) if i in self.bench.captions]
            self.embeddings.append(embeddings[kept].cpu())
            self.captioned += [indices[j] for j in kept]

    def result(self) -> dict[str, Any]:
        """JSON-able figures."""
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


class _Bench:
    """Runs variants over the images to measure on, class by class."""

    def __init__(
        self,
        model: VisionModel,
        images: ImageSource,
        site: str,
        halves: _Halves,
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
        """Embeddings of the different ones, made once."""
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
        batch_images: int,
        workers: int | None,
        quiet: bool,
    ) -> dict[str, _Tally]:
        """Tallies by variant, `original` first.

        Args:
            edits: of the site, by variant.
            title: of the progress line.
            begin: told the classes of the images that come next.
            captions: keep embeddings for retrieval.
            batch_images: images at a time.
            workers: processes that decode.
            quiet: no progress line.
        """
        class_of = {
            i: self.classes.index(label) if self.targets else 0
            for label, found in self.by_class.items()
            for i in found
        }
        tallies: dict[str, _Tally] = {}
        failed = 0
        with progress(title, len(class_of), "images", quiet=quiet) as line:
            for batch in load_batches(
                self.images,
                self.model.transform,
                batch_images,
                indices=sorted(class_of),
                workers=workers,
                min_side=self.model.min_side,
            ):
                failed += len(batch.failures)
                if batch.indices:
                    targets = torch.tensor([class_of[i] for i in batch.indices])
                    found = self._embed(batch.pixels.to(self.model.device), targets, edits, begin)
                    for name, x in found.items():
                        tally = tallies.setdefault(name, _Tally(self))
                        tally.add(x, found["original"], targets, batch.indices, captions=captions)
                line.advance(len(batch.indices) + len(batch.failures))
        if not tallies:
            raise UserError(
                f"{self.images.spec}: no image is left to measure on ({len(class_of)} listed, "
                f"{failed} broken). Every other image of a class serves to choose: give at least "
                "two."
            )
        self.failed = failed
        return tallies

    def _embed(
        self,
        pixels: Tensor,
        targets: Int[Tensor, " batch"],
        edits: Mapping[str, Callable[[Tensor], Tensor]],
        begin: Callable[[Int[Tensor, " batch"]], None] | None,
    ) -> dict[str, Tensor]:
        """`embed_variants`, of any number of variants."""
        found: dict[str, Tensor] = {}
        names = list(edits)
        for start in range(0, max(1, len(names)), VARIANTS):
            if begin is not None:
                begin(targets)
            some = {name: edits[name] for name in names[start : start + VARIANTS]}
            found |= embed_variants(self.model, pixels, self.site, some)
        return found


class _ByClass:
    """Edits that keep, or drop, latents by the class of each image.

    Args:
        sae: the SAE.
        where: positions that are changed.
        ranks: for each class, and each way to choose, the place of every latent in its order.
    """

    def __init__(
        self, sae: SparseAutoencoder, where: slice, ranks: Mapping[str, Int[Tensor, "classes n"]]
    ) -> None:
        self.sae, self.where, self.ranks = sae, where, ranks
        self._memo = CodeMemo()
        self._classes: Tensor = torch.zeros(0, dtype=torch.int64)
        self._seen: weakref.ref[Tensor] | None = None
        self._next, self._here = 0, slice(0, 0)

    def begin(self, classes: Int[Tensor, " batch"]) -> None:
        """Say of which classes the images are that come next, in order."""
        self._classes, self._seen, self._next = classes, None, 0

    def edit(self, kind: str, chosen: str, k: int) -> Callable[[Tensor], Tensor]:
        """The edit for one point of a curve."""

        def apply(x: Tensor) -> Tensor:
            classes = self._of(x)
            part = x[:, self.where]
            vectors = part.flatten(0, 1).to(self.sae.W_dec.dtype)
            code = self._memo.code(x, (0, ""), lambda: self.sae.encode(vectors))
            rank = self.ranks[chosen][classes[code.rows // part.shape[1]], code.indices]
            hit = rank >= k if kind == "on" else rank < k
            z, changed = active_change(self.sae, code, hit, -code.values[hit])
            delta = (z * units(self.sae, code.frame)).view(part.shape)
            return added(x, [(self.where, Change(delta, changed.view(*part.shape[:2], 1)))])

        return apply

    def _of(self, x: Tensor) -> Tensor:
        """Classes of the images in x: those behind the last tensor's, or the whole batch again."""
        if self._seen is None or self._seen() is not x:
            self._seen = weakref.ref(x)
            start = self._next if self._next < len(self._classes) else 0
            self._here, self._next = slice(start, start + len(x)), start + len(x)
        return self._classes[self._here].to(x.device)


def _curves(
    bench: _Bench,
    sae: SparseAutoencoder,
    site: str,
    tokens: Positions,
    found: ClassCodes,
    ks: Sequence[int],
    seed: int,
    **settings: Any,
) -> list[dict[str, Any]]:
    """On-k and off-k for the latents of the classes, and for random ones of equal density."""
    n = sae.n_latents
    by_class = torch.zeros(len(bench.classes), n, dtype=torch.int64)
    by_class[[bench.classes.index(label) for label in found.classes]] = found.strongest()
    orders = {"class": by_class, "random": matched_latents(found.density, seed)[by_class]}
    device = bench.model.device
    ranks = {name: order.argsort(dim=1).to(device) for name, order in orders.items()}
    where = slice(None)
    if bench.model.token_count(site, "all") > 1:
        where = WHERE[tokens](bench.model.n_prefix)
    edits = _ByClass(frozen(sae).to(device), where, ranks)
    variants = {
        f"{kind} {chosen} {k}": edits.edit(kind, chosen, k)
        for kind in ("on", "off")
        for chosen in orders
        for k in ks
    }
    tallies = bench.run(variants, "curves", begin=edits.begin, captions=False, **settings)
    keys = ("top1", "interval", "difference", "difference_interval", "mean_of_classes", "n")
    rows = []
    for name, tally in tallies.items():
        figures = tally.result()
        kind, chosen, k = (*name.split(), "", "")[:3]
        row: dict[str, Any] = {"kind": kind, "latents": chosen or None, "k": int(k) if k else None}
        rows.append(row | {key: figures[key] for key in keys})
    return rows


def _units(found: ClassCodes, latents: Sequence[int], unit: Unit) -> dict[int, float]:
    """The activation that a strength of 1 stands for."""
    if unit != "max":
        return dict.fromkeys(latents, 1.0)
    units = {latent: float(found.highest[latent]) for latent in latents}
    never = [latent for latent, value in units.items() if value <= 0]
    if never:
        raise UserError(
            f"Latent {never[0]} is not active on any of the {int(found.n_images.sum())} images "
            "that its largest activation is taken from. Take more images, or unit 'absolute'."
        )
    return units


def _check_strengths(strengths: Sequence[float]) -> None:
    if not strengths or not all(math.isfinite(each) for each in strengths):
        raise UserError(f"strengths are {tuple(strengths)}; give finite numbers, at least one.")
    if len(set(strengths)) < len(strengths):
        raise UserError(f"strengths are {tuple(strengths)}; one is given twice.")


def _position(model: VisionModel, site: str, tokens: Positions) -> Positions:
    return "all" if model.token_count(site, "all") == 1 else tokens


def _omitted(
    model: VisionModel,
    images: ImageSource,
    by_label: Mapping[str, str],
    known: Sequence[str],
    captions: Mapping[int, str],
    curves: bool,
) -> dict[str, str]:
    if not model.has_text:
        raise UserError(
            f"{model.id} has no text tower, so that there are no probabilities and no retrieval."
        )
    omitted = {}
    if not known:
        reason = f"{images.spec} has no labels." if not by_label else "No image has a known label."
        omitted["accuracy"] = reason
        if curves:
            omitted["curves"] = reason
    if not by_label:
        omitted["probabilities"] = f"{images.spec} has no labels, and class_names was not given."
    if len(set(captions.values())) < 2:
        omitted["retrieval"] = f"{images.spec} has no captions."
    if not by_label and "retrieval" in omitted:
        raise UserError(
            f"{images.spec} has neither labels nor captions: there is nothing to measure. Give "
            "class_names, or a table of labels."
        )
    return omitted
