"""One SAE in training: its parameters, optimiser, dead-latent counters and running figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsight.activations import SiteStatistics
from sparsight.errors import SparsightError, UserError
from sparsight.kernels import Adam, FusedStep, Kernels, Precision, StepFigures, fused_step
from sparsight.kernels.interface import least_positive
from sparsight.sae import Normaliser, SparseAutoencoder
from sparsight.sae.code import Frame
from sparsight.sae.normaliser import ROUNDING
from sparsight.sae.objectives import dense_loss, whole_batch
from sparsight.training.config import TrainConfig
from sparsight.training.resampling import PER_LATENT, resample

NEVER = torch.iinfo(torch.int64).max

SUMS = (
    "squared_error", "squared_spread", "l0", "loss", "aux_loss", "grad_norm", "penalty", "revived",
    "resampled",
)  # fmt: skip
DENSE_ENTRIES = 2**27
"""Of a code that plain autograd holds at a time, where a batch can be taken in parts."""
HALF_ROUNDING = {torch.bfloat16: 64e-7, torch.float16: 1e-7}
"""As `ROUNDING`, of activations that were in half precision: some three times what it makes."""
THRESHOLD_DECAY = 0.999
"""Of the average that becomes the threshold of a BatchTopK SAE."""

BAD = ("activations", "loss", "gradient")
"""What can cease to be finite, in the order of cause and effect."""


class SiteTraining:
    """Everything that changes while one site's SAE trains; `step` trains on one batch.

    Args:
        config: of the run.
        statistics: of the site's activations.
        sample: some activations, for the scale of the initial encoder.
        metadata: of the SAE.
        device: where to train.
        kernels: who computes a step; not "auto".
        precision: of the selection.
        target: of a transcoder, the statistics of the site that it predicts.
        target_sample: some activations of that site.
        resumed: the samples stand in for those of a checkpoint, which follows.

    Raises:
        UserError: of the one vector of a batch no spread can be measured.
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
        kind = config.sae.normaliser
        for name, each in {"site": statistics, "target_site": target}.items():
            if each is not None and not _varies(each):
                raise _nothing_to_learn(metadata.get(name, "The site"))
        normaliser = Normaliser.fit(kind, statistics.mean, statistics.second_moment)
        target_normaliser = None
        if target is not None:
            target_normaliser = Normaliser.fit(kind, target.mean, target.second_moment)
        self.sae = SparseAutoencoder(
            len(statistics.mean),
            config.sae,
            d_out=None if target is None else len(target.mean),
            normaliser=normaliser,
            target_normaliser=target_normaliser,
            sample=normaliser(sample.cpu().float()),
            seed=config.seed,
            metadata=metadata,
        ).to(device)
        fitted, own = target_normaliser or normaliser, target or statistics
        seen = sample if target_sample is None else target_sample
        frame = normaliser.frame(sample.cpu().float())
        variance, centre = _spread(own, fitted, seen.cpu().float(), frame)
        if frame is not None and not resumed:
            _check_first_batch(seen.cpu().float(), frame, kind, metadata)
        self.variance = variance
        self.centre: Float[Tensor, " d_out"] = centre.float().to(device)
        self.lr = config.learning_rate(self.sae.n_latents)
        self.plan = config.plan(self.sae.d_in)
        self.objective = config.objective(self.sae.d_in)
        faster = config.sae.sparsity.lr_factors
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in self.sae.named_parameters():
            groups.setdefault(faster.get(name, 1.0), []).append(parameter)
        self.optimiser = torch.optim.Adam(
            [{"params": each, "factor": factor} for factor, each in groups.items()],
            lr=self.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        for parameter in self.sae.parameters():
            self.optimiser.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.since_fired: Int[Tensor, " n_latents"] = torch.zeros(
            self.sae.n_latents, dtype=torch.int64, device=device
        )
        self.average: dict[str, Tensor] = {}
        if config.ema is not None:
            self.average = {
                name: each.detach().clone() for name, each in self.sae.named_parameters()
            }
        self.threshold = torch.zeros((), dtype=torch.float64, device=device)
        self.fused: FusedStep | None = None
        if kernels != "dense" and self.objective is not None:
            self.fused = fused_step(
                kernels,
                dict(self.sae.named_parameters()),
                {name: self._moments(name) for name, _ in self.sae.named_parameters()},
                self.since_fired,
                self.objective,
                Adam(config.betas, config.eps, config.grad_clip),
                variance=self.variance,
                unit_norm=config.sae.unit_norm_decoder,
                precision=precision,
            )
        self.first_bad_steps = torch.full((len(BAD),), NEVER, dtype=torch.int64, device=device)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.summed = 0

    @property
    def dead(self) -> Bool[Tensor, " n_latents"]:
        """Latents without an activation in the last `dead_after` vectors."""
        return self.since_fired >= self.config.dead_after

    def step(
        self,
        x: Float[Tensor, "batch d_in"],
        step: int,
        lr_factor: float,
        target: Float[Tensor, "batch d_out"] | None = None,
    ) -> None:
        """Train on one batch. Nothing is fetched from the device, but for the remedies the list of
        the dead latents, as soon as there can be any.

        Args:
            x: activations in the units of the model.
            step: number of the step, from 0.
            lr_factor: share of the peak learning rate.
            target: of a transcoder, the activations that it predicts.
        """
        with torch.no_grad():
            frame = self.sae.normaliser.frame(x)
            z = self.sae.normaliser(x, frame)
            y = z
            if self.sae.target_normaliser is not None:
                assert target is not None
                y = self.sae.target_normaliser(target, frame)
            resampled = self._resample(z, y, step)
            before = self.dead if step * len(z) >= self.config.dead_after else None
            dead = None
            if before is not None and (self.config.auxk or self.config.ghost):
                dead = before.nonzero()[:, 0]
            lr = self.lr * lr_factor
            penalty = self.sums.new_zeros(())
            if self.fused is not None:
                found = self.fused.step(z, lr=lr, number=step + 1, dead=dead)
            else:
                for state in self.optimiser.state.values():
                    state["step"].fill_(step)
                found, penalty = self._dense_step(z, y, step, lr, dead)
            self._average(step)
            spread = (y - self.centre).square().sum()
            self._watch(step, spread, found.loss, found.grad_norm)
            if self.config.sae.sparsity.per_batch:
                self._follow_threshold(step, found.least)
            revived = penalty.new_zeros(())
            if before is not None:
                revived = (before & ~self.dead).sum()
            figures = (
                found.squared_error, spread, found.active, found.loss, found.aux_loss,
                found.grad_norm, penalty, revived, resampled,
            )  # fmt: skip
            self.sums += torch.stack([each.detach().double() for each in figures])
            self.summed += len(z)

    @property
    def kernels(self) -> str:
        """Who computes the steps, for the log."""
        return "dense-float32" if self.fused is None else self.fused.name

    def figures(self, batch_size: int) -> dict[str, float]:
        """Averages since the last call, over the vectors trained on: FVU, L0, dead, losses; and how
        many dead latents fired again, or were resampled."""
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        n_batches = max(self.summed / batch_size, 1e-9)
        found = {
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
        return found

    def first_bad(self) -> tuple[int, str] | None:
        """The first step at which something was not finite, and what it was; None while all is."""
        steps: list[int] = self.first_bad_steps.tolist()
        step = min(steps)
        return None if step == NEVER else (step, BAD[steps.index(step)])

    def finished(self) -> SparseAutoencoder:
        """The SAE of the run: the average of the weights, if there is one."""
        with torch.no_grad():
            if self.average:
                for name, parameter in self.sae.named_parameters():
                    parameter.copy_(self.average[name])
                self.sae.constrain()
        return self.sae

    def state(self) -> dict[str, Tensor]:
        """Every tensor that exact resume needs beside those of the SAE."""
        found = {}
        for name, parameter in self.sae.named_parameters():
            for key, each in self.optimiser.state[parameter].items():
                found[f"optimiser.{name}.{key}"] = each
        found |= {f"average.{name}": each for name, each in self.average.items()}
        found["since_fired"] = self.since_fired
        found["threshold"] = self.threshold
        found["sums"] = self.sums
        found["variance"] = torch.tensor(self.variance, dtype=torch.float64)
        found["centre"] = self.centre
        return {key: each.detach().cpu().contiguous() for key, each in found.items()}

    def load_state(
        self, sae: Mapping[str, Tensor], state: Mapping[str, Tensor], summed: int
    ) -> None:
        """Continue from the tensors of the SAE, `state()` and `summed`."""
        self.sae.load_state_dict(sae)
        for name, parameter in self.sae.named_parameters():
            for key, each in self.optimiser.state[parameter].items():
                each.copy_(state[f"optimiser.{name}.{key}"])
        # Absent in checkpoints from before there was BatchTopK.
        self.threshold.copy_(state.get("threshold", self.threshold))
        for name in self.average:
            self.average[name].copy_(state[f"average.{name}"])
        self.since_fired.copy_(state["since_fired"])
        # Checkpoints from before there were penalties and resampling have fewer sums.
        self.sums.zero_()[: len(state["sums"])] = state["sums"].to(self.sums)
        if self.sae.normaliser.per_vector:  # measured on the first batch
            self.variance = float(state["variance"])
            self.centre.copy_(state["centre"])
            if self.fused is not None:
                self.fused.variance = self.variance
        self.summed = summed

    def _moments(self, name: str) -> tuple[Tensor, Tensor]:
        state = self.optimiser.state[self.sae.get_parameter(name)]
        return state["exp_avg"], state["exp_avg_sq"]

    def _dense_step(
        self,
        z: Float[Tensor, "batch d_in"],
        y: Float[Tensor, "batch d_out"],
        step: int,
        lr: float,
        dead: Int[Tensor, " dead"] | None,
    ) -> tuple[StepFigures, Float[Tensor, ""]]:
        """A step of plain autograd; a large batch in parts, of whose losses its own is the mean."""
        plan = self.plan.at(step, self.sae.n_latents, self.config.seed)
        price = min((step + 1) / max(self.config.sparsity_warmup * self.config.n_steps, 1), 1.0)
        self.optimiser.zero_grad(set_to_none=True)
        size, whole = max(1, DENSE_ENTRIES // self.sae.n_latents), None
        if not (plan.sparsity.separable or plan.sparsity.per_batch):
            size = len(z)
        batch = list(zip(z.split(size), y.split(size), strict=True))
        some_dead = dead is not None and len(dead) > 0
        if len(batch) > 1 and (some_dead or not plan.sparsity.separable):
            seen = [(inputs, self._without_skip(inputs, target)) for inputs, target in batch]
            whole = whole_batch(self.sae.weights(), seen, plan, dead)
        fired = torch.zeros(self.sae.n_latents, dtype=torch.bool, device=z.device)
        sums = torch.zeros(5, dtype=torch.float64, device=z.device)
        least = torch.full((), math.inf, device=z.device)
        for inputs, target in batch:
            with torch.enable_grad():
                found = dense_loss(
                    self.sae.weights(),
                    inputs,
                    plan,
                    self.variance,
                    dead,
                    target=self._without_skip(inputs, target),
                    price=price,
                    whole=whole,
                )
                share = len(inputs) / len(z)
                (share * found.loss).backward()
            fired |= (found.code != 0).any(dim=0)
            least = torch.minimum(least, least_positive(found.code))
            parts = (
                found.squared_error, share * found.loss.detach(), share * found.aux_loss,
                (found.code != 0).sum(), share * found.penalty,
            )  # fmt: skip
            sums += torch.stack([each.double() for each in parts])
        W_dec = self.sae.W_dec
        if self.config.sae.unit_norm_decoder and W_dec.grad is not None:
            along = (W_dec.grad * W_dec).sum(dim=1, keepdim=True)
            W_dec.grad -= along * W_dec
        largest = self.config.grad_clip if self.config.grad_clip is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), largest)
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["factor"]
        self.optimiser.step()
        self.sae.constrain()
        self.since_fired.add_(len(z))
        self.since_fired.masked_fill_(fired, 0)
        squared_error, loss, aux_loss, active, penalty = sums
        return StepFigures(squared_error, loss, aux_loss, active.long(), norm, least), penalty

    def _without_skip(
        self, z: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"]
    ) -> Float[Tensor, "batch d_out"]:
        """What is left for the code, where a transcoder has a linear map beside it."""
        return y - z @ self.sae.W_skip.T if self.config.sae.skip else y

    def _resample(
        self, z: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"], step: int
    ) -> Float[Tensor, ""]:
        """Begin anew with dead latents if it is time to; how many."""
        none = self.sums.new_zeros(())
        settings = self.config.resampling
        if settings is None:
            return none
        every = max(1, round(self.config.resample_every / len(z)))
        instalments = math.ceil(self.sae.n_latents / len(z))
        if not 1 <= step // every <= settings.times or step % every >= instalments:
            return none
        # In later instalments those that were dead at the first, not those that it killed.
        since = self.config.resample_after + step % every * len(z)
        dead = (self.since_fired >= since).nonzero()[:, 0]
        if len(dead) == 0:
            return none
        moments = {name: self._moments(name) for name, _ in self.sae.named_parameters()}
        renewed = resample(
            self.sae, z, y, dead, moments, scale=settings.scale, seed=(self.config.seed, step)
        )
        self.since_fired[renewed] = 0
        for name in (each for each in self.average if each in PER_LATENT):
            self.average[name][renewed] = self.sae.get_parameter(name)[renewed]
        return none + len(renewed)

    def _average(self, step: int) -> None:
        if self.config.ema is not None:
            # Early on the average is over few steps, or else it would keep the first weights.
            keep = min(self.config.ema, (step + 1) / (step + 10))
            for name, parameter in self.sae.named_parameters():
                self.average[name].lerp_(parameter, 1 - keep)

    def _follow_threshold(self, step: int, least: Float[Tensor, ""]) -> None:
        """Average the smallest active value of the batches, of the last thousand most of all."""
        least = torch.where(torch.isfinite(least), least.double(), self.threshold)
        # Early on over few batches, or else it would keep the first one's.
        keep = min(THRESHOLD_DECAY, step / (step + 10))
        self.threshold.lerp_(least, 1 - keep)
        self.sae.threshold.copy_(self.threshold)  # for who reads a checkpoint

    def _watch(self, step: int, *figures: Float[Tensor, ""]) -> None:
        finite = torch.isfinite(torch.stack([each.detach() for each in figures]))
        now = torch.full_like(self.first_bad_steps, step).masked_fill_(finite, NEVER)
        self.first_bad_steps.copy_(torch.minimum(self.first_bad_steps, now))


def _varies(statistics: SiteStatistics) -> bool:
    """Whether activations vary by more than what rounding explains."""
    variance = (statistics.second_moment - statistics.mean**2).clamp(min=0)
    return not bool(variance.sum() <= ROUNDING * statistics.second_moment.sum())


def _check_first_batch(
    sample: Float[Tensor, "batch d_out"],
    frame: Frame,
    kind: str,
    metadata: Mapping[str, Any],
) -> None:
    """Make sure that vectors that are measured one by one still differ.

    Raises:
        UserError: the batch has one vector, of which no spread can be measured.
        SparsightError: they are the same but for rounding.
    """
    if len(sample) == 1:
        raise UserError(
            f"batch_size is 1. With the normaliser {kind!r} the spread of the activations is "
            "measured on the first batch, which takes 2 vectors or more. Take a larger batch_size, "
            "or the normaliser 'scale'."
        )
    share, size = _rounding(sample), sample.double().square().mean(dim=1, keepdim=True)
    # Whose entries are one number has no direction; which one it is, is rounding.
    kept = (frame.scale.double().square() > share * size)[:, 0]
    z = ((sample - frame.mean) / frame.scale)[kept].double()
    rounded = (size / frame.scale.double().square())[kept].mean() * sample.shape[1]
    if kept.sum() < 2 or z.var(dim=0, correction=0).sum() <= share * rounded:
        name = metadata.get("target_site", metadata.get("site", "The site"))
        raise _nothing_to_learn(
            name, f" in the first batch once {kind!r} has normalised each vector"
        )


def _rounding(x: Float[Tensor, "batch d_in"]) -> float:
    """Variance, as a share of the mean square, that rounding explains, as coarse as x shows it."""
    for dtype, share in HALF_ROUNDING.items():
        if torch.equal(x, x.to(dtype).float()):
            return share
    return ROUNDING


def _nothing_to_learn(site: str, where: str = "") -> SparsightError:
    return SparsightError(
        f"{site}: the activations do not vary{where}, as those of CLS before the first block: "
        "there is nothing to learn."
    )


def _spread(
    statistics: SiteStatistics,
    normaliser: Normaliser,
    sample: Float[Tensor, "batch d_in"],
    frame: Frame | None,
) -> tuple[float, Float[Tensor, " d_in"]]:
    """Variance (Σ over dimensions) and mean in normalised space: of the data set, or of a sample
    where every vector is measured by itself."""
    if normaliser.per_vector:
        z = normaliser(sample, frame).double()
        return float(z.var(dim=0, correction=0).sum()), z.mean(dim=0)
    spread = statistics.second_moment - statistics.mean**2
    scale = normaliser.scale.double()
    centre = (statistics.mean - normaliser.mean.double()) / scale
    return float((spread.clamp(min=0) / scale**2).sum()), centre
