"""The peers, as PyPI has them, each with the training step that its own trainer takes.

A peer's trainer is called directly if it takes activations. sparsify's needs a language model and
saev's needs shards, so their modules are called with their trainers' loops. `peers.txt` lists what
is installed; the dead-latent counters are the peers' own.

Some packages import libraries that are not needed here (for loading models, plotting, logging). An
empty module replaces such a library if it is absent; see `stubs`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from contenders import Contender, ContenderError, Task
from stubs import stub
from torch import Tensor

AUXK_ALPHA = 1 / 32
LONG_DEAD = 1 << 40


class Sparsify(Contender):
    """EleutherAI sparsify: FVU, and AuxK with k = d / 2, in the order of `Trainer.fit`."""

    def __init__(self, task: Task, *, fused: bool) -> None:
        super().__init__(task)
        stub("accelerate")  # moves inputs of language models
        if not torch.cuda.is_available():
            # If Triton is installed, it is used, and fails without a GPU.
            sys.modules["triton"] = None  # type: ignore[assignment]
        from sparsify import SparseCoder, SparseCoderConfig

        config = SparseCoderConfig(num_latents=self.shape.n_latents, k=self.shape.k)
        self.sae = SparseCoder(self.shape.d_in, config, task.device, torch.float32)
        self.fused = fused
        self.note = "Adam(fused=True) put in" if fused else "its Adam is not fused"
        self.since_fired = torch.zeros(self.shape.n_latents, dtype=torch.long, device=task.device)
        self.did_fire = torch.zeros(self.shape.n_latents, dtype=torch.bool, device=task.device)
        self.dead = task.dead_latents()
        self.begun = False

    @cached_property
    def optimiser(self) -> torch.optim.Adam:
        lr = 2e-4 / math.sqrt(self.shape.n_latents / 2**14)
        fused = True if self.fused else None
        return torch.optim.Adam(self.sae.parameters(), lr=lr, fused=fused)

    def load(self, rows: Tensor, b_dec: Tensor) -> None:
        self.sae.encoder.weight.copy_(rows)
        self.sae.W_dec.copy_(rows)
        self.sae.b_dec.copy_(b_dec)

    def prepare(self) -> None:
        self.since_fired[self.dead] = LONG_DEAD

    def step(self, x: Tensor) -> None:
        if not self.begun:
            self.sae.b_dec.data = x.mean(0)
            self.begun = True
        self.sae.set_decoder_norm_to_unit_norm()
        dead_mask = self.since_fired > 10_000_000 if self.task.dead else None
        out = self.sae(x, dead_mask=dead_mask)
        self.did_fire[out.latent_indices.flatten()] = True
        loss = out.fvu + AUXK_ALPHA * out.auxk_loss if self.task.dead else out.fvu
        loss.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            self.since_fired += len(x)
            self.since_fired[self.did_fire] = 0
            self.did_fire.zero_()

    def encode(self, x: Tensor) -> Any:
        return self.sae.encode(x)

    def chosen(self, code: Any) -> Tensor:
        found: Tensor = code.top_indices
        return found

    def reconstruct(self, x: Tensor) -> Tensor:
        out: Tensor = self.sae(x).sae_out
        return out


class SAELens(Contender):
    """SAELens: `SAETrainer.step` of its TopK SAE as configured by default (dense activations)."""

    note = "clips the gradient"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        # For logging, downloads of corpora and plots, not for SAEs.
        stub("wandb", "babe", "nltk", "dotenv", "plotly", "plotly_express", "tenacity")
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        shape = self.shape
        config = TopKTrainingSAEConfig(
            d_in=shape.d_in, d_sae=shape.n_latents, k=shape.k, device=task.device
        )
        self.sae = TopKTrainingSAE(config)
        settings = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=shape.batch_size,
            lr=2e-4 / math.sqrt(shape.n_latents / 2**14),
            lr_end=0.0,
            device=task.device,
        )
        self.trainer = SAETrainer(settings, self.sae, iter(()))
        self.dead = task.dead_latents()

    def load(self, rows: Tensor, b_dec: Tensor) -> None:
        self.sae.W_enc.copy_(rows.T)
        self.sae.W_dec.copy_(rows)
        self.sae.b_dec.copy_(b_dec)
        # It subtracts b_dec only if its config says so.
        if not self.sae.cfg.apply_b_dec_to_input:
            self.sae.b_enc.copy_(-rows @ b_dec)

    def prepare(self) -> None:
        self.trainer.n_forward_passes_since_fired[self.dead] = 1e9

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def encode(self, x: Tensor) -> Tensor:
        code: Tensor = self.sae.encode(x)
        return code

    def reconstruct(self, x: Tensor) -> Tensor:
        out: Tensor = self.sae(x)
        return out


class DictionaryLearning(Contender):
    """dictionary_learning: `TopKTrainer.update`, AuxK with k = d / 2."""

    note = "clips the gradient"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        stub("nnsight")  # reads activations of language models
        from dictionary_learning.trainers.top_k import TopKTrainer

        shape = self.shape
        self.trainer = TopKTrainer(
            steps=1_000_000,
            activation_dim=shape.d_in,
            dict_size=shape.n_latents,
            k=shape.k,
            layer=0,
            lm_name="none",
            auxk_alpha=AUXK_ALPHA if task.dead else 0,
            device=task.device,
        )
        self.sae = self.trainer.ae
        self.dead = task.dead_latents()
        self.number = 0

    def load(self, rows: Tensor, b_dec: Tensor) -> None:
        self.sae.encoder.weight.copy_(rows)
        self.sae.decoder.weight.copy_(rows.T)
        self.sae.b_dec.copy_(b_dec)

    def prepare(self) -> None:
        self.trainer.num_tokens_since_fired[self.dead] = LONG_DEAD

    def step(self, x: Tensor) -> None:
        self.trainer.update(self.number, x)
        self.number += 1

    def encode(self, x: Tensor) -> Tensor:
        code: Tensor = self.sae.encode(x)
        return code

    def reconstruct(self, x: Tensor) -> Tensor:
        out: Tensor = self.sae(x)
        return out


class Overcomplete(Contender):
    """overcomplete: `train_sae` of its TopKSAE on one batch, without monitoring."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        # Its vision models and plots; the plots do not import with a recent matplotlib.
        stub("torchvision", "timm", "cv2", "skimage", replace=["overcomplete.visualization"])
        from overcomplete.sae import TopKSAE, train_sae
        from overcomplete.sae.losses import mse_l1, top_k_auxiliary_loss

        shape = self.shape
        self.sae = TopKSAE(shape.d_in, shape.n_latents, top_k=shape.k, device=task.device)
        self.train_sae = train_sae
        if task.dead:
            self.criterion = top_k_auxiliary_loss
            self.note = "clips the gradient; AuxK of its kind: n / 2 of all latents not chosen"
        else:
            self.criterion = partial(mse_l1, penalty_fn=None)
            self.note = "clips the gradient"

    @cached_property
    def optimiser(self) -> torch.optim.Adam:
        lr = 2e-4 / math.sqrt(self.shape.n_latents / 2**14)
        return torch.optim.Adam(self.sae.parameters(), lr=lr)

    def load(self, rows: Tensor, b_dec: Tensor) -> None:
        self.sae.eval()  # its unfitted batch norm then changes almost nothing
        linear = self.sae.encoder.final_block[0]
        linear.weight.copy_(rows)
        linear.bias.copy_(-rows @ b_dec)

    def step(self, x: Tensor) -> None:
        self.train_sae(
            self.sae,
            [x],
            self.criterion,
            self.optimiser,
            nb_epochs=1,
            monitoring=0,
            device=self.task.device,
        )

    def encode(self, x: Tensor) -> Tensor:
        code: Tensor = self.sae.encode(x)[1]
        return code

    def reconstruct(self, x: Tensor) -> Tensor:
        out: Tensor = self.sae(x)[2]
        return out


