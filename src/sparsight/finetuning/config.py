"""The settings of fine-tuning, as in a run's `config.toml`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from sparsight.config import check_seed, check_types
from sparsight.errors import UserError
from sparsight.finetuning.groups import Rates
from sparsight.finetuning.optimisers import ScheduleName
from sparsight.finetuning.pairs import CaptionUse
from sparsight.finetuning.sampling import Duplicates
from sparsight.finetuning.scaling import NeuronScaling

LARGEST_LR = 3e-4

_POSITIVE = (
    "batch_size",
    "temperature",
    "accumulation",
    "lr",
    "eps",
    "grad_clip",
    "steps",
    "epochs",
)
_NOT_NEGATIVE = ("weight_decay", "distillation", "pull", "penalty", "entropy")


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of one fine-tuning run."""

    epochs: float = 1.0
    """Passes over the data, if `steps` is not set."""

    steps: int | None = None
    """Number of optimiser steps."""

    batch_size: int = 64
    """Number of pairs that the loss compares with each other."""

    accumulation: int = 1
    """Batches per step; their gradients add up, and the loss compares pairs within each batch."""

    attack_share: float = 0.5
    """Share of each batch that comes from the attack set."""

    captions: CaptionUse = "both"
    """Texts of the data: its own captions, its labels in a sentence, or a random
    choice between the two."""

    attack_captions: CaptionUse = "both"
    """Texts of the attack set; the choices are those of `captions`."""

    templates: str = "simple"
    """Sentences for labels: simple, openai80, or your own with {} in it."""

    truncate_captions: bool = False
    """Cut captions that are too long for the model, instead of refusing them."""

    duplicates: Duplicates = "share"
    """Equal captions share their target (`share`), or never meet in a batch (`avoid`)."""

    loss: Literal["info_nce", "similarity_of_similarities"] = "info_nce"
    """CLIP's contrastive loss, or zer0int's loss for reproductions."""

    smoothing: float = 0.0
    """Share of each target that is spread over the batch; zer0int's scripts use 0.1."""

    temperature: float = 0.07
    """Temperature of similarity_of_similarities; InfoNCE uses the learned logit scale."""

    entropy: float = 0.0
    """Weight of the predictions' mean entropy, which is subtracted from the loss; one of zer0int's
    scripts uses 0.02."""

    distillation: float = 10.0
    """Weight of the distance, 1 − cosine, from the original model's embeddings of clean images and
    captions."""

    pull: float = 10.0
    """Weight of the distance, 1 − cosine, between the embedding of an attacked image and the
    original model's embedding of the same image without words, if the attack set has both
    images."""

    penalty: float = 0.0
    """Weight of the penalty on text-salient latents, if any are named."""

    scaling: NeuronScaling = field(default_factory=NeuronScaling)
    """Neurons to amplify on attacked images."""

    optimiser: Literal["adamw", "adabelief"] = "adamw"
    """The optimiser."""

    lr: float | None = None
    """Peak learning rate of `visual_blocks`; None is 1e-5 × (768 / width of the vision tower)²,
    at most 3e-4."""

    rates: Rates = field(default_factory=Rates)
    """Learning rates of the other parts, relative to `lr`."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the optimiser's moving averages."""

    eps: float | None = None
    """The optimiser's ε; None means 1e-8 for AdamW and 1e-14 for AdaBelief."""

    rectify: bool = True
    """Let AdaBelief wait until there are enough steps to trust the variance."""

    weight_decay: float = 1e-3
    """Decoupled weight decay, for matrices only."""

    schedule: ScheduleName = "cosine"
    """Schedule of the learning rates over the optimiser steps."""

    warmup: float = 0.1
    """Share of the run in which the learning rates rise."""

    grad_clip: float | None = 1.0
    """Largest gradient norm of a step; None means no clipping."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass, by autocast; weights and losses stay float32."""

    parametrisation: Literal["plain", "geometric"] = "plain"
    """geometric: MLP weights are r θ/‖θ‖ during training (GmP)."""

    first_block: int = 0
    """The first vision block to train; earlier blocks and the layers before them stay frozen."""

    seed: int = 0
    """Seed of the order of images and of the choice of captions."""

    log_every: int | None = None
    """Steps between lines of `metrics.jsonl`; None means a hundredth of the run."""

    checkpoint_every: int | None = None
    """Steps between checkpoints; None means a tenth of the run, or more if writing is slow.
    `checkpoint_seconds` of `finetune` adds checkpoints by time."""

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self.seed)
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} is {value}; it must be positive.")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        for name in ("log_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be 1 step or more.")
        for name in ("attack_share", "warmup", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be a share from 0 to 1.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas are {self.betas}; each must be at least 0 and below 1.")
        if self.batch_size < 2:
            raise UserError("batch_size is 1; a contrastive loss needs two pairs or more.")

    def n_batches(self, n_pictures: int, per_batch: int) -> int:
        """Return the number of batches of the run.

        Args:
            n_pictures: number of images in the data, without the attack set.
            per_batch: number of these per batch.
        """
        if self.steps is not None:
            return self.steps * self.accumulation
        return max(1, math.ceil(self.epochs * n_pictures / per_batch))

    def n_steps(self, n_batches: int) -> int:
        """Return the number of optimiser steps; the last may have fewer batches than the others."""
        return math.ceil(n_batches / self.accumulation)

    def learning_rate(self, width: int) -> float:
        """Return the peak learning rate for a vision tower of this width."""
        return self.lr if self.lr is not None else min(LARGEST_LR, 1e-5 * (768 / width) ** 2)

    def every(self, given: int | None, n_steps: int, share: int) -> int:
        """Return the steps between lines or checkpoints: as given, or a `share`-th of the run."""
        return given or max(1, n_steps // share)


@dataclass(frozen=True)
class FinetuneRecipe:
    """A whole run: model, data and settings."""

    model: str
    """The model, as for `load_model`."""

    weights: str
    """Hash of all weights of the original model."""

    data: str
    """Source of the pairs."""

    data_fingerprint: str
    """Fingerprint of images and captions."""

    attack: str | None = None
    """Source of the attack set."""

    attack_fingerprint: str | None = None
    """Fingerprint of images and captions."""

    clean_fingerprint: str | None = None
    """Fingerprint of the attacked images without words, if they are distillation targets."""

    latents: str | None = None
    """Fingerprint of the SAE and its penalised latents."""

    neurons: str | None = None
    """Fingerprint of the scaled neurons, if they are named."""

    layout: str = "huggingface"
    """Layout of the exported model."""

    train: FinetuneConfig = field(default_factory=FinetuneConfig)
    """The settings."""
