"""The architectures of the peers, each trained by its own trainer or with its trainer's loop.

All get the same vectors: centred, and scaled to the mean squared norm that the peer's own
normalisation gives (`UNIT` for dictionary_learning, d for the others), with one learning rate and
one schedule. `train` gives functions that encode and reconstruct.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from stubs import stub
from torch import Tensor

WARMUP, DECAY = 0.05, 0.2
CODE = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From vectors to their dense code and reconstruction."""


@dataclass(frozen=True)
class Plan:
    """What a peer trains on."""

    x: Tensor
    """All vectors with the loop of training, E|x|² = d."""
    n_latents: int
    k: int
    batch_size: int
    lr: float

    @property
    def d_in(self) -> int:
        return self.x.shape[1]

    @property
    def steps(self) -> int:
        return len(self.x) // self.batch_size

    @property
    def warm(self) -> int:
        return round(WARMUP * self.steps)

    @property
    def decay(self) -> int:
        return round(DECAY * self.steps)

    def batches(self, scale: float = 1.0) -> Iterator[Tensor]:
        for batch in self.x[: self.steps * self.batch_size].split(self.batch_size):
            yield scale * batch

    def factor(self, step: int) -> float:
        up = min(1.0, (step + 1) / max(self.warm, 1))
        return min(up, (self.steps - step) / max(self.decay, 1))


def sae_lens(name: str, plan: Plan, **settings: Any) -> CODE:
    """SAELens: `SAETrainer.step`."""
    stub("wandb", "babe", "nltk", "dotenv", "plotly", "plotly_express", "tenacity")
    import sae_lens as package
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae_class, config_class = _sae_lens_classes(package, name)
    sae = sae_class(config_class(d_in=plan.d_in, d_sae=plan.n_latents, **settings))
    config = SAETrainerConfig(
        total_training_samples=plan.steps * plan.batch_size,
        train_batch_size_samples=plan.batch_size,
        lr=plan.lr,
        lr_end=0.0,
        lr_warm_up_steps=plan.warm,
        lr_decay_steps=plan.decay,
        # In steps; its default is longer than the run.
        dead_feature_window=plan.steps // 10,
    )
    trainer = SAETrainer(config, sae, iter(()))
    for batch in plan.batches():
        trainer.step(batch)
        trainer.n_training_steps += 1
    sae.eval()
    if "BatchTopK" not in name:
        return lambda x: (lambda f: (f, sae.decode(f)))(sae.encode(x))
    # In use it becomes a JumpReLU with the threshold that it followed.
    threshold = sae.topk_threshold.item()

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = sae.encode_with_hidden_pre(x)[1]
        f = hidden.relu() * (hidden > threshold)
        return f, sae.decode(f)

    return code


def _sae_lens_classes(package: Any, name: str) -> tuple[Any, Any]:
    return getattr(package, f"{name}TrainingSAE"), getattr(package, f"{name}TrainingSAEConfig")


