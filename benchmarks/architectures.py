"""Each architecture compared with the peers that have it: the table `architectures` in QUALITY.md.

All train on the same vectors of the calibration CLIP, in the same order, with the same batches and
schedule. A learning rate means something else in every parametrisation, so each gets the best of
several. FVU is measured with the same code on vectors of other scenes. If a peer ends at another L0
than requested, ours is trained for that L0. If L0 follows from a penalty, ours is interpolated
between penalties (log FVU over log L0).
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
from sparsight.kernels import choose
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
from sparsight.sae.sparsity import AnySparsity
from sparsight.training import TrainConfig
from sparsight.training.schedule import learning_rate_factor
from sparsight.training.site import SiteTraining

FROM_DATA = "TopK, rows from data"
WEIGHTED = "ReLU, weighted"
PRICES = {
    "ReLU": (0.7, 1.5, 3.0, 6.0),
    WEIGHTED: (0.7, 1.5, 3.0, 6.0),
    "Gated": (1.2, 2.5, 5.0, 10.0),
}
"""The penalties that ours is trained with if L0 follows from a penalty."""

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Prefixes of all Matryoshka SAEs."""


@dataclass(frozen=True)
class Options:
    """Train the peers and ours; write the table."""

    peers_folder: Path
    """Where the peers are installed."""

    only: tuple[str, ...] = ()
    """Packages, or packages and their architectures ("sae_lens Standard"); all by default."""

    site: str = "blocks.-1.resid_post"
    """Where to read the calibration CLIP."""

    n_vectors: int = 150_000
    """Vectors to train on."""

    n_latents: int = 768
    """Latents of every SAE."""

    k: int = 32
    """Active latents per vector, where this can be chosen."""

    batch_size: int = 256
    """Vectors per step."""

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
    """Return all peers; their penalties are chosen so that L0 is near k."""
    k, n = options.k, options.n_latents
    widths = [round(share * n) for share in SHARES]
    groups = [a - b for a, b in zip(SHARES, (0.0, *SHARES), strict=False)]
    return [
        Peer("sparsify", "topk", "TopK"),
        Peer("sae_lens", "TopK", "TopK", {"k": k}),
        Peer("dictionary_learning", "TopK", "TopK"),
        Peer("overcomplete", "TopKSAE", "TopK"),
        Peer("overcomplete", "TopKSAE", FROM_DATA),
        Peer("sparsify", "groupmax", "GroupMax"),
        Peer("sae_lens", "BatchTopK", "BatchTopK", {"k": k}),
        Peer("dictionary_learning", "BatchTopK", "BatchTopK"),
        Peer("overcomplete", "BatchTopKSAE", "BatchTopK"),
        Peer("sae_lens", "JumpReLU", "JumpReLU", {"l0_coefficient": 1.5}),
        Peer("dictionary_learning", "JumpReLU", "JumpReLU", {"target_l0": float(k)}),
        Peer("overcomplete", "JumpSAE", "JumpReLU", {"penalty": 6e-5}),
        Peer("sae_lens", "Gated", "Gated", {"l1_coefficient": 4.0}),
        Peer("dictionary_learning", "Gated", "Gated", {"l1_penalty": 2.0 / 192**0.5}),
        Peer("sae_lens", "Standard", WEIGHTED, {"l1_coefficient": 2.0}),
        Peer("dictionary_learning", "Standard", "ReLU", {"l1_penalty": 1.5 / 192**0.5}),
        Peer("dictionary_learning", "StandardApril", WEIGHTED, {"l1_penalty": 1.5 / 192**0.5}),
        Peer("saev", "ReLU", "ReLU", {"sparsity_coeff": 0.005}),
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
    chosen = [
        each
        for each in peers(options)
        if not options.only or {each.package, f"{each.package} {each.name}"} & {*options.only}
    ]
    with tempfile.TemporaryDirectory() as folder:
        train, test = vectors(options, Path(folder))
        data = Path(folder) / "vectors.pt"
        torch.save({"train": train, "test": test}, data)
        ours = Ours(options, train, test)
        rows = []
        for peer in chosen:
            answer = ask(peer, options, data)
            row = {"": peer.ours, "peer": f"{peer.package} {peer.name}"}
            if "points" in answer:
                its, mine = hardest(peer, answer["points"], ours)
                row |= {
                    "its L0": f"{its['l0']:.1f}",
                    "its dead": f"{100 * its['dead']:.0f} %",
                    "its FVU": f"{its['fvu']:.4f}",
                    "L0": f"{mine['l0']:.1f}",
                    "dead": f"{100 * mine['dead']:.0f} %",
                    "FVU": f"{mine['fvu']:.4f}",
                    "of the peer's": f"{mine['fvu'] / its['fvu']:.3f}",
                    "note": "",
                }
            else:
                names = ("its L0", "its dead", "its FVU", "L0", "dead", "FVU", "of the peer's")
                row |= dict.fromkeys(names, "–") | {"note": answer["error"]}
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
            write(rows, chosen, options)


def write(rows: list[dict[str, str]], chosen: list[Peer], options: Options) -> None:
    """Write the table so far: all of it takes half an hour and may be interrupted."""
    title = (
        f"Architectures beside their peers: calibration CLIP, {options.site}, "
        f"{options.n_latents:,} latents, {options.n_vectors:,} vectors, best of learning rates "
        f"{', '.join(f'{lr:g}' for lr in options.lrs)}"
    )
    if len(rows) < len(chosen):
        title += f"; the first {len(rows)} of {len(chosen)} comparisons"
    there = {
        each.metadata["Name"].lower().replace("_", "-"): each.version
        for each in importlib.metadata.distributions(path=[str(options.peers_folder)])
    }
    versions = {}
    for package in dict.fromkeys(each.package.replace("_", "-") for each in chosen):
        name = DISTRIBUTIONS.get(package, package)
        versions[name] = there[name.lower().replace("_", "-")]
    keep(title, rows, options.out, versions, name="architectures")


def vectors(options: Options, folder: Path) -> tuple[Tensor, Tensor]:
    """Return vectors to train on and to measure on: centred, with mean squared norm d."""
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


def hardest(
    peer: Peer, points: list[dict[str, float]], ours: Ours
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the peer's point to compare with, and ours at its L0.

    If L0 is chosen, it is the point with the lowest FVU; if L0 follows from penalty and learning
    rate, it is the point where ours compares worst.
    """
    if peer.ours not in PRICES:
        best = min(points, key=lambda each: each["fvu"])
        return best, ours.at(peer.ours, best["l0"])
    pairs = [(each, ours.at(peer.ours, each["l0"])) for each in points]
    return max(pairs, key=lambda pair: pair[1]["fvu"] / pair[0]["fvu"])


def ask(peer: Peer, options: Options, data: Path) -> dict[str, Any]:
    """Run a peer with each learning rate, in a process of its own."""
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
    """Our architectures, each trained for the L0 of a peer."""

    options: Options
    train: Tensor
    test: Tensor

    def at(self, name: str, l0: float) -> dict[str, float]:
        """Return figures at or near this L0, with the best learning rate."""
        lrs = self.options.lrs
        if name in PRICES:
            found = [self._interpolated(name, l0, lr) for lr in lrs]
        else:
            value = l0 if name == "JumpReLU" else float(round(l0))
            found = [self._point(name, value, lr) for lr in lrs]
        return min(found, key=lambda each: each["fvu"])

    def _interpolated(self, name: str, l0: float, lr: float) -> dict[str, float]:
        found = (self._point(name, price, lr) for price in PRICES[name])
        points = sorted(found, key=lambda point: point["l0"])
        above = [i for i, point in enumerate(points) if point["l0"] >= l0] or [len(points) - 1]
        high = max(1, above[0])
        a, b = points[high - 1], points[high]
        at = math.log(l0 / a["l0"]) / math.log(b["l0"] / a["l0"])
        fvu = a["fvu"] * (b["fvu"] / a["fvu"]) ** at
        dead = min(max(a["dead"] + at * (b["dead"] - a["dead"]), 0.0), 1.0)
        return {"fvu": fvu, "l0": l0, "dead": dead}

    @cache  # noqa: B019
    def _point(self, name: str, value: float, lr: float) -> dict[str, float]:
        config = TrainConfig(sae=SAEConfig(self.options.n_latents, sparsity=_sparsity(name, value)))
        sae = config.sae
        if name == "Matryoshka":
            config = dataclasses.replace(config, matryoshka=Matryoshka(SHARES))
        if name == "Archetypal":
            sae = dataclasses.replace(sae, dictionary=Archetypal())
        if name == WEIGHTED:
            sae = dataclasses.replace(sae, unit_norm_decoder=False)
        if name == FROM_DATA:
            sae = dataclasses.replace(sae, decoder_init="data")
        found = self._run(dataclasses.replace(config, sae=sae), lr)
        print("ours", name, value, lr, found, file=sys.stderr, flush=True)
        return found

    def _run(self, config: TrainConfig, lr: float) -> dict[str, float]:
        x, size = self.train, self.options.batch_size
        config = dataclasses.replace(config, n_vectors=len(x), batch_size=size, lr=lr)
        statistics = SiteStatistics(len(x), x.double().mean(0), x.double().square().mean(0))
        cpu = torch.device("cpu")
        kernels = choose("auto" if config.fusable else "dense", "auto", cpu)
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
        FROM_DATA: lambda: TopK(k),
        "GroupMax": lambda: GroupMax(32),
        "BatchTopK": lambda: BatchTopK(k),
        "Matryoshka": lambda: BatchTopK(k),
        "JumpReLU": lambda: JumpReLU(target_l0=value),
        "Gated": lambda: Gated(value),
        "ReLU": lambda: ReLU(value),
        WEIGHTED: lambda: ReLU(value, weighted=True),
        "MatchingPursuit": lambda: MatchingPursuit(k),
        "Archetypal": lambda: TopK(k),
    }
    return kinds[name]()


if __name__ == "__main__":
    main(tyro.cli(Options))
