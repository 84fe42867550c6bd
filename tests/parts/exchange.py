"""Checkpoints and outputs exchanged with another package, which runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsight.formats import find, read
from sparsight.sae import SAEConfig, SparseAutoencoder

D, N, K = 16, 64, 4
OUTPUT = "output.safetensors"


def peers() -> Path:
    """Where the other packages are; skips the test where they are not."""
    folder = os.environ.get("SPARSIGHT_PEERS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SPARSIGHT_PEERS names no folder with the other packages; `make test` does")
    return Path(folder).absolute()


@cache
def vectors() -> Tensor:
    """Usual ones, and ones with a few dimensions a hundred times the size of the others."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, D, generator=generator)
    x[64:, [3, 11]] *= 100
    return x + torch.randn(D, generator=generator)


def trained_like(config: SAEConfig, seed: int, d_out: int | None = None) -> SparseAutoencoder:
    """An SAE whose every part does something: normaliser, biases, rows of various norms."""
    sae = SparseAutoencoder(D, config, d_out=d_out, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = vectors()
    with torch.no_grad():
        for name, each in sae.state_dict().items():
            noise = torch.randn(each.shape, generator=generator)
            if "normaliser" in name and config.normaliser not in ("scale", "standardise"):
                continue
            if name.endswith("normaliser.mean"):
                each.copy_(x.mean() + noise)
            elif name.endswith("normaliser.scale"):
                each.copy_(x.std(dim=0)[: len(each)] if len(each) > 1 else x.std())
            elif name == "threshold":
                each.copy_(0.2 + 0.3 * noise.abs())
            elif name != "W_enc" and name != "W_dec":
                each.add_(0.1 * noise)
            elif config.normaliser != "none" or not config.unit_norm_decoder:
                each.mul_(1 + 0.3 * noise[:, :1].abs())
    return sae.requires_grad_(False).eval()


@dataclass(frozen=True)
class Exchange:
    """What a package wrote, and read of ours."""

    format: str
    folder: Path
    saes: Mapping[str, SparseAutoencoder]

    def check(self, cases: set[str]) -> None:
        """Both sides give the same for every checkpoint, whichever side wrote it."""
        theirs = sorted((self.folder / "theirs").iterdir())
        assert {each.name for each in theirs} == cases
        for place in theirs:
            found = load_file(place / OUTPUT)
            (place / OUTPUT).unlink()
            checkpoint = read(place)
            assert checkpoint.format == self.format and not checkpoint.unknown
            agree(checkpoint.build(), found, place.name)
        for name, sae in self.saes.items():
            place = self.folder / "ours" / name
            found = load_file(place / OUTPUT)
            (place / OUTPUT).unlink()
            agree(sae, found, name)
            again = read(place)
            assert again.format == self.format and not again.unknown
            agree(again.build(), found, f"{name}, read again")


def agree(sae: SparseAutoencoder, found: Mapping[str, Tensor], name: str) -> None:
    out = sae(vectors())
    for mine, other in ((out.code.dense(), found["code"]), (out.x_hat, found["x_hat"])):
        assert torch.isfinite(other).all()
        apart = (mine - other).norm(dim=1) / other.norm(dim=1).clamp(min=1e-6)
        assert apart.max() < 1e-5, (name, apart.max())


def exchange(
    package: str, format: str, saes: Mapping[str, SparseAutoencoder], folder: Path
) -> Exchange:
    """Let a package write its checkpoints and read ours."""
    installed = peers()
    for name, sae in saes.items():
        find(format).save(sae, folder / "ours" / name)
    (folder / "ours").mkdir(exist_ok=True)
    save_file({"x": vectors()}, folder / "x.safetensors")
    ran = subprocess.run(
        [sys.executable, Path(__file__).with_name("peer.py"), package, folder],
        env={**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return Exchange(format, folder, saes)
