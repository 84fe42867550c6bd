"""`measure_sweep`: all members of a sweep, measured on the same vectors, grouped over seeds.

FVU, L0 and dead latents come from one pass over the activations for all members of a site,
zero-shot accuracy from one pass of the model over images, stability from matching the dictionaries
of the seeds. The definitions are those of `evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor

from sparsight.activations import ActivationSource, LiveActivations, with_tokens
from sparsight.activations.sampling import sampled
from sparsight.config import check_positive
from sparsight.devices import choose_device
from sparsight.errors import MissingExtra, SparsightError, UserError
from sparsight.evaluation.data import (
    Passes,
    find_site,
    find_target,
    held_out,
    images_of,
    trained_on,
)
from sparsight.evaluation.downstream import Replacement, downstream, why_not
from sparsight.evaluation.reconstruction import ReconstructionMeter
from sparsight.evaluation.report import finite
from sparsight.evaluation.sparsity import SparsityMeter
from sparsight.evaluation.stability import stability
from sparsight.figures import shown_in
from sparsight.images import ImageSource
from sparsight.intervals import t_interval
from sparsight.progress import progress
from sparsight.sae import SparseAutoencoder
from sparsight.sae.files import WEIGHTS
from sparsight.training import Run, Sweep
from sparsight.vision import Tokens, VisionModel, names_by_label

FORMAT_VERSION = 1
LIVE_IMAGES = 2000
"""Default number of images if the model must run on them."""

ACCURACY_IMAGES = 2000
TOGETHER_BYTES = 4 << 30
"""Bytes of weights that one pass holds; more members take several passes."""

SEED = "seed"
STABILITY = "stability"


@dataclass(frozen=True)
class SweepMeasures:
    """How much of a sweep to measure.

    Attributes:
        max_images: number of images, a random sample; None means all images of a store, and 2,000
            if the model must run.
        accuracy_images: number of images for zero-shot accuracy, a random sample; 0 leaves it out.
        templates: sentences for zero-shot classification: `simple`, `openai80`, or one with {} in
            it.
        batch_images: images at a time.
        workers: processes that decode images.
    """

    max_images: int | None = None
    accuracy_images: int = ACCURACY_IMAGES
    templates: str = "simple"
    batch_images: int = 64
    workers: int | None = None

    def __post_init__(self) -> None:
        check_positive(max_images=self.max_images)
        if self.accuracy_images < 0:
            raise UserError(f"accuracy_images is {self.accuracy_images}; it must be 0 or more.")


@dataclass
class _Member:
    """An autoencoder of a sweep to be measured."""

    row: dict[str, Any]
    run: Run
    alive: Tensor | None = None
    group: str = field(default="")

    @property
    def site(self) -> str:
        return str(self.row["site"])

    @property
    def n_bytes(self) -> int:
        return (self.run.folder(self.site) / WEIGHTS).stat().st_size

    def sae(self, device: torch.device) -> SparseAutoencoder:
        return SparseAutoencoder.from_pretrained(self.run.folder(self.site), device=device)


def measure_sweep(
    sweep: Sweep,
    source: ActivationSource,
    measures: SweepMeasures | None = None,
    *,
    model: VisionModel | Callable[[], VisionModel] | None = None,
    images: ImageSource | None = None,
    previous: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure every member of a sweep on the same vectors; the result can be written as JSON.

    Args:
        sweep: the sweep.
        source: the activations: a store or live ones, with the positions of the members or all.
        measures: how much to measure.
        model: the model for zero-shot accuracy, or a function that loads it; default: that of live
            activations.
        images: the images for zero-shot accuracy; default: those of the activations.
        previous: the result of an earlier call; members in it are not measured again.
        device: "cpu", "cuda", …; a GPU if there is one.
        quiet: show no progress bars.

    Returns:
        `members`: one row per autoencoder, as in `Sweep.table`, with its figures; `groups`: one row
        per setting, over its seeds: `n` seeds, and for each figure `mean`, `interval` (Student's,
        95 %; None for one seed), `lowest` and `highest`, and `stability`; `original`: zero-shot
        accuracy of the unchanged model, by tokens and site; `omitted`: what was left out, and why.

    Raises:
        UserError: the activations are of another model than the members, or lack a site.
        SparsightError: an activation is not finite.
    """
    place = choose_device(device, float64=True)
    measures = measures or SweepMeasures()
    rows = sweep.table()
    members = [
        _Member(row, sweep.runs[row["name"]], group=_group_key(row))
        for row in rows
        if "diverged" not in row
    ]
    for each in members:
        each.row["tokens"] = str(each.run.recipe.tokens)
    about = {
        "images": source.model_info.get("images"),
        "activations": source.fingerprint,
        "max_images": measures.max_images,
        "sample": "random",
        "accuracy_images": measures.accuracy_images,
        "templates": measures.templates,
        "downstream_images": images.spec if images is not None else None,
    }
    known = _known(previous, about)
    todo = _unknown(members, known, place)
    original: dict[str, Any] = dict(known.get("original", {}))
    omitted: dict[str, str] = dict(known.get("omitted", {}))
    if todo:
        omitted.pop(STABILITY, None)
    getter = _Model(model or getattr(source, "model", None))
    for (tokens, site), part in _by_place(todo).items():
        whole = with_tokens(source, cast(Tokens, tokens))
        few = LIVE_IMAGES if isinstance(whole, LiveActivations) else None
        view = sampled(whole, measures.max_images or few)
        for together in _portions(part):
            saes = {str(i): each.sae(place) for i, each in enumerate(together)}
            _measure(view, site, together, saes, measures, quiet)
            found = _accuracy(whole, site, saes, measures, getter, images, omitted, quiet)
            for i, each in enumerate(together):
                each.row["accuracy"] = found.get(str(i), {}).get("top1")
                each.row["accuracy_difference"] = found.get(str(i), {}).get("difference")
            if "original" in found:
                original[f"{tokens}/{site}"] = found["original"]
    groups = _groups(members, known, omitted, place)
    table = {
        "format_version": FORMAT_VERSION,
        "measured": about,
        "members": rows,
        "groups": groups,
        "original": original,
        "omitted": omitted,
    }
    found = finite(table)
    assert isinstance(found, dict)
    return found


