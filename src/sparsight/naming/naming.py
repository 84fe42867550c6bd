"""`name_latents`: names for the latents of an index, by several methods, with a null."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsight.activations import ActivationSource
from sparsight.config import check_seed
from sparsight.errors import UserError
from sparsight.images import ImageSource
from sparsight.latents import LatentIndex
from sparsight.latents.image_records import image_records
from sparsight.latents.index_files import EMBEDDINGS
from sparsight.latents.names import TRUTH_SOURCE, names_from_truth, names_of
from sparsight.naming.image_space import ImageSpace, check_words, embedded
from sparsight.naming.labels import MIN_PRECISION
from sparsight.naming.methods import METHODS, NEED_TEXT, Material
from sparsight.naming.names_file import TRUTH, NameTable, precedence
from sparsight.naming.null import Null, UntrainedLatents, alive, check_rate, fit_null
from sparsight.naming.scores import Candidates, LatentActivations, Method
from sparsight.naming.untrained import ENOUGH_LATENTS, untrained_activations
from sparsight.naming.vlm import Answers, ask_about_latents, phrase_vocabulary
from sparsight.naming.vlm_client import VlmSettings
from sparsight.naming.vocabulary import Vocabulary, open_vocabulary
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel
from sparsight.vision.passes import PassSettings

FALSE_NAMES = 0.05


@dataclass(frozen=True)
class NamingResult:
    """What `name_latents` found.

    Attributes:
        index: the index with its names.
        methods: the methods of this call.
        named: latents that got a name, per method.
        judged: latents that fire in enough images for a name.
        null: thresholds and measured rate of false names; None if only the truth was asked.
        answers: what a vision-language model has said; None if none was asked.
    """

    index: LatentIndex
    methods: tuple[str, ...]
    named: Mapping[str, int]
    judged: int
    null: Null | None
    answers: Answers | None = None

    @property
    def names(self) -> NameTable:
        """All rows of `names.parquet`."""
        return NameTable.of(self.index)


@torch.no_grad()
def name_latents(
    index: LatentIndex,
    sae: SparseAutoencoder,
    activations: ActivationSource | None = None,
    *,
    by: Sequence[str] = (),
    model: VisionModel | None = None,
    text_model: VisionModel | None = None,
    images: ImageSource | None = None,
    vocabulary: Vocabulary | str | Path | None = None,
    vlm: VlmSettings | None = None,
    false_names: float = FALSE_NAMES,
    min_precision: float = MIN_PRECISION,
    metrics: Mapping[str, Any] | None = None,
    seed: int = 0,
    settings: PassSettings | None = None,
) -> NamingResult:
    """Name latents, and write the names into the index.

    A latent gets a name only if it fires in `MIN_IMAGES` images, and if the name's score beats the
    threshold that latents of an untrained SAE of the same shape, on the same images, hardly ever
    reach (see `fit_null`). Rows of other methods in `names.parquet` are kept. If the process is
    killed at any point, the index has all old or all new names.

    Args:
        index: index of the SAE, format version 2.
        sae: the SAE.
        activations: activations of the images of the index, stored or live; untrained SAEs encode
            them. Only `truth` needs none.
        by: methods: labels, text, centroid, causal, vlm, truth; default: `labels` if the images
            have labels, and `text` if a model with texts is given.
        model: the SAE's own model.
        text_model: a model with a text tower, if `model` has none; it embeds the images once.
        images: the images; default: those of the index. Only for methods that need texts.
        vocabulary: the words; see `open_vocabulary`. Default: `calibration` for the calibration
            model, otherwise `visual`.
        vlm: a vision-language model that proposes phrases, for `vlm`; they are judged with a model
            that has a text tower.
        false_names: share of untrained latents that may get a name, all methods of one call
            together.
        min_precision: lowest held-out share of images with the label, for names by label.
        metrics: result of `evaluate` on calibration images, for `truth`.
        seed: seed of halves, samples and untrained SAEs.
        settings: batch size, workers and quiet of the pass that embeds images.

    Raises:
        UserError: a number is out of range, the index is of another SAE or has format version 1, a
            method is unknown or lacks what it needs, or there are too few untrained latents for the
            rate.
    """
    check_seed(seed)
    check_rate(false_names)
    if not 0 <= min_precision <= 1:
        raise UserError(f"--min-precision is {min_precision}; it must lie between 0 and 1.")
    index.check_sae(sae)
    settings = settings or PassSettings()
    wanted = _methods(by, index, text_model or model)
    table = NameTable.of(index)
    truth = _names_by_truth(index, metrics) if TRUTH in wanted else {}
    found = [method for method in wanted if method != TRUTH]
    null, named, answers = None, {}, None
    rows = LatentActivations(sae, np.arange(sae.n_latents), index.by_latent)
    if found:
        if activations is None:
            raise UserError(
                f"{index.folder}: names need activations, with which to compare the SAE with an "
                "untrained one; codes do not suffice. Give --store, or --model and --images."
            )
        texts = _Texts(model, text_model, images, vocabulary, vlm)
        with _material(index, sae, found, texts, min_precision, seed, settings) as material:
            answers = material.answers
            methods = [METHODS[name](material) for name in found]
            untrained = _untrained(index, sae, activations, seed, settings.quiet)
            null = fit_null(methods, untrained, false_names)
            for place, method in enumerate(null.methods):
                own = _rows(rows, method, null.thresholds[place])
                named[method.name] = sum(row["accepted"] for row in own)
                about = _about(null, place, seed, material)
                table = table.with_method(method.name, own, about)
    if TRUTH in wanted:
        own = _truth_rows(truth, index.n_latents)
        named[TRUTH] = len(truth)
        table = table.with_method(TRUTH, own, {"n_named": len(truth)})
    elif TRUTH not in table.about:
        table = _with_old_truth(table, index)
    index = table.showing(wanted).write(index)
    return NamingResult(index, tuple(wanted), named, len(alive(rows)), null, answers)


def forget_names(index: LatentIndex, methods: Sequence[str] = ()) -> LatentIndex:
    """Drop the names that some methods have given, or all names.

    Args:
        index: the index.
        methods: the methods; default: all, and the names that a person has set are dropped, too.

    Raises:
        UserError: one of the methods has given no names.
    """
    index = index.latest()
    if not methods:
        empty = NameTable.of_nothing()
        return empty.write(index, keep_others=False)
    table = NameTable.of(index)
    missing = [method for method in methods if method not in table.about]
    if missing:
        raise UserError(
            f"{index.folder}: has no names by {missing[0]!r} to forget; it has names by "
            f"{', '.join(table.methods()) or 'no method'}."
        )
    return table.without(methods).write(index)


def _methods(by: Sequence[str], index: LatentIndex, text: VisionModel | None) -> list[str]:
    """Return the methods of a call, by precedence, after checking them."""
    known = [*METHODS, TRUTH]
    unknown = [method for method in by if method not in known]
    if unknown:
        raise UserError(f"No naming method {unknown[0]!r}; there are {', '.join(known)}.")
    wanted = list(dict.fromkeys(by))
    if not by:
        if len(set(index.images["label"].to_pylist()) - {None}) > 1:
            wanted.append("labels")
        if text is not None and text.has_text:
            wanted.append("text")
    if not wanted:
        raise UserError(
            f"{index.folder}: nothing to name latents with: the images have no labels, and no "
            "model with a text tower is given. Give one with --text-model."
        )
    return sorted(wanted, key=precedence)


@dataclass(frozen=True)
class _Texts:
    """What the user gave for methods that compare images with words."""

    model: VisionModel | None
    text_model: VisionModel | None
    images: ImageSource | None
    vocabulary: Vocabulary | str | Path | None
    vlm: VlmSettings | None = None

    @property
    def chosen(self) -> VisionModel:
        """The model that embeds images and words.

        Raises:
            UserError: there is none, or it has no text tower.
        """
        model = self.text_model or self.model
        if model is None:
            raise UserError(
                "Names by text, and phrases of a vision-language model, are judged with a model "
                "that has a text tower; give --text-model."
            )
        check_words(model)
        return model

    def words(self) -> Vocabulary:
        """Open the vocabulary."""
        if isinstance(self.vocabulary, Vocabulary):
            return self.vocabulary
        default = "calibration" if self.chosen.id == "calibration" else "visual"
        return open_vocabulary(self.vocabulary or default)

    def ask(self, index: LatentIndex, seed: int, quiet: bool) -> Answers:
        """Ask the vision-language model about latents.

        Raises:
            UserError: none was given, or it does not answer.
        """
        if self.vlm is None:
            raise UserError(
                "Names by a vision-language model need its address and name; give --vlm-url, such "
                "as http://localhost:8000/v1, and --vlm-model."
            )
        return ask_about_latents(index, self.vlm, seed, quiet=quiet)


@contextmanager
def _material(
    index: LatentIndex,
    sae: SparseAutoencoder,
    methods: Sequence[str],
    texts: _Texts,
    min_precision: float,
    seed: int,
    settings: PassSettings,
) -> Iterator[Material]:
    """Collect what the methods are made from; embed images only if a method needs it."""
    if not set(methods) & set(NEED_TEXT):
        yield Material(index, sae, min_precision, seed, settings)
        return
    model, vocabulary = texts.chosen, texts.words()
    source = texts.images or index.source()
    about = index.manifest["images"]
    if source.fingerprint() != about["fingerprint"]:
        raise UserError(
            f"{source.spec}: has {len(source):,} images, which are not the {index.n_places:,} of "
            f"{about['source']} from which the index was built. Put those back, or build the index "
            "again with `sparsight index`."
        )
    answers = texts.ask(index, seed, settings.quiet) if "vlm" in methods else None
    with _space(index, model, source, settings) as space:
        yield Material(
            index,
            sae,
            min_precision,
            seed,
            settings,
            space,
            vocabulary,
            model,
            texts.model,
            source,
            answers,
        )


def _space(
    index: LatentIndex, model: VisionModel, source: ImageSource, settings: PassSettings
) -> AbstractContextManager[ImageSpace]:
    """Give the embedded images: those of the index, if this model made them; else embed them."""
    same = model.weights_hash == index.manifest["model"].get("weights_hash")
    if same and index.file(EMBEDDINGS) is not None and index.embeddings.kind == "joint":
        stored = index.embeddings
        return nullcontext(ImageSpace(stored.matrix, stored.places, index.n_places))
    return embedded(model, source, index.image_places, settings)


def _untrained(
    index: LatentIndex,
    sae: SparseAutoencoder,
    activations: ActivationSource,
    seed: int,
    quiet: bool,
) -> UntrainedLatents:
    """Encode the images of the index with untrained SAEs, half of them for the check."""
    if image_records(activations).fingerprint != index.manifest["images"]["fingerprint"]:
        raise UserError(
            f"{index.folder}: was built from {index.manifest['images']['source']}; the activations "
            "are of other images. Give those of the index."
        )
    l0 = float(np.nansum(index.table["density"].to_numpy()))
    seeds = null_seeds(seed, sae.n_latents)
    found = untrained_activations(
        sae, activations, index.site, l0, seeds, index.n_places, quiet=quiet
    )
    half = len(found) // 2
    one, other = (LatentActivations.joined(part) for part in (found[:half], found[half:]))
    return UntrainedLatents.of(one, other)


def null_seeds(seed: int, n_latents: int) -> list[int]:
    """Return the seeds of the untrained SAEs: half for the thresholds, half for the check.

    They are not those of training runs, whose SAEs may have begun with the same weights.
    """
    n = 2 * max(1, -(-ENOUGH_LATENTS // n_latents))
    return [int(each) for each in np.random.SeedSequence([seed, 0x6E616D65]).generate_state(n)]


def _about(null: Null, place: int, seed: int, material: Material) -> dict[str, Any]:
    """Return what `names.parquet` records about a method's null."""
    method = null.methods[place]
    about: dict[str, Any] = {
        "asked": null.asked,
        "asked_for": [each.name for each in null.methods],
        "measured": null.false_names[place] / null.n_check,
        "measured_together": null.measured,
        "interval_together": list(null.interval),
        "threshold": null.thresholds[place],
        "n_threshold": null.n_threshold,
        "n_check": null.n_check,
        "seed": seed,
    }
    vocabulary, model = material.vocabulary, material.text_model
    if method.name in NEED_TEXT and vocabulary is not None and model is not None:
        if method.name == "vlm" and material.answers is not None:
            vocabulary = phrase_vocabulary(material.answers, vocabulary.templates)
        about["vocabulary"] = {
            "name": vocabulary.name,
            "fingerprint": vocabulary.fingerprint,
            "n_words": len(vocabulary),
        }
        about["text_model"] = {"id": model.id, "weights_hash": model.weights_hash}
    return about


