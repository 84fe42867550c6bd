"""Models that see: load them, name their sites, read and edit activations, classify zero-shot.

Builds on torch and transformers (open_clip as an extra), and on `images`. Start with `load.py`,
then `model.py`; `passes.py` has the one loop that puts images through a model; `tower.py` and
`probe.py` find the sites in any architecture; `saving.py` writes a model for other programs.
"""

from __future__ import annotations

from sparsight.vision.load import load_model
from sparsight.vision.model import Transform, VisionModel, count_from_start
from sparsight.vision.passes import ImagePass, PassSettings
from sparsight.vision.tokens import Tokens, select_tokens
from sparsight.vision.variants import embed_variants
from sparsight.vision.zero_shot import (
    TEMPLATES,
    ZeroShotResult,
    ZeroShotTally,
    classifier_weights,
    classify,
    contrastive_loss,
    names_by_label,
    resolve_templates,
    zero_shot,
)

__all__ = [
    "TEMPLATES",
    "ImagePass",
    "PassSettings",
    "Tokens",
    "Transform",
    "VisionModel",
    "ZeroShotResult",
    "ZeroShotTally",
    "classifier_weights",
    "classify",
    "contrastive_loss",
    "count_from_start",
    "embed_variants",
    "load_model",
    "names_by_label",
    "resolve_templates",
    "select_tokens",
    "zero_shot",
]
