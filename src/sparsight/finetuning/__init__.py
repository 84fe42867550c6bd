"""Fine-tune a CLIP against typographic attacks, and show the effect.

Builds on `vision` and `images`; it uses SAEs only to penalise latents. Start at `finetune`
(tuning.py); `config.py` has every setting, `report.py` the page that compares before and after.
"""

from __future__ import annotations

from sparsight.finetuning.config import FinetuneConfig, FinetuneRecipe
from sparsight.finetuning.groups import Rates
from sparsight.finetuning.optimisers import AdaBelief
from sparsight.finetuning.pairs import CaptionedImages, PairFileImages, captioned, open_pairs
from sparsight.finetuning.penalty import PenalisedLatents
from sparsight.finetuning.run import FinetuneRun
from sparsight.finetuning.scaling import NeuronScaling
from sparsight.finetuning.tuning import PairedAttacks, finetune

__all__ = [
    "AdaBelief",
    "CaptionedImages",
    "FinetuneConfig",
    "FinetuneRecipe",
    "FinetuneRun",
    "NeuronScaling",
    "PairFileImages",
    "PairedAttacks",
    "PenalisedLatents",
    "Rates",
    "captioned",
    "finetune",
    "open_pairs",
]
