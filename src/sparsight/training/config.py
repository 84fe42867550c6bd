"""How to train, and what a run's `config.toml` holds."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from sparsight.config import check_seed, check_types, load
from sparsight.errors import UserError
from sparsight.kernels import Kernels, Plan, Stage
from sparsight.sae import AuxK, Matryoshka, MatryoshkaK, MultiTopK, SAEConfig
from sparsight.sae.objectives import SAEPlan
from sparsight.sae.remedies import AnyRemedy
from sparsight.training.old_keys import (
    OLD_REMEDIES,
    remedy_of_old_name,
    with_remedy,
    with_remedy_of,
)
from sparsight.vision import Tokens

LARGEST_DEAD_WINDOW = 10_000_000

DEFAULT_EPOCHS = 20
SHORTEST, LONGEST = 1_000_000, 10_000_000
"""Bounds, in vectors, of the default length of `DEFAULT_EPOCHS` epochs."""

# eps must be positive, too: otherwise a latent without gradient would be divided by 0.
_POSITIVE = ("n_vectors", "batch_size", "lr", "eps", "grad_clip", "log_every", "checkpoint_every")


@dataclass(frozen=True)
class TrainConfig:
    """One training run; lengths are in vectors, never in batches."""

    sae: SAEConfig = field(default_factory=SAEConfig)
    """The autoencoder."""

    n_vectors: int | None = None
    """Number of activation vectors to train on; if there are fewer, training takes several epochs.
    Default: 20 epochs, but at least 1 million and at most 10 million vectors."""

    batch_size: int = 4096
    """Vectors per step."""

    lr: float | None = None
    """Peak learning rate; default: 2e-4 / sqrt(n_latents / 16,384)."""

    warmup: float = 0.05
    """Share of the run in which the learning rate rises from 0."""

    decay: float = 0.2
    """Share of the run, at its end, in which the learning rate falls to 0."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""

    eps: float = 6.25e-10
    """Adam's ε (Gao et al. 2024, appendix A)."""

    grad_clip: float | None = 1.0
    """Largest norm of the gradient; None disables clipping."""

    remedy: AnyRemedy | None = field(default_factory=AuxK)
    """Remedy for dead latents; None trains without one."""

    sparsity_warmup: float = 0.05
    """Share of the run in which the sparsity penalty, if there is one, rises from 0."""

    target_site: str | None = None
    """Train a transcoder, which predicts this site's activations from those of another site."""

    ema: float | None = None
    """Decay of an exponential moving average of the weights, e.g. 0.999; the average then becomes
    the SAE."""

    multi_topk: MultiTopK | None = None
    """Add a second reconstruction with more latents; only with TopK."""

    matryoshka: Matryoshka | MatryoshkaK | None = None
    """Add reconstructions from prefixes of the dictionary, or with several k."""

    kernels: Kernels = "auto"
    """Kernels that compute a step: "native" (compiled, CPU), "triton" (CUDA), "torch" (anywhere) or
    "dense" (plain autograd, the slow reference); "auto" is the fastest that runs here. Results
    differ only by rounding. Architectures other than TopK and BatchTopK need "dense"."""

    precision: Literal["auto", "float32", "bfloat16", "int8", "float8"] = "auto"
    """Precision of the product that selects latents; the selected latents are always scored in
    float32. "auto" is the fastest for these kernels on this processor; "float8" needs "triton" and
    is never chosen by "auto"."""

    seed: int = 0
    """Seed of the initial weights, and of the order of the data unless `data_seed` is given."""

    data_seed: int | None = None
    """Seed of the order of the data; default: `seed`."""

    log_every: int | None = None
    """Vectors between lines of `metrics.jsonl`; default: a hundredth of the run."""

    checkpoint_every: int | None = None
    """Vectors between checkpoints; default: a tenth of the run, or more if writing is slow.
    `checkpoint_seconds` of `train` adds checkpoints by time."""

    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where to log metrics in addition to `metrics.jsonl`."""

    upgraded: ClassVar[Callable[..., dict[str, Any]]] = staticmethod(with_remedy)
    """Converts tables of earlier versions; see `sparsight.config`."""

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self.seed)
        if self.data_seed is not None:
            check_seed(self.data_seed, "data_seed")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} is {value}; it must be positive.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas are {self.betas}; each must be 0 or more, and below 1.")
        if self.n_vectors is not None and self.n_vectors < self.batch_size:
            raise UserError(
                f"n_vectors is {self.n_vectors}, less than batch_size ({self.batch_size}); give at "
                "least one batch."
            )
        if min(self.warmup, self.decay) < 0 or self.warmup + self.decay > 1:
            raise UserError(
                f"warmup is {self.warmup} and decay is {self.decay}; as shares of the run, neither "
                "may be negative, and together they may be at most 1."
            )
        if self.multi_topk is not None and self.matryoshka is not None:
            raise UserError("multi_topk and matryoshka cannot be combined; leave one out.")
        for name, part in {
            "multi_topk": self.multi_topk,
            "matryoshka with several k": isinstance(self.matryoshka, MatryoshkaK) or None,
        }.items():
            if part is not None and not self.sae.sparsity.several_k:
                kind = type(self.sae.sparsity).__name__
                raise UserError(f"{name} needs the sparsity TopK; leave it out with {kind}.")
        if not 0 <= self.sparsity_warmup <= 1:
            raise UserError(
                f"sparsity_warmup is {self.sparsity_warmup}; as a share of the run, it must be "
                "between 0 and 1."
            )
        if self.remedy is not None:
            self.remedy.check(self.sae)
        if self.target_site is not None and self.sae.b_dec_init != "zero":
            raise UserError(
                f"b_dec_init is {self.sae.b_dec_init!r}, but a transcoder's bias starts at zero; "
                "choose 'zero'."
            )
        if self.sae.skip and self.target_site is None:
            raise UserError(
                "skip works only with transcoders; give a target_site, or leave it out."
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema is {self.ema}; it must be between 0 and 1, or None.")

    def with_length(self, vectors_per_epoch: int) -> TrainConfig:
        """Return the same configuration with `n_vectors`, from the epochs if it names none."""
        if self.n_vectors is not None:
            return self
        asked = DEFAULT_EPOCHS * vectors_per_epoch
        n_vectors = max(self.batch_size, min(max(asked, SHORTEST), LONGEST))
        return dataclasses.replace(self, n_vectors=n_vectors)

    @property
    def length(self) -> int:
        """The length of the run in vectors; the largest possible one until it is known."""
        return max(LONGEST, self.batch_size) if self.n_vectors is None else self.n_vectors

    @property
    def n_steps(self) -> int:
        """The number of steps of the run."""
        return math.ceil(self.length / self.batch_size)

    @property
    def order_seed(self) -> int:
        """The seed of the order of the data."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def dead_after(self) -> int:
        """The number of vectors without an activation after which a latent counts as dead."""
        stated = self.remedy.window if self.remedy is not None else None
        return stated or max(1, min(LARGEST_DEAD_WINDOW, self.length // 10))

    def learning_rate(self, n_latents: int) -> float:
        """Return the peak learning rate."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(n_latents / 2**14)

    @property
    def fusable(self) -> bool:
        """Whether the fused steps, without autograd, can train this; otherwise "dense" does."""
        parts = (self.sae, self.matryoshka, self.remedy)
        return self.target_site is None and all(part is None or part.fusable for part in parts)

    def plan(self, d_in: int) -> SAEPlan:
        """Return what to minimise, for activations of width `d_in`.

        Raises:
            UserError: more latents are requested than there are.
        """
        n_latents, k = self.sae.width(d_in), self.sae.sparsity.places
        stages: tuple[Stage, ...] = (Stage(),)
        main = 0
        random: int | None = None
        if self.multi_topk is not None:
            stages = self.multi_topk.stages(k, n_latents)
        elif isinstance(self.matryoshka, MatryoshkaK):
            ks = self.matryoshka.stages(k, n_latents)
            rising = range(len(ks), 0, -1)
            raw = rising if self.matryoshka.weights == "reverse" else [1] * len(ks)
            stages = tuple(Stage(w / sum(raw), k=k) for w, k in zip(raw, ks, strict=True))
            main = ks.index(k)
        elif self.matryoshka is not None:
            random = self.matryoshka.random
            widths = self.matryoshka.widths(n_latents)
            stages = tuple(Stage(1 / len(widths), width=width) for width in widths)
            main = len(stages) - 1
        with_loss = self.remedy if self.remedy is not None and self.remedy.weight else None
        return Plan(
            self.sae.sparsity,
            stages,
            main,
            random_widths=random,
            soft_cap=self.sae.soft_cap,
            remedy=None if with_loss is None else with_loss.for_width(d_in),
        )

    def __getattr__(self, name: str) -> Any:
        """Let programs read the remedies' former fields for one version."""
        if name in OLD_REMEDIES:
            return remedy_of_old_name(self.remedy, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def steps_every(self, n_vectors: int | None, share: int) -> int:
        """Return the steps in `n_vectors`, or in one of `share` equal parts of the run."""
        vectors = n_vectors or self.length / share
        return max(1, round(vectors / self.batch_size))


def stored_recipe(path: Path) -> TrainRecipe:
    """Return the recipe in a run's own folder; keys that an earlier version wrote need no warning.

    Raises:
        UserError: the file is missing, damaged, or of another kind.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return load(TrainRecipe, path)


def _read_old_keywords() -> None:
    """Let `TrainConfig` accept the keywords of the previous version."""
    take = TrainConfig.__init__

    @functools.wraps(take)
    def __init__(self: TrainConfig, *arguments: Any, **keywords: Any) -> None:
        take(self, *arguments, **with_remedy_of(keywords, AuxK()))

    TrainConfig.__init__ = __init__  # type: ignore[method-assign]


_read_old_keywords()


@dataclass(frozen=True)
class TrainRecipe:
    """A whole experiment, as `sparsight train --config FILE.toml` reads it."""

    store: str | None = None
    """Folder of an activation store; without one, activations are extracted on the fly."""

    model: str | None = None
    """Vision model: Hub id, local folder, "open_clip:NAME/PRETRAINED", or "calibration"."""

    images: str | None = None
    """Images, in any form that `extract` takes."""

    sites: tuple[str, ...] = ()
    """Sites to train on; `*` stands for every block. Default: all sites of the store."""

    tokens: Tokens | None = None
    """Positions to train on; default: all, or those in the store, if one is given."""

    held_out: float | None = None
    """Share of the images to keep out of training, e.g. 0.1; `evaluate` measures on these
    images."""

    held_out_seed: int = 0
    """Seed of the choice of held-out images."""

    out: Path = Path("runs/sae")
    """Folder of the run."""

    activations: str | None = None
    """Fingerprint of the activations, filled in by `train`; a run continues only with the same."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """How to train."""

    def __post_init__(self) -> None:
        check_types(self)