def dictionary_learning(name: str, plan: Plan, **settings: Any) -> CODE:
    """dictionary_learning: `update` of its trainer; vectors of mean squared norm 1."""
    stub("nnsight")
    import importlib

    module, trainer_class = {
        "TopK": ("top_k", "TopKTrainer"),
        "BatchTopK": ("batch_top_k", "BatchTopKTrainer"),
        "MatryoshkaBatchTopK": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
        "JumpReLU": ("jumprelu", "JumpReluTrainer"),
        "Gated": ("gdm", "GatedSAETrainer"),
        "Standard": ("standard", "StandardTrainer"),
        "StandardApril": ("standard", "StandardTrainerAprilUpdate"),
    }[name]
    trainers = importlib.import_module(f"dictionary_learning.trainers.{module}")
    if "TopK" in name:
        settings = {"k": plan.k, "threshold_start_step": plan.steps // 4, **settings}
    else:
        settings = {"sparsity_warmup_steps": plan.warm, **settings}
    trainer = getattr(trainers, trainer_class)(
        steps=plan.steps,
        activation_dim=plan.d_in,
        dict_size=plan.n_latents,
        layer=0,
        lm_name="none",
        lr=plan.lr,
        warmup_steps=plan.warm,
        decay_start=plan.steps - plan.decay,
        device="cpu",
        seed=0,
        **settings,
    )
    if hasattr(trainer, "dead_feature_threshold"):
        trainer.dead_feature_threshold = len(plan.x) // 10
    scale = plan.d_in**-0.5
    for step, batch in enumerate(plan.batches(scale)):
        trainer.update(step, batch)
    sae = trainer.ae.eval()

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        f = sae.encode(x * scale)
        return f, sae.decode(f) / scale

    return code


def overcomplete(name: str, plan: Plan, *, penalty: float = 0.1, **settings: Any) -> CODE:
    """overcomplete: `train_sae` on one batch after another, without monitoring."""
    stub("torchvision", "timm", "cv2", "skimage", replace=["overcomplete.visualization"])
    from overcomplete import sae as package
    from overcomplete.sae.losses import mse_l1, top_k_auxiliary_loss

    if "RA" in name:
        settings["points"] = plan.x[:1024]
    if name == "BatchTopKSAE":  # its k is for the whole batch
        settings["top_k"] = plan.k * plan.batch_size
    elif name in ("TopKSAE", "RATopKSAE"):
        settings["top_k"] = plan.k
    elif name == "MpSAE":
        settings["k"] = plan.k
    sae = getattr(package, name)(plan.d_in, nb_concepts=plan.n_latents, device="cpu", **settings)
    if "TopK" in name:
        criterion = partial(top_k_auxiliary_loss, penalty=penalty)
    elif name == "MpSAE":
        criterion = partial(mse_l1, penalty_fn=None)
    else:
        criterion = partial(mse_l1, penalty=penalty)
    optimiser = torch.optim.Adam(sae.parameters(), lr=plan.lr)
    for step, batch in enumerate(plan.batches()):
        for group in optimiser.param_groups:
            group["lr"] = plan.lr * plan.factor(step)
        package.train_sae(
            sae, [batch], criterion, optimiser, nb_epochs=1, monitoring=0, device="cpu"
        )
    sae.eval()

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        _, f, x_hat = sae(x)
        return f, x_hat

    return code


def sparsify(name: str, plan: Plan, **settings: Any) -> CODE:
    """sparsify: the order of `Trainer.fit`."""
    stub("accelerate")
    sys.modules["triton"] = None  # type: ignore[assignment]
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=plan.n_latents, k=plan.k, activation=name, **settings)
    sae = SparseCoder(plan.d_in, config, "cpu", torch.float32)
    optimiser = torch.optim.Adam(sae.parameters(), lr=plan.lr)
    since = torch.zeros(plan.n_latents, dtype=torch.long)
    for step, batch in enumerate(plan.batches()):
        if step == 0:
            sae.b_dec.data = batch.mean(0)
        for group in optimiser.param_groups:
            group["lr"] = plan.lr * plan.factor(step)
        sae.set_decoder_norm_to_unit_norm()
        dead = since > len(plan.x) // 10
        out = sae(batch, dead_mask=dead if bool(dead.any()) else None)
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        since += len(batch)
        since[out.latent_indices.flatten()] = 0

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        found = sae.encode(x)
        f = torch.zeros(len(x), plan.n_latents)
        f.scatter_(1, found.top_indices, found.top_acts.float())
        return f, sae(x).sae_out

    return code


def saev(name: str, plan: Plan, **settings: Any) -> CODE:
    """saev: its ReLU SAE with the loop of `saev.training.train`."""
    from saev import config, nn

    exp = plan.n_latents // plan.d_in
    sae = nn.SparseAutoencoder(
        config.SparseAutoencoder(d_vit=plan.d_in, exp_factor=exp, **settings)
    )
    optimiser = torch.optim.Adam(sae.parameters(), lr=plan.lr)
    for step, batch in enumerate(plan.batches()):
        if step == 0:
            sae.b_dec.data = batch.mean(dim=0)
        for group in optimiser.param_groups:
            group["lr"] = plan.lr * plan.factor(step)
        sae.normalize_w_dec()
        sae(batch)[2].loss.backward()
        sae.remove_parallel_grads()
        optimiser.step()
        optimiser.zero_grad()
    sae.normalize_w_dec()

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        x_hat, f, _ = sae(x)
        return f, x_hat

    return code


PACKAGES = {
    each.__name__: each for each in (sae_lens, dictionary_learning, overcomplete, sparsify, saev)
}


@torch.no_grad()
def measure(code: CODE, x: Tensor) -> dict[str, float]:
    """Measure FVU and L0 on other vectors, and the share of latents that are never active."""
    error = entries = 0.0
    active: Tensor | None = None
    for batch in x.split(2048):
        f, x_hat = code(batch)
        error += (x_hat - batch).double().square().sum().item()
        entries += (f != 0).sum().item()
        fired = (f != 0).any(dim=0)
        active = fired if active is None else active | fired
    assert active is not None
    spread = (x.double() - x.double().mean(dim=0)).square().sum().item()
    dead = 1 - active.double().mean().item()
    return {"fvu": error / spread, "l0": entries / len(x), "dead": dead}


def main() -> None:
    """Run one peer: the only argument is a JSON request, the last line on stdout is the answer."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    data = torch.load(Path(request["data"]))
    shape = {name: request[name] for name in ("n_latents", "k", "batch_size")}
    found: list[dict[str, float]] = []
    answer: dict[str, Any] = {"error": "diverged"}
    for lr in request["lrs"]:
        torch.manual_seed(0)
        try:
            code = PACKAGES[request["package"]](
                request["name"], Plan(data["train"], **shape, lr=lr), **request["settings"]
            )
            found.append(measure(code, data["test"]) | {"lr": lr})
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    found = [each for each in found if math.isfinite(each["fvu"]) and each["l0"] > 0]
    if found:
        answer = {"points": found}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
