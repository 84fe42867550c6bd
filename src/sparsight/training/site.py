"""One SAE in training: its parameters, optimiser, dead-latent counters and running figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsight.activations import SiteStatistics
from sparsight.sae import BatchTopK, Normaliser, SparseAutoencoder
from sparsight.sae.kernels import Adam, FusedStep, Kernels, Precision, StepFigures, fused_step
from sparsight.sae.kernels.interface import least_positive
from sparsight.sae.objectives import dense_loss
from sparsight.training.config import TrainConfig

NEVER = torch.iinfo(torch.int64).max

SUMS = ("squared_error", "squared_spread", "l0", "loss", "aux_loss", "grad_norm")
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
    ) -> None:
        self.config = config
        normaliser = Normaliser.fit(
            config.sae.normaliser, statistics.mean, statistics.second_moment
        )
        self.sae = SparseAutoencoder(
            len(statistics.mean),
            config.sae,
            normaliser=normaliser,
            sample=normaliser(sample.cpu().float()),
            seed=config.seed,
            metadata=metadata,
        ).to(device)
        spread = statistics.second_moment - statistics.mean**2
        scale = normaliser.scale.double()
        self.variance = float((spread.clamp(min=0) / scale**2).sum())
        centre = (statistics.mean - normaliser.mean.double()) / scale
        self.centre: Float[Tensor, " d_in"] = centre.float().to(device)
        self.lr = config.learning_rate(self.sae.n_latents)
        self.objective = config.objective(self.sae.d_in)
        self.optimiser = torch.optim.Adam(
            self.sae.parameters(), lr=self.lr, betas=config.betas, eps=config.eps, fused=True
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
        if kernels != "dense":
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

    def step(self, x: Float[Tensor, "batch d_in"], step: int, lr_factor: float) -> None:
        """Train on one batch. Nothing is fetched from the device, but for AuxK the list of the dead
        latents, as soon as there can be any.

        Args:
            x: activations in the units of the model.
            step: number of the step, from 0.
            lr_factor: share of the peak learning rate.
        """
        with torch.no_grad():
            z = self.sae.normaliser(x)
            dead = None
            if self.config.auxk is not None and step * len(z) >= self.config.dead_after:
                dead = self.dead.nonzero()[:, 0]
            lr = self.lr * lr_factor
            if self.fused is not None:
                found = self.fused.step(z, lr=lr, number=step + 1, dead=dead)
            else:
                for state in self.optimiser.state.values():
                    state["step"].fill_(step)
                found = self._dense_step(z, lr, dead)
            self._average(step)
            spread = (z - self.centre).square().sum()
            self._watch(step, spread, found.loss, found.grad_norm)
            if isinstance(self.config.sae.sparsity, BatchTopK):
                self._follow_threshold(step, found.least)
            figures = (
                found.squared_error, spread, found.active, found.loss, found.aux_loss,
                found.grad_norm,
            )  # fmt: skip
            self.sums += torch.stack([each.detach().double() for each in figures])
            self.summed += len(z)

    @property
    def kernels(self) -> str:
        """Who computes the steps, for the log."""
        return "dense-float32" if self.fused is None else self.fused.name

    def figures(self, batch_size: int) -> dict[str, float]:
        """Averages since the last call, over the vectors trained on: FVU, L0, dead, losses."""
        sums = dict(zip(SUMS, self.sums.tolist(), strict=True))
        n_batches = max(self.summed / batch_size, 1e-9)
        found = {
            "fvu": sums["squared_error"] / max(sums["squared_spread"], 1e-300),
            "l0": sums["l0"] / max(self.summed, 1),
            "dead": self.dead.double().mean().item(),
            "loss": sums["loss"] / n_batches,
            "aux_loss": sums["aux_loss"] / n_batches,
            "grad_norm": sums["grad_norm"] / n_batches,
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
                self._renormalise()
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
        self.sums.copy_(state["sums"])
        self.summed = summed

    def _moments(self, name: str) -> tuple[Tensor, Tensor]:
        state = self.optimiser.state[self.sae.get_parameter(name)]
        return state["exp_avg"], state["exp_avg_sq"]

    def _dense_step(
        self, z: Float[Tensor, "batch d_in"], lr: float, dead: Int[Tensor, " dead"] | None
    ) -> StepFigures:
        """A step of plain autograd."""
        parameters: dict[str, Tensor] = dict(self.sae.named_parameters())
        with torch.enable_grad():
            found = dense_loss(parameters, z, self.objective, self.variance, dead)
            self.optimiser.zero_grad(set_to_none=True)
            found.loss.backward()
        W_dec = self.sae.W_dec
        if self.config.sae.unit_norm_decoder and W_dec.grad is not None:
            along = (W_dec.grad * W_dec).sum(dim=1, keepdim=True)
            W_dec.grad -= along * W_dec
        largest = self.config.grad_clip if self.config.grad_clip is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), largest)
        self.optimiser.param_groups[0]["lr"] = lr
        self.optimiser.step()
        self._renormalise()
        fired = (found.code > 0).any(dim=0)
        self.since_fired.add_(len(z))
        self.since_fired.masked_fill_(fired, 0)
        return StepFigures(
            found.squared_error, found.loss.detach(), found.aux_loss, (found.code > 0).sum(), norm,
            least_positive(found.code),
        )  # fmt: skip

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
        if self.sae.threshold is not None:  # for who reads a checkpoint
            self.sae.threshold.copy_(self.threshold)

    def _renormalise(self) -> None:
        if self.config.sae.unit_norm_decoder:
            W_dec = self.sae.W_dec
            W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))

    def _watch(self, step: int, *figures: Float[Tensor, ""]) -> None:
        finite = torch.isfinite(torch.stack([each.detach() for each in figures]))
        now = torch.full_like(self.first_bad_steps, step).masked_fill_(finite, NEVER)
        self.first_bad_steps.copy_(torch.minimum(self.first_bad_steps, now))
