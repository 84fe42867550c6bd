"""Fine-tune a CLIP against words in pictures, and show what it did.

Builds on `vision` and `images`; knows SAEs only to price their latents. Start at `finetune`
(loop.py); `config.py` has every setting, `report.py` the page of before and after.
"""

from __future__ import annotations

from sparsight.editing.finetuning.config import FinetuneConfig, FinetuneRecipe
from sparsight.editing.finetuning.groups import Rates
from sparsight.editing.finetuning.loop import PairedAttacks, finetune
from sparsight.editing.finetuning.optimisers import AdaBelief
from sparsight.editing.finetuning.pairs import (
    CaptionedImages,
    PairFileImages,
    captioned,
    open_pairs,
)
from sparsight.editing.finetuning.penalty import PenalisedLatents
from sparsight.editing.finetuning.run import FinetuneRun
from sparsight.editing.finetuning.scaling import NeuronScaling

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
