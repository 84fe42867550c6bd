"""One SAE in training: its parameters, optimiser, dead-latent counters and running figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from sparsight.activations import SiteStatistics
from sparsight.sae import Normaliser, SparseAutoencoder
from sparsight.sae.kernels import Precision
from sparsight.sae.objectives import auxk_loss, default_auxk
from sparsight.training.config import TrainConfig

NEVER = torch.iinfo(torch.int64).max

SUMS = ("squared_error", "squared_spread", "l0", "loss", "aux_loss", "grad_norm")
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
        precision: of the selection.
    """

    def __init__(
        self,
        config: TrainConfig,
        statistics: SiteStatistics,
        sample: Float[Tensor, "batch d_in"],
        metadata: dict[str, Any],
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.config = config
        self.precision = precision
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
        self.aux_k = (config.auxk.k if config.auxk else None) or default_auxk(self.sae.d_in)
        self.optimiser = torch.optim.Adam(
            self.sae.parameters(), lr=self.lr, betas=config.betas, eps=config.eps, fused=True
        )
        self.since_fired: Int[Tensor, " n_latents"] = torch.zeros(
            self.sae.n_latents, dtype=torch.int64, device=device
        )
        self.average: dict[str, Tensor] = {}
        if config.ema is not None:
            self.average = {
                name: each.detach().clone() for name, each in self.sae.named_parameters()
            }
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
        sae = self.sae
        z = sae.normaliser(x)
        values, indices = sae.encode_normalised(z, self.precision)
        z_hat = sae.decode_normalised(values, indices)
        squared_error = functional.mse_loss(z_hat, z, reduction="sum")
        loss = squared_error / (len(z) * self.variance)
        auxiliary = None
        total = loss
        if self.config.auxk is not None and step * len(z) >= self.config.dead_after:
            auxiliary = auxk_loss(sae, z, z - z_hat, self.dead, self.aux_k)
            if auxiliary is not None:
                total = loss + self.config.auxk.alpha * auxiliary
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        grad_norm = self._update(step, lr_factor)
        with torch.no_grad():
            self._count(values.detach(), indices)
            spread = (z - self.centre).square().sum()
            self._watch(step, spread, total, grad_norm)
            l0 = (values > 0).sum()
            aux = torch.zeros_like(loss) if auxiliary is None else auxiliary
            self.sums += torch.stack(
                [
                    each.detach().double()
                    for each in (squared_error, spread, l0, total, aux, grad_norm)
                ]
            )
            self.summed += len(z)

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
        if self.average:
            with torch.no_grad():
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
        found["sums"] = self.sums
        return {key: each.detach().cpu().contiguous() for key, each in found.items()}

    def load_state(
        self, sae: Mapping[str, Tensor], state: Mapping[str, Tensor], summed: int
    ) -> None:
        """Continue from the tensors of the SAE, `state()` and `summed`."""
        self.sae.load_state_dict(sae)
        for name, parameter in self.sae.named_parameters():
            prefix = f"optimiser.{name}."
            self.optimiser.state[parameter] = {
                key[len(prefix) :]: each.to(parameter.device)
                for key, each in state.items()
                if key.startswith(prefix)
            }
        for name in self.average:
            self.average[name].copy_(state[f"average.{name}"])
        self.since_fired.copy_(state["since_fired"])
        self.sums.copy_(state["sums"])
        self.summed = summed

    def _update(self, step: int, lr_factor: float) -> Float[Tensor, ""]:
        """One step of the optimiser; gives the norm of the gradient before it was clipped."""
        W_dec = self.sae.W_dec
        if self.config.sae.unit_norm_decoder and W_dec.grad is not None:
            with torch.no_grad():
                along = (W_dec.grad * W_dec).sum(dim=1, keepdim=True)
                W_dec.grad -= along * W_dec
        largest = self.config.grad_clip if self.config.grad_clip is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), largest)
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * lr_factor
        self.optimiser.step()
        with torch.no_grad():
            if self.config.sae.unit_norm_decoder:
                self._renormalise()
            if self.config.ema is not None:
                # Early on the average is over few steps, or else it would keep the first weights.
                keep = min(self.config.ema, (step + 1) / (step + 10))
                for name, parameter in self.sae.named_parameters():
                    self.average[name].lerp_(parameter, 1 - keep)
        return norm

    def _renormalise(self) -> None:
        if self.config.sae.unit_norm_decoder:
            W_dec = self.sae.W_dec
            W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))

    def _watch(self, step: int, *figures: Float[Tensor, ""]) -> None:
        finite = torch.isfinite(torch.stack([each.detach() for each in figures]))
        now = torch.full_like(self.first_bad_steps, step).masked_fill_(finite, NEVER)
        self.first_bad_steps.copy_(torch.minimum(self.first_bad_steps, now))

    def _count(self, values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"]) -> None:
        self.since_fired += len(values)
        # A latent that was picked with a value of 0 did not fire: it is sent to a spare place.
        fired = torch.where(values > 0, indices, self.sae.n_latents).flatten()
        mask = torch.zeros(self.sae.n_latents + 1, dtype=torch.bool, device=fired.device)
        mask[fired] = True
        self.since_fired.masked_fill_(mask[:-1], 0)
