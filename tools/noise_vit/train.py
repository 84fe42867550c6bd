"""Train a small ViT on procedural noise: `python -m tools.noise_vit.train --out DIR`.

Self-supervised by SimCLR (Chen et al. 2020): two views of one image should be close, and far from
the views of other images. Half of the patches of each view are left out, which halves the cost
(Li et al. 2023 do the same for CLIP). No photo, label or text takes part. The result is a folder
that `transformers` and `sparsight.load_model` open. The same options give the same bits on the same
machine; nothing is kept of a run that is stopped before its end.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from sparsight.errors import SparsightError, UserError
from sparsight.folders import new_folder
from sparsight.progress import progress
from tools.noise_vit.noise import noise_image

IMAGE_SIZE, PATCH_SIZE = 64, 8
TEMPERATURE = 0.2
WARM_UP = 0.05
REPORT = "training.json"


@dataclass(frozen=True)
class Settings:
    """What to train and for how long.

    Args:
        out: folder of the model; it must not exist.
        steps: number of steps.
        batch_size: images per step; each gives two views.
        width: hidden size.
        blocks: number of transformer blocks.
        lr: peak learning rate.
        seed: seed of weights, noise and views.
        pool: rendered images held at a time; each step replaces a quarter batch of them.
        kept: share of the patches that a view keeps.
    """

    out: Path
    steps: int = 1000
    batch_size: int = 64
    width: int = 128
    blocks: int = 4
    lr: float = 1e-3
    seed: int = 0
    pool: int = 2048
    kept: float = 0.5

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "width", "blocks", "lr", "pool"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0.")
        if self.width % 32:
            raise UserError(f"width is {self.width}; it must be a multiple of 32, a head's width.")
        if not 0 < self.kept <= 1:
            raise UserError(f"kept is {self.kept}; it must be above 0 and at most 1.")
        if self.pool < self.batch_size:
            raise UserError(f"pool is {self.pool}; it must hold a batch of {self.batch_size}.")


def new_vit(width: int = 128, blocks: int = 4, seed: int = 0) -> Any:
    """Return an untrained `transformers.ViTModel` for images of 64 × 64 pixels.

    Args:
        width: hidden size, a multiple of 32.
        blocks: number of transformer blocks.
        seed: seed of the weights.
    """
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTModel(config, add_pooling_layer=False)


def save_vit(model: Any, folder: Path) -> None:
    """Write model and image processor in the format of `transformers`."""
    from transformers import ViTImageProcessor

    model.save_pretrained(folder)
    ViTImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(folder)


def pools(settings: Settings) -> Iterator[UInt8[Tensor, "pool 96 96 3"]]:
    """Yield the pool of rendered images before each step; a part of it is new each time."""
    drawn = [noise_image(settings.seed, i) for i in range(settings.pool)]
    pool = torch.from_numpy(np.stack(drawn))
    number, place = settings.pool, 0
    while True:
        yield pool
        for _ in range(max(1, settings.batch_size // 4)):
            pool[place] = torch.from_numpy(noise_image(settings.seed, number))
            number, place = number + 1, (place + 1) % settings.pool


def views(
    images: UInt8[Tensor, "batch 96 96 3"], generator: torch.Generator
) -> Float[Tensor, "batch 3 64 64"]:
    """Return one random view of each image: a crop, perhaps mirrored, with altered colours."""
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    x = images.permute(0, 3, 1, 2).float() / 255
    area, aspect = uniform(0.2, 1.0), torch.exp(uniform(-0.3, 0.3))
    height, width = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    grid = functional.affine_grid(theta, [n, 3, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    x = functional.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    contrast, brightness = uniform(0.6, 1.4), uniform(-0.2, 0.2)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - mean) * contrast[:, None, None, None] + mean + brightness[:, None, None, None]
    grey = x.mean(dim=1, keepdim=True)
    saturation = torch.where(uniform(0, 1) < 0.2, torch.zeros(n), uniform(0.5, 1.5))
    x = grey + (x - grey) * saturation[:, None, None, None]
    tint = 0.1 * torch.randn(n, 3, 1, 1, generator=generator)
    return (x + tint).clamp(0, 1) * 2 - 1


class Learner(nn.Module):
    """The model with the projection that the loss sees and the result leaves out."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.model = new_vit(settings.width, settings.blocks, settings.seed)
        self.kept = settings.kept
        width = settings.width
        self.projection = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.BatchNorm1d(2 * width), nn.GELU(),
            nn.Linear(2 * width, 64),
        )  # fmt: skip

    def forward(
        self, pixels: Float[Tensor, "batch 3 64 64"], generator: torch.Generator
    ) -> Float[Tensor, "batch 64"]:
        """Return unit-norm projections of CLS and mean patch, from a random part of the patches."""
        hidden = self.model.embeddings(pixels)
        n, patches = len(hidden), hidden.shape[1] - 1
        count = max(1, round(patches * self.kept))
        order = torch.rand(n, patches, generator=generator).argsort(dim=1)[:, :count]
        chosen = order[..., None].expand(-1, -1, hidden.shape[2])
        hidden = torch.cat([hidden[:, :1], hidden[:, 1:].gather(1, chosen)], dim=1)
        for layer in self.model.layers:
            hidden = layer(hidden)
        hidden = self.model.layernorm(hidden)
        both = torch.cat([hidden[:, 0], hidden[:, 1:].mean(dim=1)], dim=1)
        return functional.normalize(self.projection(both), dim=1)