class Saev(Contender):
    """saev: its ReLU SAE in the order of `saev.training.train`, fused Adam."""

    encode_note = "ReLU alone, chooses nothing"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from saev import config, nn

        shape = self.shape
        settings = config.SparseAutoencoder(
            d_vit=shape.d_in, exp_factor=shape.n_latents // shape.d_in
        )
        self.sae = nn.SparseAutoencoder(settings).to(task.device)
        self.note = "ReLU with L1, no top k" + ("; has no AuxK" if task.dead else "")
        self.begun = False

    @cached_property
    def optimiser(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.sae.parameters(), lr=4e-4, fused=True)

    def load(self, rows: Tensor, b_dec: Tensor) -> None:
        self.sae.W_enc.copy_(rows.T)
        self.sae.W_dec.copy_(rows)
        self.sae.b_dec.copy_(b_dec)

    def step(self, x: Tensor) -> None:
        if not self.begun:
            self.sae.b_dec.data = x.mean(dim=0)
            self.begun = True
        self.sae.normalize_w_dec()
        loss = self.sae(x)[2].loss
        loss.backward()
        self.sae.remove_parallel_grads()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def encode(self, x: Tensor) -> Tensor:
        # It has no function for the encoder alone; these lines are from its `forward`.
        return torch.relu((x - self.sae.b_dec) @ self.sae.W_enc + self.sae.b_enc)

    def reconstruct(self, x: Tensor) -> Tensor:
        out: Tensor = self.sae(x)[0]
        return out


class Prisma(Contender):
    """ViT-Prisma, whose releases on PyPI (up to 0.1.4) predate its SAEs."""

    def __init__(self, task: Task) -> None:
        raise ContenderError("its releases on PyPI, up to 0.1.4, have no SAE")


CONTENDERS: dict[str, Any] = {
    "sparsify": partial(Sparsify, fused=True),
    "sparsify-as-shipped": partial(Sparsify, fused=False),
    "sae-lens": SAELens,
    "dictionary-learning": DictionaryLearning,
    "overcomplete": Overcomplete,
    "saev": Saev,
    "vit-prisma": Prisma,
}

DISTRIBUTIONS = {
    "sparsify": "eai-sparsify",
    "sparsify-as-shipped": "eai-sparsify",
}
"""Names of packages on PyPI that differ."""


def distributions(names: Sequence[str]) -> list[str]:
    """Return the PyPI packages of these peers."""
    return list(dict.fromkeys(DISTRIBUTIONS.get(name, name) for name in names))
