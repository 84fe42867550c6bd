"""The methods by name, and how each is made from what is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.errors import UserError
from sparsight.images import ImageSource
from sparsight.latents import LatentIndex
from sparsight.naming.causal import Causal
from sparsight.naming.image_space import ImageSpace
from sparsight.naming.labels import MIN_PRECISION, LabelMethod
from sparsight.naming.scores import Method
from sparsight.naming.splicing import Splice
from sparsight.naming.text import Centroid, TextCorrelation
from sparsight.naming.vlm import Answers, VlmCorrelation, phrase_vocabulary
from sparsight.naming.vocabulary import Vocabulary
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel
from sparsight.vision.passes import PassSettings


@dataclass
class Material:
    """What methods are made from.

    Attributes:
        index: index of the SAE.
        sae: the SAE.
        min_precision: see `LabelMethod`.
        seed: seed of halves and samples.
        settings: how to run a model over images.
        space: the embedded images; None if no method compares images with texts.
        vocabulary: the words; None likewise.
        text_model: the model that embeds images and words; None likewise.
        model: the SAE's own model; None if it was not loaded.
        source: the images; None if they were not opened.
        answers: what a vision-language model has said; None if none was asked.
    """

    index: LatentIndex
    sae: SparseAutoencoder
    min_precision: float = MIN_PRECISION
    seed: int = 0
    settings: PassSettings = field(default_factory=PassSettings)
    space: ImageSpace | None = None
    vocabulary: Vocabulary | None = None
    text_model: VisionModel | None = None
    model: VisionModel | None = None
    source: ImageSource | None = None
    answers: Answers | None = None

    @cached_property
    def vectors(self) -> Float[Tensor, "words d"]:
        """One unit vector per word."""
        assert self.vocabulary is not None and self.text_model is not None
        with torch.no_grad():
            return self.vocabulary.embed(self.text_model).cpu()


def _labels(material: Material) -> Method:
    index = material.index
    return LabelMethod(
        index.images["label"].to_pylist(),
        index.image_places,
        index.n_places,
        material.min_precision,
        material.seed,
    )


def _text(material: Material) -> Method:
    assert material.space is not None and material.vocabulary is not None
    return TextCorrelation(material.space, material.vocabulary.words, material.vectors)


def _centroid(material: Material) -> Method:
    assert material.space is not None and material.vocabulary is not None
    return Centroid(material.space, material.vocabulary.words, material.vectors)


def _splice(material: Material) -> Method:
    assert material.space is not None and material.vocabulary is not None
    return Splice(material.space, material.vocabulary.words, material.vectors)


def _causal(material: Material) -> Method:
    assert material.space is not None and material.vocabulary is not None
    if material.model is None or material.model is not material.text_model:
        raise UserError(
            "The causal method edits the SAE's own model, which must have a text tower; a second "
            "model with --text-model does not help. Leave `causal` out."
        )
    assert material.source is not None
    return Causal(
        material.space,
        material.vocabulary.words,
        material.vectors,
        material.model,
        material.index.site,
        material.index.tokens,
        material.source,
        material.settings,
        material.seed,
    )


def _vlm(material: Material) -> Method:
    assert material.space is not None and material.vocabulary is not None
    assert material.answers is not None and material.text_model is not None
    vocabulary = material.vocabulary
    # A thousand words give the mean of all well enough, and soon.
    step = -(-len(vocabulary) // 1000)
    some = dataclasses.replace(vocabulary, entries=vocabulary.entries[::step])
    phrases = phrase_vocabulary(material.answers, vocabulary.templates)
    with torch.no_grad():
        centre = some.embed(material.text_model).cpu().float().mean(dim=0)
        vectors = phrases.embed(material.text_model).cpu()
    return VlmCorrelation(
        material.space, phrases.words, vectors, centre, material.answers, material.sae
    )


METHODS: Mapping[str, Callable[[Material], Method]] = {
    "labels": _labels,
    "text": _text,
    "centroid": _centroid,
    "splice": _splice,
    "causal": _causal,
    "vlm": _vlm,
}
"""Methods that find names by themselves, judged by the null; `truth` is apart."""

NEED_TEXT = ("text", "centroid", "splice", "causal", "vlm")
"""Methods that compare images with words in a space that both share."""
