"""How to fine-tune, and what a run's `config.toml` says."""

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
    """One fine-tuning run."""

    epochs: float = 1.0
    """Passes over the data, where `steps` says nothing."""

    steps: int | None = None
    """Steps of the optimiser."""

    batch_size: int = 64
    """Pairs that the loss compares with each other."""

    accumulation: int = 1
    """Batches whose gradients make a step; each is its own contrast."""

    attack_share: float = 0.5
    """Share of a batch from the attack set."""

    captions: CaptionUse = "both"
    """Of the data: its own captions, its labels in a sentence, or both in turn."""

    attack_captions: CaptionUse = "both"
    """Of the attack set."""

    templates: str = "simple"
    """Sentences for labels: simple, openai80, or one with {} in it."""

    truncate_captions: bool = False
    """Cut captions that are longer than the model reads, rather than refuse them."""

    duplicates: Duplicates = "share"
    """Equal captions in a batch share their target, or do not come to meet."""

    loss: Literal["info_nce", "similarity_of_similarities"] = "info_nce"
    """CLIP's contrastive loss; or, for reproduction, zer0int's."""

    smoothing: float = 0.0
    """Share of each target that is spread over the batch; 0.1 in zer0int's scripts."""

    temperature: float = 0.07
    """Of similarity_of_similarities; InfoNCE has the learned logit scale."""

    entropy: float = 0.0
    """Weight of the predictions' mean entropy, which is subtracted; 0.02 in one of his scripts."""

    distillation: float = 10.0
    """Weight of the distance, in 1 − cosine, from the original's embeddings of clean pictures and
    captions."""

    pull: float = 10.0
    """Weight of the same distance of attacked pictures from the original's embedding of the same
    picture without the words, where the attack set knows it."""

    penalty: float = 0.0
    """Weight of the price on text-salient latents, where some are named."""

    scaling: NeuronScaling = field(default_factory=NeuronScaling)
    """Neurons that are made louder on attacked pictures."""

    optimiser: Literal["adamw", "adabelief"] = "adamw"
    """What takes the steps."""

    lr: float | None = None
    """Peak learning rate of `visual_blocks`; None is 1e-5 × (768 / width of the vision tower)²,
    at most 3e-4."""

    rates: Rates = field(default_factory=Rates)
    """Of the other parts."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Of the optimiser."""

    eps: float | None = None
    """Of the optimiser; None is 1e-8 for AdamW and 1e-14 for AdaBelief."""

    rectify: bool = True
    """Of AdaBelief: trust the variance only once it is known."""

    weight_decay: float = 1e-3
    """Decoupled; of matrices alone."""

    schedule: ScheduleName = "cosine"
    """Of the learning rates, over the steps of the optimiser."""

    warmup: float = 0.1
    """Share of the run in which the rates rise."""

    grad_clip: float | None = 1.0
    """Largest norm of a step's gradient; None does not clip."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward pass, by autocast; weights and losses stay float32."""

    parametrisation: Literal["plain", "geometric"] = "plain"
    """geometric: MLP weights as r θ/‖θ‖ while they are trained (GmP)."""

    first_block: int = 0
    """Vision blocks before this one stay as they are, and what comes before the blocks."""

    seed: int = 0
    """Of the order of the pictures, and of the captions."""

    log_every: int | None = None
    """Steps between lines of `metrics.jsonl`; None is a hundredth of the run."""

    checkpoint_every: int | None = None
    """Steps between checkpoints; None is a tenth of the run, unless writing takes too long for
    that. Others are written by time, see `finetune`."""

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
                raise UserError(f"{name} is {value}; it counts steps: 1 or more.")
        for name in ("attack_share", "warmup", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas are {self.betas}; each must be 0 or more, and below 1.")
        if self.batch_size < 2:
            raise UserError("batch_size is 1; a contrastive loss needs two pairs or more.")

    def n_batches(self, n_pictures: int, per_batch: int) -> int:
        """Batches of the run.

        Args:
            n_pictures: of the data; the attack set goes along.
            per_batch: how many of them a batch has.
        """
        if self.steps is not None:
            return self.steps * self.accumulation
        return max(1, math.ceil(self.epochs * n_pictures / per_batch))

    def n_steps(self, n_batches: int) -> int:
        """Steps of the optimiser; the last may have fewer batches than the others."""
        return math.ceil(n_batches / self.accumulation)

    def learning_rate(self, width: int) -> float:
        """The peak learning rate, for a vision tower of so many dimensions."""
        return self.lr if self.lr is not None else min(LARGEST_LR, 1e-5 * (768 / width) ** 2)

    def every(self, given: int | None, n_steps: int, share: int) -> int:
        """Steps between lines or checkpoints: as given, or `share` times in a run."""
        return given or max(1, n_steps // share)


@dataclass(frozen=True)
class FinetuneRecipe:
    """A whole run: what was trained on what."""

    model: str
    """As `load_model` takes it."""

    weights: str
    """Hash of all weights of the model before."""

    data: str
    """Where the pairs come from."""

    data_fingerprint: str
    """Of pictures and captions."""

    attack: str | None = None
    """Where the attack set comes from."""

    attack_fingerprint: str | None = None
    """Of pictures and captions."""

    clean_fingerprint: str | None = None
    """Of the attacked pictures without words, where they are pulled to."""

    latents: str | None = None
    """Of the SAE and the latents that are penalised."""

    neurons: str | None = None
    """Of the neurons that are scaled, where they are named."""

    layout: str = "huggingface"
    """Of the model that is handed back."""

    train: FinetuneConfig = field(default_factory=FinetuneConfig)
    """How."""
