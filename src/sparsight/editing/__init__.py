"""Act on a model: switch latents off, find what fools it, fine-tune it, hand it back.

Builds on `vision`, `sae` and `latents`. Start at `intervene` (interventions.py) and the actions
that an edit may have (actions.py).
"""

from __future__ import annotations

from sparsight.editing.actions import Action, Clamp, Keep, MeanAblation, Off, Scale, Set
from sparsight.editing.interventions import (
    DirectionAblation,
    Edit,
    Intervention,
    LatentEdit,
    NeuronEdit,
    intervene,
    interventions,
    mean_codes,
)

__all__ = [
    "Action",
    "Clamp",
    "DirectionAblation",
    "Edit",
    "Intervention",
    "Keep",
    "LatentEdit",
    "MeanAblation",
    "NeuronEdit",
    "Off",
    "Scale",
    "Set",
    "intervene",
    "interventions",
    "mean_codes",
]
