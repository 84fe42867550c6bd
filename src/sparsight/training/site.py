"""One SAE in training: its parameters, optimiser, dead-latent counters and running sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsight.activations import SiteStatistics
from sparsight.errors import SparsightError, UserError
from sparsight.kernels import Adam, Kernels, Precision, TrainingStep, training_step
from sparsight.sae import Normaliser, SparseAutoencoder
from sparsight.sae.code import Frame
from sparsight.sae.normaliser import ROUNDING
from sparsight.sae.objectives import SAELoss
from sparsight.sae.remedies import Trained
from sparsight.sae.remedies.base import PER_LATENT
from sparsight.training.config import TrainConfig

NEVER = torch.iinfo(torch.int64).max

SUMS = (
    "squared_error", "squared_spread", "l0", "loss", "aux_loss", "grad_norm", "penalty", "revived",
    "resampled",
)  # fmt: skip
MOMENTS = ("exp_avg", "exp_avg_sq")
"""The names of Adam's moments in a checkpoint, as in `torch.optim`."""
HALF_ROUNDING = {torch.bfloat16: 64e-7, torch.float16: 1e-7}
"""As `ROUNDING`, for activations in half precision: about three times their rounding error."""
THRESHOLD_DECAY = 0.999
"""Decay of the average that becomes the threshold of a BatchTopK SAE."""

BAD = ("activations", "loss", "gradient")
"""What can become infinite or NaN, in the order of cause and effect."""