def _measure(
    source: ActivationSource,
    site: str,
    members: Sequence[_Member],
    saes: Mapping[str, SparseAutoencoder],
    measures: SweepMeasures,
    quiet: bool,
) -> None:
    """Measure FVU, L0 and dead latents of several SAEs in one pass."""
    first = next(iter(saes.values()))
    for each in saes.values():
        find_site(each, source, site)
    passes = Passes(
        source,
        site,
        target=find_target(first, source),
        batch_images=measures.batch_images,
        device=first.W_enc.device,
        cache_bytes=0,
    )
    layout = passes.layout
    errors = [
        ReconstructionMeter(
            layout.n_tokens, passes.d_out, passes.device, f"{each.row['name']}/{site}"
        )
        for each in members
    ]
    counts = [
        SparsityMeter(each.n_latents, layout.n_tokens, passes.device) for each in saes.values()
    ]
    with torch.no_grad(), progress("evaluate", passes.n_images, "images", quiet=quiet) as line:
        for batch in passes:
            x = batch.x.flatten(0, 1)
            for sae, error, count in zip(saes.values(), errors, counts, strict=True):
                y_hat, code = sae(x)
                error.add(batch.y, y_hat.view_as(batch.y))
                count.add(code)
            line.advance(len(batch.x))
    for member, sae, error, count in zip(members, saes.values(), errors, counts, strict=True):
        positions = layout.n_prefix, layout.has_cls
        figures = {**error.result(*positions), **count.result(*positions, None)}
        # The figures that training logged are over other vectors, so they go to `trained`.
        member.row["trained"] = {each.key: each.of(member.row) for each in shown_in("log")}
        shown = (each.key for each in shown_in("sweep"))
        member.row |= {key: figures[key] for key in shown if key in figures}
        member.row["trained_on_these"] = trained_on(sae, source)
        member.row["held_out"] = held_out(sae, source)
        member.row["dead_window"] = figures["dead_window"]
        member.row["n_latents"] = sae.n_latents
        member.row["n_vectors"] = count.n_vectors
        member.alive = (count.n_active > 0).cpu()
        member.row["n_alive"] = int(member.alive.sum())


class _Model:
    """A model that is loaded when it is first needed."""

    def __init__(self, given: VisionModel | Callable[[], VisionModel] | None) -> None:
        self._given = given

    def get(self) -> VisionModel | None:
        if self._given is not None and not isinstance(self._given, VisionModel):
            self._given = self._given()
        return self._given


def _accuracy(
    source: ActivationSource,
    site: str,
    saes: Mapping[str, SparseAutoencoder],
    measures: SweepMeasures,
    getter: _Model,
    images: ImageSource | None,
    omitted: dict[str, str],
    quiet: bool,
) -> dict[str, dict[str, Any]]:
    """Measure zero-shot accuracy with the site replaced by each SAE, in one pass of the model."""
    reason: str | None = None
    whole: ImageSource | None = None
    if next(iter(saes.values())).is_transcoder:
        reason = "A transcoder's output belongs to another site than its input."
    elif not measures.accuracy_images:
        reason = "accuracy_images is 0."
    else:
        try:
            whole = images or source.source()
            images = images or images_of(source)
        except (SparsightError, OSError) as error:
            reason = str(error)
    names = names_by_label(whole.labels() if whole is not None else [], None)
    if reason is None and not names:
        reason = "The images have no labels."
    model = None
    if reason is None:
        try:
            model = getter.get()
        except (SparsightError, OSError) as error:
            reason = str(error)
        reason = reason or why_not(model, images, source.tokens)
    expected = source.model_info.get("weights_hash")
    if model is not None and expected and model.weights_hash != expected:
        # A note, not an error: the figures so far may have taken hours.
        reason = (
            f"The activations are from {source.model_info.get('id')}, but the model is {model.id}, "
            "whose weights differ."
        )
    what = f"accuracy, {source.tokens}/{site}"
    omitted.pop(what, None)
    if reason is not None or model is None or images is None:
        omitted[what] = str(reason)
        return {}
    chosen = images.sample(measures.accuracy_images)
    found = downstream(
        model,
        chosen,
        site,
        source.tokens,
        {name: _reconstruct(sae) for name, sae in saes.items()},
        class_names=names,
        templates=measures.templates,
        batch_images=measures.batch_images,
        workers=measures.workers,
        quiet=quiet,
    )
    if "zero_shot" in found.omitted:
        omitted[what] = found.omitted["zero_shot"]
    return found.zero_shot


