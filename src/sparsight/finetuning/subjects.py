"""What a CLIP is measured on, before and after fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from sparsight.attacks import AttackPairs
from sparsight.attacks.salience import Contrast
from sparsight.finetuning.pairs import CaptionedImages
from sparsight.images import ImageSource
from sparsight.sae import SparseAutoencoder


@dataclass(frozen=True)
class Subjects:
    """Images and settings for measuring both models.

    Attributes:
        pairs: images with and without words.
        images: labelled images for N-way zero-shot, e.g. photos; default: none.
        captioned: images with captions, for retrieval and the modality gap; default: none.
        sae: SAE of the original model, to compare its latents; default: none.
        contrast: definition of a response to words; see `find_text_salient`.
        templates: sentences for class names.
        max_images: largest number of images per figure; of more, a random sample.
        workers: processes that decode images.
        seed: seed of batches, halves and permutations.
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
