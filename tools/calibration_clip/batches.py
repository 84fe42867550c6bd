"""Training batches for the calibration CLIP: images, captions, and ground truth per patch."""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sparsight.calibration.captions import caption_of
from sparsight.calibration.symbols import COLOURS, PATTERNS, SYMBOLS
from sparsight.calibration.world import (
    MASK_COVERAGE,
    PATCH_GRID,
    RenderedScene,
    WorldConfig,
    draw_scene,
    letter_coverage,
    render,
)

N_PATCHES = PATCH_GRID**2
SCENES_ON_ONE_GROUND = 32
"""Number of scenes of a batch that share background and pattern, so that these do not tell captions
apart."""

# Any third number keeps the scenes of training apart from those of every CalibrationWorld.
_TRAINING_STREAM = 20_240_601


@dataclass
class Batch:
    """Pictures with their truth; class `len(SYMBOLS)` and the like stand for "none"."""

    pixels: UInt8[Tensor, "batch 64 64 3"]
    captions: list[str]
    patch_symbol: Int[Tensor, "batch 64"]
    patch_colour: Int[Tensor, "batch 64"]
    patch_word: Int[Tensor, "batch 64"]
    patch_letters: Float[Tensor, "batch 64 26"]
    symbols: Float[Tensor, "batch symbols"]
    colours: Float[Tensor, "batch colours"]
    background: Int[Tensor, " batch"]
    pattern: Int[Tensor, " batch"]
    word: Int[Tensor, " batch"]


def difficulty(progress: float) -> WorldConfig:
    """The curriculum: one large object near the middle first, then smaller, anywhere, in pairs.

    Args:
        progress: share of the training that is done, 0 to 1; from 0.3 on the world is itself.
    """
    share = min(progress / 0.3, 1.0)
    plain = WorldConfig()
    return WorldConfig(
        two_objects=plain.two_objects * share,
        writing=plain.writing,
        min_size=round(30 + (plain.min_size - 30) * share),
        max_size=round(44 + (plain.max_size - 44) * share),
        spread=0.3 + 0.7 * share,
    )


def draw_batch(seed: int, step: int, size: int, config: WorldConfig) -> Batch:
    """Batch number `step` of a seed: always the same one."""
    rng = np.random.default_rng([seed, step, _TRAINING_STREAM])
    scenes = []
    for first in range(0, size, SCENES_ON_ONE_GROUND):
        ground = rng.random(2)
        background = COLOURS[int(ground[0] * len(COLOURS))]
        pattern = PATTERNS[int(ground[1] * len(PATTERNS))]
        for _ in range(first, min(first + SCENES_ON_ONE_GROUND, size)):
            scenes.append(render(draw_scene(rng, config, background, pattern)))
    captions = [caption_of(each.scene, u) for each, u in zip(scenes, rng.random(size), strict=True)]
    return _with_truth(scenes, captions)


def _with_truth(scenes: list[RenderedScene], captions: list[str]) -> Batch:
    size = len(scenes)
    patch_symbol = np.full((size, N_PATCHES), len(SYMBOLS))
    patch_colour = np.full((size, N_PATCHES), len(COLOURS))
    patch_word = np.full((size, N_PATCHES), len(SYMBOLS))
    patch_letters = np.zeros((size, N_PATCHES, 26), np.float32)
    symbols = np.zeros((size, len(SYMBOLS)), np.float32)
    colours = np.zeros((size, len(COLOURS)), np.float32)
    word = np.full(size, len(SYMBOLS))
    for row, rendered in enumerate(scenes):
        coverage = rendered.object_coverage.reshape(-1, N_PATCHES)
        most = coverage.argmax(axis=0)
        for number, thing in enumerate(rendered.scene.objects):
            shown = (most == number) & (coverage[number] >= MASK_COVERAGE)
            patch_symbol[row, shown] = SYMBOLS.index(thing.symbol)
            patch_colour[row, shown] = COLOURS.index(thing.colour)
            symbols[row, SYMBOLS.index(thing.symbol)] = 1
            colours[row, COLOURS.index(thing.colour)] = 1
        writing = rendered.scene.writing
        if writing is not None:
            shown = rendered.writing_coverage.reshape(-1) >= 0.3
            word[row] = SYMBOLS.index(writing.text)
            patch_word[row, shown] = word[row]
            for letter, share in letter_coverage(writing).items():
                patch_letters[row, :, string.ascii_lowercase.index(letter)] = (
                    share.reshape(-1) >= 0.2
                )
    return Batch(
        pixels=torch.from_numpy(np.stack([each.image for each in scenes])),
        captions=captions,
        patch_symbol=torch.from_numpy(patch_symbol),
        patch_colour=torch.from_numpy(patch_colour),
        patch_word=torch.from_numpy(patch_word),
        patch_letters=torch.from_numpy(patch_letters),
        symbols=torch.from_numpy(symbols),
        colours=torch.from_numpy(colours),
        background=torch.tensor([COLOURS.index(each.scene.background) for each in scenes]),
        pattern=torch.tensor([PATTERNS.index(each.scene.pattern) for each in scenes]),
        word=torch.from_numpy(word),
    )
