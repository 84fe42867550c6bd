"""Sparsight's own contenders: a training step, and encoding, with each kind of kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from contenders import Contender, Task
from torch import Tensor

from sparsight.activations.statistics import RunningSums
from sparsight.kernels import choose, using
from sparsight.sae import AuxK, SAEConfig, SparseAutoencoder, SparseCode, TopK
from sparsight.training import TrainConfig
from sparsight.training.site import SiteTraining

DEAD_AFTER = 10_000_000
LONG_DEAD = 1 << 40


class Ours(Contender):
    """The trainer's own step, without gradient clipping, or `SparseAutoencoder.encode`."""

    def __init__(self, task: Task, kernels: str) -> None:
        super().__init__(task)
        self.kernels = kernels
        config = SAEConfig(
            n_latents=self.shape.n_latents,
            sparsity=TopK(self.shape.k),
            normaliser="none",
            b_dec_init="mean",  # most peers use a mean or median too
        )
        if task.dictionary is not None:
            with using(kernels):
                self.sae = SparseAutoencoder(self.shape.d_in, config).to(task.device)
            return
        remedy = AuxK(k=task.k_aux, dead_after=DEAD_AFTER) if task.dead else None
        batches = task.batches().cpu()
        sums = RunningSums.nothing(self.shape.d_in)
        for batch in batches:
            sums.add(batch)
        self.training = SiteTraining(
            TrainConfig(
                sae=config,
                n_vectors=1_000_000_000,
                batch_size=self.shape.batch_size,
                grad_clip=None,
                remedy=remedy,
                kernels=kernels,
            ),
            sums.statistics(),
            batches[0],
            {},
            torch.device(task.device),
            *choose(kernels, task.precision, torch.device(task.device)),
        )
        self.sae = self.training.sae
        self.dead = task.dead_latents()
        # With dead latents, late enough for the trainer to look for them.
        self.number = DEAD_AFTER // self.shape.batch_size + 1 if task.dead else 0

    def load(self, rows: Tensor, b_dec: Tensor) -> None:
        self.sae.W_enc.copy_(rows)
        self.sae.W_dec.copy_(rows)
        self.sae.b_enc.zero_()
        self.sae.b_dec.copy_(b_dec)

    def prepare(self) -> None:
        if self.task.dead:
            self.training.since_fired[self.dead] = LONG_DEAD

    def step(self, x: Tensor) -> None:
        self.training.step(x, self.number, 1.0)
        self.number += 1

    def encode(self, x: Tensor) -> SparseCode:
        with using(self.kernels):
            return self.sae.encode(x)

    def chosen(self, code: Any) -> Tensor:
        return code.dense().topk(self.shape.k, dim=1).indices

    def reconstruct(self, x: Tensor) -> Tensor:
        x_hat: Tensor = self.sae(x).x_hat
        return x_hat


class Baseline(Contender):
    """Encoding in one line of torch."""

    encode_note = "`torch.topk(x @ W.T + b, k)`"

    def load(self, rows: Tensor, b_dec: Tensor) -> None:
        self.weights = rows
        self.bias = -rows @ b_dec

    def encode(self, x: Tensor) -> Tensor:
        return torch.topk(x @ self.weights.T + self.bias, self.shape.k).indices

    def chosen(self, code: Any) -> Tensor:
        found: Tensor = code
        return found


KERNELS = ("dense", "torch", "native", "triton")

CONTENDERS: dict[str, Any] = {
    **{f"sparsight-{name}": partial(Ours, kernels=name) for name in KERNELS},
    "torch.topk": Baseline,
}
