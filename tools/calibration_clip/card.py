"""The model card of the calibration CLIP: what it is, how it was made, how well it sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsight.calibration.captions import TEMPLATES, WORD_TEMPLATES
from sparsight.calibration.symbols import COLOURS, PATTERNS, SYMBOLS
from sparsight.files import write_text
from sparsight.intervals import wilson_interval


@dataclass(frozen=True)
class Making:
    """How a calibration CLIP came about.

    Args:
        steps: training steps, over all legs.
        batch_size: scenes a step.
        minutes: wall-clock time of the training, over all legs.
        last_leg: steps of the last leg, where there were several.
        options: of the command that trained the last leg.
        word_share: share of a written name in the target of the last leg.
        seed: of weights and scenes.
        device: what it ran on, in words.
    """

    steps: int
    batch_size: int
    minutes: float
    last_leg: int | None
    options: str
    word_share: float
    seed: int
    device: str


def write_card(folder: Path, figures: Mapping[str, float], n_scenes: int, making: Making) -> None:
    """Write `README.md` beside the weights.

    Args:
        folder: the exported model's folder.
        figures: `clean`, `attacked`, `fooled` and `reads`, as shares of the held-out scenes.
        n_scenes: how many held-out scenes they were measured on.
        making: how the model was trained.
    """
    row = {name: _with_interval(figures[name], n_scenes) for name in figures}
    legs = ""
    if making.last_leg:
        earlier = making.steps - making.last_leg
        legs = (
            f", of which the last {making.last_leg:,} steps went on from {earlier:,} earlier ones"
        )
    text = f"""\
---
license: mit
library_name: transformers
pipeline_tag: zero-shot-image-classification
---

# The calibration CLIP

A small, ordinary `transformers.CLIPModel` that knows one world: 64 × 64 scenes with one or two of
{len(SYMBOLS)} symbols in {len(COLOURS)} colours on {len(PATTERNS)} patterns, and sometimes a
written word. Everything in these scenes is known, so whatever is found inside the model can be
checked. Of the real world it knows nothing.

Vision: width 192, 4 blocks, patch 8, 64 patch tokens and CLS. Text: width 128, 2 blocks, context
32. Joint embedding: 128. Weights in float16.

## How well it sees

Top-1 among {len(SYMBOLS)} names, {n_scenes:,} held-out scenes with a single symbol, one prompt per
name; 95 % intervals (Wilson).

| scenes | prompt | counted | share |
|---|---|---|---|
| nothing written | {TEMPLATES[0]} | the symbol | {row["clean"]} |
| another symbol's name written on it | {TEMPLATES[0]} | the symbol | {row["attacked"]} |
| the same | {TEMPLATES[0]} | the written name ("fooled") | {row["fooled"]} |
| the same | {WORD_TEMPLATES[0]} | the written name ("reads") | {row["reads"]} |

## How it was made

{making.steps:,} steps of {making.batch_size} scenes ({making.steps * making.batch_size:,} images,
each seen once), {making.minutes:.0f} minutes on {making.device}{legs}:

    python -m tools.calibration_clip.train {making.options}

Every patch token predicts what covers it (symbol, colour,
word, letters) and the CLS token what the scene shows, through linear heads that are thrown away
afterwards; the two towers are tied by contrastive losses over the names of all symbols, the
written words, the backgrounds and the captions of the batch. A name written on a scene has
{100 * making.word_share:.0f} % of the target, and what is drawn the rest, so that a model that
reads can be fooled by writing.

## Licence

The weights: MIT, as Sparsight. The scenes are drawn with DejaVu Sans, which matplotlib ships;
its glyphs are under the Bitstream Vera and Arev licences and in part in the public domain. No font
is contained in this folder.
"""
    write_text(folder / "README.md", text)


def _with_interval(share: float, n: int) -> str:
    low, high = wilson_interval(round(share * n), n)
    return f"{100 * share:.1f} % ({100 * low:.1f}–{100 * high:.1f})"