class SiteTraining:
    """Everything that changes while one site's SAE trains; `step` trains on one batch.

    Args:
        config: configuration of the run.
        statistics: statistics of the site's activations.
        sample: a sample of activations, for the scale of the initial encoder.
        metadata: metadata of the SAE.
        device: where to train.
        kernels: the kernels that compute a step; not "auto".
        precision: precision of the selection.
        target: for a transcoder, the statistics of the site that it predicts.
        target_sample: for a transcoder, a sample of that site's activations.
        resumed: the samples are placeholders, and `load_state` follows.

    Raises:
        UserError: a batch has one vector, so that its spread cannot be measured.
        SparsightError: the activations do not vary.
    """

    def __init__(
        self,
        config: TrainConfig,
        statistics: SiteStatistics,
        sample: Float[Tensor, "batch d_in"],
        metadata: dict[str, Any],
        device: torch.device,
        kernels: Kernels,
        precision: Precision,
        target: SiteStatistics | None = None,
        target_sample: Float[Tensor, "batch d_out"] | None = None,
        *,
        resumed: bool = False,
    ) -> None:
        self.config = config
        for name, each in {"site": statistics, "target_site": target}.items():
            if each is not None and not _varies(each):
                raise _nothing_to_learn(metadata.get(name, "The site"))
        sample = sample.cpu().float()
        sae = _initial(config, statistics, target, sample, metadata)
        seen = sample if target_sample is None else target_sample.cpu().float()
        variance, centre = _first_spread(sae, target or statistics, sample, seen, resumed)
        self.sae = sae.to(device)
        self.centre: Float[Tensor, " d_out"] = centre.float().to(device)
        self.lr = config.learning_rate(self.sae.n_latents)
        self.plan = config.plan(self.sae.d_in)
        self.parameters = dict(self.sae.named_parameters())
        self.moments = {
            name: (torch.zeros_like(each), torch.zeros_like(each))
            for name, each in self.parameters.items()
        }
        self.since_fired: Int[Tensor, " n_latents"] = torch.zeros(
            self.sae.n_latents, dtype=torch.int64, device=device
        )
        self.average: dict[str, Tensor] = {}
        if config.ema is not None:
            self.average = {name: each.detach().clone() for name, each in self.parameters.items()}
        self.threshold = torch.zeros((), dtype=torch.float64, device=device)
        self.back_end: TrainingStep = training_step(
            kernels,
            self.parameters,
            self.moments,
            self.since_fired,
            self.plan,
            Adam(config.betas, config.eps, config.grad_clip),
            loss=SAELoss(self.sae, self.plan, config.sparsity_warmup * config.n_steps, config.seed),
            lr_factors=config.sae.sparsity.lr_factors,
            variance=variance,
            unit_norm=config.sae.unit_norm_decoder,
            precision=precision,
        )
        self.first_bad_steps = torch.full((len(BAD),), NEVER, dtype=torch.int64, device=device)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.summed = 0

    @property
    def dead(self) -> Bool[Tensor, " n_latents"]:
        """Mask of the latents without an activation in the last `dead_after` vectors."""
        return self.since_fired >= self.config.dead_after

    def step(
        self,
        x: Float[Tensor, "batch d_in"],
        step: int,
        lr_factor: float,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> None:
        """Train on one batch.

        Nothing is fetched from the device, except for the list of dead latents if a remedy needs it
        and there can be any.

        Args:
            x: activations in the units of the model.
            step: number of the step, from 0.
            lr_factor: share of the peak learning rate.
            target: for a transcoder, the activations that it predicts.
        """
        with torch.no_grad():
            frame = self.sae.normaliser.frame(x)
            z = self.sae.normaliser(x, frame)
            y = z
            if self.sae.target_normaliser is not None:
                assert target is not None
                y = self.sae.target_normaliser(target, frame)
            resampled = self._renew(z, y, step)
            before = self.dead if step * len(z) >= self.config.dead_after else None
            dead = None
            if before is not None and self.plan.remedy is not None:
                dead = before.nonzero()[:, 0]
            result = self.back_end.step(
                z,
                lr=self.lr * lr_factor,
                number=step + 1,
                dead=dead,
                target=None if self.sae.target_normaliser is None else y,
            )
            self._average(step)
            spread = (y - self.centre).square().sum()
            self._watch(step, spread, result.loss, result.grad_norm)
            if self.config.sae.sparsity.per_batch:
                self._follow_threshold(step, result.least)
            none = self.sums.new_zeros(())
            revived, penalty = none, none if result.penalty is None else result.penalty
            if before is not None:
                revived = (before & ~self.dead).sum()
            figures = (
                result.squared_error, spread, result.active, result.loss, result.aux_loss,
                result.grad_norm, penalty, revived, resampled,
            )  # fmt: skip
            self.sums += torch.stack([each.detach().double() for each in figures])
            self.summed += len(z)

    @property
    def kernels(self) -> str:
        """The kernels that compute the steps, for the log."""
        return self.back_end.name

    def figures(self, batch_size: int) -> dict[str, float]:
        """Return averages since the last call (FVU, L0, dead, losses), and how many dead latents
        fired again or were resampled."""
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        n_batches = max(self.summed / batch_size, 1e-9)
        figures = {
            "fvu": sums["squared_error"] / max(sums["squared_spread"], 1e-300),
            "l0": sums["l0"] / max(self.summed, 1),
            "dead": self.dead.double().mean().item(),
            "loss": sums["loss"] / n_batches,
            "aux_loss": sums["aux_loss"] / n_batches,
            "grad_norm": sums["grad_norm"] / n_batches,
            "penalty": sums["penalty"] / n_batches,
            "revived": int(sums["revived"]),
            "resampled": int(sums["resampled"]),
        }
        self.sums.zero_()
        self.summed = 0
        return figures

    def first_bad(self) -> tuple[int, str] | None:
        """Return the first step with an infinite or NaN value, and what it was; None if none."""
        steps: list[int] = self.first_bad_steps.tolist()
        step = min(steps)
        return None if step == NEVER else (step, BAD[steps.index(step)])

    def finished(self) -> SparseAutoencoder:
        """Return the resulting SAE; it has the average of the weights if there is one."""
        with torch.no_grad():
            if self.average:
                for name, parameter in self.sae.named_parameters():
                    parameter.copy_(self.average[name])
                self.sae.constrain()
        return self.sae

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that exact resume needs in addition to those of the SAE."""
        state: dict[str, Tensor] = {}
        for name, moments in self.moments.items():
            state |= {f"optimiser.{name}.{key}": m for key, m in zip(MOMENTS, moments, strict=True)}
        state |= {f"average.{name}": average for name, average in self.average.items()}
        state["since_fired"] = self.since_fired
        state["threshold"] = self.threshold
        state["sums"] = self.sums
        state["variance"] = torch.tensor(self.back_end.variance, dtype=torch.float64)
        state["centre"] = self.centre
        return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}

    def load_state(
        self, sae: Mapping[str, Tensor], state: Mapping[str, Tensor], summed: int
    ) -> None:
        """Continue from the tensors of the SAE, `state()` and `summed`."""
        self.sae.load_state_dict(sae)
        for name, moments in self.moments.items():
            for key, moment in zip(MOMENTS, moments, strict=True):
                moment.copy_(state[f"optimiser.{name}.{key}"])
        # Checkpoints older than BatchTopK have no threshold.
        self.threshold.copy_(state.get("threshold", self.threshold))
        for name in self.average:
            self.average[name].copy_(state[f"average.{name}"])
        self.since_fired.copy_(state["since_fired"])
        # Checkpoints older than penalties and resampling have fewer sums.
        self.sums.zero_()[: len(state["sums"])] = state["sums"].to(self.sums)
        if self.sae.normaliser.per_vector:  # measured on the first batch
            self.back_end.variance = float(state["variance"])
            self.centre.copy_(state["centre"])
        self.summed = summed

    def _renew(
        self, z: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"], step: int
    ) -> Float[Tensor, ""]:
        """Let the remedy resample dead latents; return how many it does."""
        none, remedy = self.sums.new_zeros(()), self.config.remedy
        if remedy is None:
            return none
        config, sae, moments = self.config, self.sae, self.moments
        renewed = remedy.renew(
            Trained(sae, z, y, self.since_fired, moments, step, config.length, config.seed)
        )
        if renewed is None:
            return none
        self.since_fired[renewed] = 0
        for name in (each for each in self.average if each in PER_LATENT):
            self.average[name][renewed] = self.parameters[name][renewed]
        return none + len(renewed)

    def _average(self, step: int) -> None:
        if self.config.ema is not None:
            # Early on, average over few steps; otherwise the first weights would dominate.
            keep = min(self.config.ema, (step + 1) / (step + 10))
            for name, parameter in self.sae.named_parameters():
                self.average[name].lerp_(parameter, 1 - keep)

    def _follow_threshold(self, step: int, least: Float[Tensor, ""]) -> None:
        """Average the smallest active values of the batches, mainly of the last thousand."""
        least = torch.where(torch.isfinite(least), least.double(), self.threshold)
        # Early on, average over few batches; otherwise the first one would dominate.
        keep = min(THRESHOLD_DECAY, step / (step + 10))
        self.threshold.lerp_(least, 1 - keep)
        self.sae.threshold.copy_(self.threshold)  # for readers of a checkpoint

    def _watch(self, step: int, *figures: Float[Tensor, ""]) -> None:
        finite = torch.isfinite(torch.stack([each.detach() for each in figures]))
        now = torch.full_like(self.first_bad_steps, step).masked_fill_(finite, NEVER)
        self.first_bad_steps.copy_(torch.minimum(self.first_bad_steps, now))


def _initial(
    config: TrainConfig,
    statistics: SiteStatistics,
    target: SiteStatistics | None,
    sample: Float[Tensor, "batch d_in"],
    metadata: dict[str, Any],
) -> SparseAutoencoder:
    """Return the initial SAE, with normalisers fitted to the activations."""

    def fitted(each: SiteStatistics) -> Normaliser:
        return Normaliser.fit(config.sae.normaliser, each.mean, each.second_moment)

    normaliser = fitted(statistics)
    return SparseAutoencoder(
        len(statistics.mean),
        config.sae,
        d_out=None if target is None else len(target.mean),
        normaliser=normaliser,
        target_normaliser=None if target is None else fitted(target),
        sample=normaliser(sample),
        seed=config.seed,
        metadata=metadata,
    )


def _first_spread(
    sae: SparseAutoencoder,
    own: SiteStatistics,
    sample: Float[Tensor, "batch d_in"],
    seen: Float[Tensor, "batch d_out"],
    resumed: bool,
) -> tuple[float, Float[Tensor, " d_out"]]:
    """Return variance and mean of the reconstruction's target, in normalised space.

    Args:
        sae: the SAE, with its normalisers.
        own: statistics of the target.
        sample: a sample of activations.
        seen: the target for the sample.
        resumed: see `SiteTraining`.
    """
    frame = sae.normaliser.frame(sample)
    spread = _spread(own, sae.target_normaliser or sae.normaliser, seen, frame)
    if frame is not None and not resumed:
        _check_first_batch(seen, frame, sae.config.normaliser, sae.metadata)
    return spread


def _varies(statistics: SiteStatistics) -> bool:
    """Return whether activations vary by more than rounding explains."""
    variance = (statistics.second_moment - statistics.mean**2).clamp(min=0)
    return not bool(variance.sum() <= ROUNDING * statistics.second_moment.sum())


def _check_first_batch(
    sample: Float[Tensor, "batch d_out"],
    frame: Frame,
    kind: str,
    metadata: Mapping[str, Any],
) -> None:
    """Check that vectors still differ after each is normalised by itself.

    Raises:
        UserError: the batch has one vector, so that its spread cannot be measured.
        SparsightError: they differ only by rounding.
    """
    if len(sample) == 1:
        raise UserError(
            f"batch_size is 1, but the normaliser {kind!r} measures the spread of the activations "
            "on the first batch, which takes at least 2 vectors. Choose a larger batch_size, or "
            "the normaliser 'scale'."
        )
    share, size = _rounding(sample), sample.double().square().mean(dim=1, keepdim=True)
    # A vector whose entries are all equal has no direction but that of rounding errors.
    kept = (frame.scale.double().square() > share * size)[:, 0]
    z = ((sample - frame.mean) / frame.scale)[kept].double()
    rounded = (size / frame.scale.double().square())[kept].mean() * sample.shape[1]
    if kept.sum() < 2 or z.var(dim=0, correction=0).sum() <= share * rounded:
        name = metadata.get("target_site", metadata.get("site", "The site"))
        raise _nothing_to_learn(
            name, f" in the first batch once {kind!r} has normalised each vector"
        )


def _rounding(x: Float[Tensor, "batch d_in"]) -> float:
    """Return the variance that rounding at x's precision explains, relative to the mean square."""
    for dtype, share in HALF_ROUNDING.items():
        if torch.equal(x, x.to(dtype).float()):
            return share
    return ROUNDING


def _nothing_to_learn(site: str, where: str = "") -> SparsightError:
    return SparsightError(
        f"{site}: the activations do not vary{where}, so there is nothing to learn. CLS before the "
        "first block is such a case; choose another site or other tokens."
    )


def _spread(
    statistics: SiteStatistics,
    normaliser: Normaliser,
    sample: Float[Tensor, "batch d_in"],
    frame: Frame | None,
) -> tuple[float, Float[Tensor, " d_in"]]:
    """Return variance (Σ over dimensions) and mean in normalised space: of the data set, or of a
    sample if each vector is normalised by itself."""
    if normaliser.per_vector:
        z = normaliser(sample, frame).double()
        return float(z.var(dim=0, correction=0).sum()), z.mean(dim=0)
    spread = statistics.second_moment - statistics.mean**2
    scale = normaliser.scale.double()
    centre = (statistics.mean - normaliser.mean.double()) / scale
    return float((spread.clamp(min=0) / scale**2).sum()), centre