def _rows(activations: LatentActivations, method: Method, threshold: float) -> list[dict[str, Any]]:
    """Return the rows of one method: the candidates of latents that fire in enough images."""
    enough = set(alive(activations).tolist())
    found: Candidates = method.candidates(activations)
    rows = []
    for latent in range(len(activations)):
        row: dict[str, Any] = {
            "latent": latent,
            "method": method.name,
            "name": None,
            "score": None,
            "threshold": _number(threshold),
            "accepted": False,
            "runners_up": [],
            "figures": [],
        }
        if latent in enough and found.word[latent, 0] >= 0:
            scores, words = found.score[latent], found.word[latent]
            named = [
                {"name": method.words[word], "score": float(score)}
                for word, score in zip(words, scores, strict=True)
                if word >= 0
            ]
            row |= named[0]
            row["accepted"] = bool(scores[0] > threshold)
            row["runners_up"] = named[1:]
            figures = {name: float(values[latent, 0]) for name, values in found.figures.items()}
            row["figures"] = sorted(figures.items())
        rows.append(row)
    return rows


def _number(value: float) -> float | None:
    """Return a finite number; None otherwise (no untrained latent had a candidate at all)."""
    return value if np.isfinite(value) else None


def _names_by_truth(
    index: LatentIndex, metrics: Mapping[str, Any] | None
) -> dict[int, tuple[str, float]]:
    if metrics is None:
        raise UserError(
            f"{index.folder}: names by truth need figures of this SAE on calibration images; "
            "measure them with `sparsight evaluate RUN`."
        )
    names = names_from_truth(metrics, index.manifest["sae"]["hash"], index.n_latents, index.folder)
    return {latent: (name.name, name.score) for latent, name in names.items()}


def _truth_rows(names: Mapping[int, tuple[str, float]], n_latents: int) -> list[dict[str, Any]]:
    return [
        {
            "latent": latent,
            "method": TRUTH,
            "name": names.get(latent, (None, None))[0],
            "score": names.get(latent, (None, None))[1],
            "threshold": None,
            "accepted": latent in names,
            "runners_up": [],
            "figures": [],
        }
        for latent in range(n_latents)
    ]


def _with_old_truth(table: NameTable, index: LatentIndex) -> NameTable:
    """Keep the names by truth that `build_index` wrote, as rows that are not shown."""
    names = {
        latent: (name.name, name.score)
        for latent, name in names_of(index).items()
        if name.source == TRUTH_SOURCE
    }
    if not names:
        return table
    return table.with_method(TRUTH, _truth_rows(names, index.n_latents), {"n_named": len(names)})
