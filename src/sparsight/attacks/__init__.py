"""Typographic attacks: how far words on images fool a model, and which latents read them.

Builds on `editing`, and on `images.writing`, which draws the words. Start at `make_pairs`
(pairs.py), then `measure_attack` (measuring.py), `find_text_salient` (salience.py),
`causal_check` (causal.py) and `curate` (curating.py).
"""

from __future__ import annotations

from sparsight.attacks.causal import CausalReport, Target, causal_check
from sparsight.attacks.curating import CuratedSet, curate
from sparsight.attacks.measuring import AttackReport, measure_attack
from sparsight.attacks.opinion import Opinion, clip_opinion
from sparsight.attacks.pairs import AttackPairs, make_pairs
from sparsight.attacks.salience import find_text_salient
from sparsight.attacks.salience_table import SalienceTable
from sparsight.attacks.significance import benjamini_hochberg, sign_flip_p
from sparsight.images import TextStyle, WorldBand

__all__ = [
    "AttackPairs",
    "AttackReport",
    "CausalReport",
    "CuratedSet",
    "Opinion",
    "SalienceTable",
    "Target",
    "TextStyle",
    "WorldBand",
    "benjamini_hochberg",
    "causal_check",
    "clip_opinion",
    "curate",
    "find_text_salient",
    "make_pairs",
    "measure_attack",
    "sign_flip_p",
]
