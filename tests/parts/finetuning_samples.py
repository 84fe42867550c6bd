"""Small real CLIPs and pictures with words on them, to fine-tune in a second."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import sparsight as sp
import tiny_models
from sparsight.calibration.symbols import SYMBOLS
from sparsight.calibration.world import CalibrationWorld, WorldConfig, render, write_on
from sparsight.images import ImageInfo, ImageSource


def tiny_clip(folder: Path, seed: int = 0) -> sp.VisionModel:
    """Three blocks of width 32, random weights, a vocabulary of a dozen words."""
    return sp.load_model(str(tiny_models.build("clip", folder, seed)), device="cpu")


class NoisePictures(ImageSource):
    """Noise with captions of the tiny CLIP's words."""

    def __init__(self, n: int, captions: list[tuple[str, ...]], label: str | None = None) -> None:
        self.n, self.captions, self.label = n, captions, label
        self.spec = f"noise:{n}"

    def __len__(self) -> int:
        return self.n

    def info(self, index: int) -> ImageInfo:
        texts = self.captions[index % len(self.captions)]
        return ImageInfo(id=str(index), uri=f"noise/{index}", captions=texts, label=self.label)

    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        rng = np.random.default_rng(index)
        return Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))

    def fingerprint(self) -> str:
        return f"{self.n} {self.captions}"


@dataclass
class WrittenScenes(ImageSource):
    """Single-object scenes, with another symbol's name on them if `written`."""

    n: int
    seed: int
    written: bool

    def __post_init__(self) -> None:
        self.spec = f"written:{self.n}:{self.seed}:{self.written}"
        self.world = CalibrationWorld(self.n, self.seed, WorldConfig.single())

    def __len__(self) -> int:
        return self.n

    def info(self, index: int) -> ImageInfo:
        scene = self.world.scene(index)
        return ImageInfo(id=str(index), uri=f"{self.spec}/{index}", label=scene.label)

    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        scene = self.world.scene(index)
        if self.written:
            rng = np.random.default_rng([self.seed, index, 1])
            others = [name for name in SYMBOLS if name != scene.label]
            scene = write_on(scene, others[int(rng.random() * len(others))], rng)
        return Image.fromarray(render(scene).image)

    def fingerprint(self) -> str:
        return self.spec


@dataclasses.dataclass
class Pairs:
    attacked: ImageSource
    clean: ImageSource