def _reconstruct(sae: SparseAutoencoder) -> Replacement:
    def reconstruct(x: Tensor) -> Tensor:
        found: Tensor = sae(x.to(sae.W_enc.device)).x_hat
        return found.to(x.device)

    return reconstruct


def _groups(
    members: Sequence[_Member],
    known: Mapping[str, Any],
    omitted: dict[str, str],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Group the members that differ only in their seed, with intervals over the seeds."""
    parts: dict[str, list[_Member]] = {}
    for each in members:
        parts.setdefault(each.group, []).append(each)
    before = {_member_key(group): group.get(STABILITY) for group in known.get("groups", ())}
    rows = []
    for part in parts.values():
        first = part[0].row
        row: dict[str, Any] = {
            "site": first["site"],
            "tokens": first["tokens"],
            "settings": _without_seed(first["settings"]),
            "n": len(part),
            "members": [each.row["name"] for each in part],
            "saes": [each.row["sae"] for each in part],
            "n_latents": first["n_latents"],
        }
        for figure in shown_in("sweep"):
            values = [each.row[figure.key] for each in part if figure.of(each.row) is not None]
            if len(values) == len(part):
                row[figure.key] = {
                    "mean": fmean(values),
                    "interval": t_interval(values, *figure.range),
                    "lowest": min(values),
                    "highest": max(values),
                }
        if len(part) > 1:
            key = _member_key(row)
            row[STABILITY] = (
                before.get(key)
                if all(each.alive is None for each in part)
                else _stability(part, omitted, device)
            )
        rows.append(row)
    return rows


def _stability(
    members: Sequence[_Member], omitted: dict[str, str], device: torch.device
) -> dict[str, Any] | None:
    try:
        dictionaries = [each.sae(device).W_dec.detach() for each in members]
        alive = [each.alive for each in members if each.alive is not None]
        return stability(dictionaries, alive)
    except MissingExtra as error:
        omitted[STABILITY] = str(error)
    except UserError as error:  # no latents are alive
        omitted[f"stability, {members[0].row['name']}/{members[0].site}"] = str(error)
    return None


def _known(previous: Mapping[str, Any] | None, about: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what an earlier call measured in the same way."""
    if not previous or previous.get("format_version") != FORMAT_VERSION:
        return {}
    return previous if previous.get("measured") == json.loads(json.dumps(about)) else {}


def _unknown(
    members: Sequence[_Member], known: Mapping[str, Any], device: torch.device
) -> list[_Member]:
    """Return the members to measure; the others get their known figures.

    If one seed of a group is new, all are measured: matching them needs their alive latents.
    """
    rows = {(row["name"], row["site"]): row for row in known.get("members", ())}
    fresh = set()
    for each in members:
        fingerprint = each.sae(torch.device("cpu")).fingerprint()
        row = rows.get((each.row["name"], each.site), {})
        if row.get("sae") != fingerprint:
            fresh.add(each.group)
        else:
            each.row |= row
        each.row["sae"] = fingerprint
    install = STABILITY in known.get("omitted", {}) and find_spec("scipy") is not None
    matched = {
        _member_key(group)
        for group in known.get("groups", ())
        if STABILITY in group and not (install and group[STABILITY] is None)
    }
    parts: dict[str, list[_Member]] = {}
    for each in members:
        parts.setdefault(each.group, []).append(each)
    for group, part in parts.items():
        key = _member_key({"saes": [each.row["sae"] for each in part]})
        if len(part) > 1 and key not in matched:
            fresh.add(group)
    return [each for each in members if each.group in fresh]


def _by_place(members: Sequence[_Member]) -> dict[tuple[str, str], list[_Member]]:
    found: dict[tuple[str, str], list[_Member]] = {}
    for each in members:
        found.setdefault((each.row["tokens"], each.site), []).append(each)
    return found


def _portions(members: Sequence[_Member]) -> Iterator[list[_Member]]:
    """Split the members into portions whose weights fit together."""
    portion: list[_Member] = []
    for each in members:
        if portion and sum(one.n_bytes for one in (*portion, each)) > TOGETHER_BYTES:
            yield portion
            portion = []
        portion.append(each)
    if portion:
        yield portion


def _without_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != SEED}


def _group_key(row: Mapping[str, Any]) -> str:
    return json.dumps([row["site"], _without_seed(row["settings"])], sort_keys=True)


def _member_key(group: Mapping[str, Any]) -> str:
    return " ".join(sorted(group["saes"]))