def contrastive_loss(
    one: Float[Tensor, "batch d"], other: Float[Tensor, "batch d"]
) -> Float[Tensor, ""]:
    """Return NT-Xent, SimCLR's loss: of all other views, pick the one of the same image."""
    z = torch.cat([one, other])
    scores = z @ z.T / TEMPERATURE
    scores.fill_diagonal_(-math.inf)
    n = len(one)
    partner = torch.arange(2 * n).roll(n)
    return functional.cross_entropy(scores, partner)


def train(settings: Settings, quiet: bool = False) -> dict[str, Any]:
    """Train, write the model's folder, and return the report that is written next to it.

    Raises:
        UserError: the folder exists.
        SparsightError: the loss is not finite.
    """
    with new_folder(settings.out) as staged:
        torch.manual_seed(settings.seed)
        learner = Learner(settings).train()
        losses, seconds = _optimised(learner, settings, quiet)
        tenth = max(1, len(losses) // 10)
        report = {
            "settings": {**asdict(settings), "out": settings.out.name},
            "images": settings.pool + settings.steps * max(1, settings.batch_size // 4),
            "parameters": sum(each.numel() for each in learner.model.parameters()),
            "loss": [sum(losses[i : i + tenth]) / tenth for i in range(0, tenth * 10, tenth)]
            if len(losses) >= 10
            else losses,
            "cpu_seconds": round(seconds),
        }
        save_vit(learner.model.eval(), staged)
        (staged / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


def _optimised(learner: Learner, settings: Settings, quiet: bool) -> tuple[list[float], float]:
    """Train in place; return the loss of each step and the CPU time in seconds."""
    decayed = [each for each in learner.parameters() if each.ndim > 1]
    others = [each for each in learner.parameters() if each.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=settings.lr)
    warm = max(1, round(WARM_UP * settings.steps))

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, settings.steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    generator = torch.Generator().manual_seed(settings.seed)
    losses: list[float] = []
    begun = time.process_time()
    with progress("training", settings.steps, "steps", quiet=quiet) as line:
        for step, pool in zip(range(settings.steps), pools(settings), strict=False):
            drawn = torch.randperm(len(pool), generator=generator)[: settings.batch_size]
            pixels = torch.cat([views(pool[drawn], generator) for _ in range(2)])
            loss = contrastive_loss(*learner(pixels, generator).chunk(2))
            if not bool(torch.isfinite(loss)):
                raise SparsightError(f"The loss is {float(loss)} at step {step}; lower --lr.")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
            line.advance(1)
    return losses, time.process_time() - begun


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, train, print the losses."""
    parser = argparse.ArgumentParser(prog="python -m tools.noise_vit.train")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    for name, kind in (
        ("steps", int), ("batch_size", int), ("width", int), ("blocks", int), ("lr", float),
        ("seed", int), ("pool", int), ("kept", float),
    ):  # fmt: skip
        default = getattr(Settings, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default)
    try:
        report = train(Settings(**vars(parser.parse_args(arguments))))
    except SparsightError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    losses = ", ".join(f"{loss:.2f}" for loss in report["loss"])
    print(f"loss by tenths of the run: {losses}; {report['cpu_seconds']} CPU seconds")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
