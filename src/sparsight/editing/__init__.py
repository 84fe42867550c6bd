"""Edit a model: change its latents, neurons and directions, steer it, search with it.

Builds on `vision`, `sae` and `latents`. Start at `intervene` (interventions.py) and the actions
that an edit may have (actions.py); `fold` (folding.py) writes an edit into the model's weights;
`steer` (steering.py) and `embed_collection` (retrieval.py) show what edits do. `attacks` and
`finetuning` build on it.
"""

from __future__ import annotations

from sparsight.editing.actions import Action, Clamp, Keep, MeanAblation, Off, Scale, Set
from sparsight.editing.contact_sheet import write_contact_sheet
from sparsight.editing.edits import DirectionAblation, Edit, LatentEdit, NeuronEdit
from sparsight.editing.folding import every_write, fold
from sparsight.editing.interventions import Intervention, intervene, interventions, mean_codes
from sparsight.editing.latent_search import find_latents
from sparsight.editing.retrieval import Collection, Hit, SearchResult, embed_collection
from sparsight.editing.steering import SteerReport, steer
from sparsight.editing.steering_files import save_steering
from sparsight.vision.gmp import GeometricLinear, is_parametrized, parametrize, to_plain
from sparsight.vision.long_clip import (
    LongPositions,
    is_split,
    keep_positions,
    lengthen,
    merge_positions,
    stretched,
)

__all__ = [
    "Action",
    "Clamp",
    "Collection",
    "DirectionAblation",
    "Edit",
    "GeometricLinear",
    "Hit",
    "Intervention",
    "Keep",
    "LatentEdit",
    "LongPositions",
    "MeanAblation",
    "NeuronEdit",
    "Off",
    "Scale",
    "SearchResult",
    "Set",
    "SteerReport",
    "embed_collection",
    "every_write",
    "find_latents",
    "fold",
    "intervene",
    "interventions",
    "is_parametrized",
    "is_split",
    "keep_positions",
    "lengthen",
    "mean_codes",
    "merge_positions",
    "parametrize",
    "save_steering",
    "steer",
    "stretched",
    "to_plain",
    "write_contact_sheet",
]
