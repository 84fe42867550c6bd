"""What a CLIP before and after fine-tuning is measured on."""

from __future__ import annotations

from dataclasses import dataclass

from sparsight.attacks import AttackPairs
from sparsight.attacks.salience import Contrast
from sparsight.finetuning.pairs import CaptionedImages
from sparsight.images import ImageSource
from sparsight.sae import SparseAutoencoder


@dataclass(frozen=True)
class Subjects:
    """What both models are measured on.

    Attributes:
        pairs: pictures with and without words.
        images: labelled pictures for N-way zero-shot, e.g. photos; default none.
        captioned: pictures with captions, for retrieval and the modality gap; default none.
        sae: of the model before, for what became of its latents; default none.
        contrast: what a response to words is, see `find_text_salient`.
        templates: sentences for class names.
        max_images: images that a figure is taken on, at most; of more, a random sample.
        workers: processes that decode.
        seed: of batches, halves and permutations.
    """

    pairs: AttackPairs
    images: ImageSource | None = None
    captioned: CaptionedImages | None = None
    sae: SparseAutoencoder | None = None
    contrast: Contrast = "attack"
    templates: str = "simple"
    max_images: int = 1000
    workers: int | None = None
    seed: int = 0
