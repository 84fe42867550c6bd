"""Each architecture beside the peers that have it: the table `architectures` in QUALITY.md.

All train on the same vectors of the calibration CLIP, in the same order, with the same batches and
schedule; a learning rate means something else in every parametrisation, so everybody has the best
of several. FVU is measured with one and the same code on vectors of other scenes. Where a peer
arrives at another L0 than was asked for, ours is trained for that L0; where L0 follows from a
price, ours is interpolated between three prices (log FVU over log L0).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import tyro
from architecture_peers import measure
from peers import DISTRIBUTIONS
from tables import QUALITY, cores, keep
from torch import Tensor

import sparsight as sp
from sparsight.activations import SiteStatistics
from sparsight.sae import (
    Archetypal,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    Matryoshka,
    ReLU,
    SAEConfig,
    TopK,
)
from sparsight.sae.kernels import choose
from sparsight.sae.sparsity import AnySparsity
from sparsight.training import TrainConfig
from sparsight.training.schedule import learning_rate_factor
from sparsight.training.site import SiteTraining

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Prefixes of Matryoshka SAEs, for everybody."""


@dataclass(frozen=True)
class Options:
    """Train the peers and ours; write the table."""

    peers_folder: Path
    """Where the peers are installed."""

    only: tuple[str, ...] = ()
    """Packages; all by default."""

    site: str = "blocks.-1.resid_post"
    """Where to read the calibration CLIP."""

    n_vectors: int = 150_000
    """Vectors to train on."""

    n_latents: int = 768
    """Of everybody."""

    k: int = 32
    """Active latents a vector, where they can be chosen."""

    batch_size: int = 256
    """Vectors a step."""

    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Learning rates; the best counts."""

    out: Path = QUALITY
    """File that keeps the table."""


@dataclass(frozen=True)
class Peer:
    """One architecture of a package."""

    package: str
    name: str
    ours: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def peers(options: Options) -> list[Peer]:
    """All of them; prices are such that L0 is not far from k."""
    k, n = options.k, options.n_latents
    widths = [round(share * n) for share in SHARES]
    groups = [a - b for a, b in zip(SHARES, (0.0, *SHARES), strict=False)]
    return [
        Peer("sparsify", "topk", "TopK"),
        Peer("sae_lens", "TopK", "TopK", {"k": k}),
        Peer("dictionary_learning", "TopK", "TopK"),
        Peer("overcomplete", "TopKSAE", "TopK"),
        Peer("sparsify", "groupmax", "GroupMax"),
        Peer("sae_lens", "BatchTopK", "BatchTopK", {"k": k}),
        Peer("dictionary_learning", "BatchTopK", "BatchTopK"),
        Peer("overcomplete", "BatchTopKSAE", "BatchTopK"),
        Peer("sae_lens", "JumpReLU", "JumpReLU", {"l0_coefficient": 0.35}),
        Peer("dictionary_learning", "JumpReLU", "JumpReLU", {"target_l0": float(k)}),
        Peer("overcomplete", "JumpSAE", "JumpReLU", {"penalty": 2e-5}),
        Peer("sae_lens", "Gated", "Gated", {"l1_coefficient": 5.0}),
        Peer("dictionary_learning", "Gated", "Gated", {"l1_penalty": 5.0 / 192**0.5}),
        Peer("sae_lens", "Standard", "ReLU", {"l1_coefficient": 3.5}),
        Peer("dictionary_learning", "Standard", "ReLU", {"l1_penalty": 3.5 / 192**0.5}),
        Peer("dictionary_learning", "StandardApril", "ReLU", {"l1_penalty": 3.5 / 192**0.5}),
        Peer("saev", "ReLU", "ReLU", {"sparsity_coeff": 0.015}),
        Peer(
            "sae_lens", "MatryoshkaBatchTopK", "Matryoshka", {"k": k, "matryoshka_widths": widths}
        ),
        Peer(
            "dictionary_learning", "MatryoshkaBatchTopK", "Matryoshka", {"group_fractions": groups}
        ),
        Peer("sae_lens", "MatchingPursuit", "MatchingPursuit", {"max_iterations": k}),
        Peer("overcomplete", "MpSAE", "MatchingPursuit"),
        Peer("overcomplete", "RATopKSAE", "Archetypal"),
    ]


def main(options: Options) -> None:
    chosen = [each for each in peers(options) if not options.only or each.package in options.only]
    with tempfile.TemporaryDirectory() as folder:
        train, test = vectors(options, Path(folder))
        data = Path(folder) / "vectors.pt"
        torch.save({"train": train, "test": test}, data)
        ours = Ours(options, train, test)
        rows = []
        for peer in chosen:
            best = ask(peer, options, data)
            row = {"": peer.ours, "peer": f"{peer.package} {peer.name}"}
            if "fvu" in best:
                mine = ours.at(peer.ours, best["l0"])
                row |= {
                    "its L0": f"{best['l0']:.1f}",
                    "its dead": f"{100 * best['dead']:.0f} %",
                    "its FVU": round(best["fvu"], 4),
                    "L0": f"{mine['l0']:.1f}",
                    "dead": f"{100 * mine['dead']:.0f} %",
                    "FVU": round(mine["fvu"], 4),
                    "of the peer's": f"{mine['fvu'] / best['fvu']:.3f}",
                    "note": "",
                }
            else:
                names = ("its L0", "its dead", "its FVU", "L0", "dead", "FVU", "of the peer's")
                row |= dict.fromkeys(names, "–") | {"note": best["error"]}
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    title = (
        f"Architectures beside their peers: calibration CLIP, {options.site}, "
        f"{options.n_latents:,} latents, {options.n_vectors:,} vectors, best of learning rates "
        f"{', '.join(f'{lr:g}' for lr in options.lrs)}"
    )
    sys.path.insert(0, str(options.peers_folder))
    versions = {}
    for package in dict.fromkeys(each.package.replace("_", "-") for each in chosen):
        name = DISTRIBUTIONS.get(package, package)
        versions[name] = importlib.metadata.version(name)
    keep(title, rows, options.out, versions, name="architectures")


def vectors(options: Options, folder: Path) -> tuple[Tensor, Tensor]:
    """To train on, in their order, and to measure on: centred, with a mean squared norm of d."""
    model = sp.load_model("calibration")
    found = []
    for seed, n_images in enumerate((4000, 300)):
        images = sp.open_images(f"calibration:{n_images}:{seed}")
        store = sp.extract(model, images, sites=[options.site], out=folder / f"{seed}")
        (site,) = store.sites
        x = torch.cat([batch.activations[site].flatten(0, 1) for batch in store.ordered([site])])
        found.append(x.float())
    train, test = found
    mean = train.mean(dim=0)
    scale = ((train - mean).square().sum(dim=1).mean() / train.shape[1]).sqrt()
    generator = torch.Generator().manual_seed(0)
    rounds = math.ceil(options.n_vectors / len(train))
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(rounds)])
    steps = options.n_vectors // options.batch_size
    train = train[order[: steps * options.batch_size]]
    return (train - mean) / scale, (test - mean) / scale


def ask(peer: Peer, options: Options, data: Path) -> dict[str, Any]:
    """What a peer arrives at with the best learning rate, in a process of its own."""
    request = {
        "package": peer.package,
        "name": peer.name,
        "settings": peer.settings,
        "data": str(data),
        "n_latents": options.n_latents,
        "k": options.k,
        "batch_size": options.batch_size,
        "lrs": options.lrs,
        "threads": cores(),
    }
    path = os.pathsep.join(
        [str(options.peers_folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, "architecture_peers.py", json.dumps(request)],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL,
        text=True,
    )
    lines = done.stdout.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return {"error": f"its process ended with status {done.returncode}"}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


@dataclass(frozen=True, eq=False)
class Ours:
    """Our architectures, each trained for the L0 that a peer arrived at."""

    options: Options
    train: Tensor
    test: Tensor

    def at(self, name: str, l0: float) -> dict[str, float]:
        """Figures at this L0, or near it."""
        if name in ("ReLU", "Gated"):
            return self._interpolated(name, l0)
        if name == "JumpReLU":
            return self._best(name, l0)
        return self._best(name, float(round(l0)))

    def _interpolated(self, name: str, l0: float) -> dict[str, float]:
        prices = (1.5, 3.0, 6.0) if name == "ReLU" else (2.5, 5.0, 10.0)
        points = sorted((self._best(name, price) for price in prices), key=lambda p: p["l0"])
        low, high = (points[:2] if l0 < points[1]["l0"] else points[1:])[:2]
        at = math.log(l0 / low["l0"]) / math.log(high["l0"] / low["l0"])
        fvu = low["fvu"] * (high["fvu"] / low["fvu"]) ** at
        return {"fvu": fvu, "l0": l0, "dead": low["dead"] + at * (high["dead"] - low["dead"])}

    @cache  # noqa: B019
    def _best(self, name: str, value: float) -> dict[str, float]:
        config = TrainConfig(sae=SAEConfig(self.options.n_latents, sparsity=_sparsity(name, value)))
        if name == "Matryoshka":
            config = dataclasses.replace(config, matryoshka=Matryoshka(SHARES))
        if name == "Archetypal":
            sae = dataclasses.replace(config.sae, dictionary=Archetypal())
            config = dataclasses.replace(config, sae=sae)
        found = [self._run(config, lr) | {"lr": lr} for lr in self.options.lrs]
        best = min(found, key=lambda each: each["fvu"])
        print("ours", name, value, best, file=sys.stderr, flush=True)
        return best

    def _run(self, config: TrainConfig, lr: float) -> dict[str, float]:
        x, size = self.train, self.options.batch_size
        config = dataclasses.replace(config, n_vectors=len(x), batch_size=size, lr=lr)
        statistics = SiteStatistics(len(x), x.double().mean(0), x.double().square().mean(0))
        cpu, d_in = torch.device("cpu"), x.shape[1]
        kernels = choose("dense" if config.objective(d_in) is None else "auto", "auto", cpu)
        training = SiteTraining(config, statistics, x[:4096], {}, cpu, *kernels)
        for step, batch in enumerate(x.split(size)):
            factor = learning_rate_factor(step, config.n_steps, config.warmup, config.decay)
            training.step(batch, step, factor)
        sae = training.finished().eval()

        def code(x: Tensor) -> tuple[Tensor, Tensor]:
            found = sae(x)
            return found.code.dense(), found.x_hat

        return measure(code, self.test)


def _sparsity(name: str, value: float) -> AnySparsity:
    k = max(1, round(value))
    kinds: dict[str, Callable[[], AnySparsity]] = {
        "TopK": lambda: TopK(k),
        "GroupMax": lambda: GroupMax(32),
        "BatchTopK": lambda: BatchTopK(k),
        "Matryoshka": lambda: BatchTopK(k),
        "JumpReLU": lambda: JumpReLU(target_l0=value),
        "Gated": lambda: Gated(value),
        "ReLU": lambda: ReLU(value),
        "MatchingPursuit": lambda: MatchingPursuit(k),
        "Archetypal": lambda: TopK(k),
    }
    return kinds[name]()


if __name__ == "__main__":
    main(tyro.cli(Options))
