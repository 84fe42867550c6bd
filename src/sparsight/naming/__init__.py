"""Names of latents, found without looking: vocabularies, methods, and how sure each name is.

Start at `name_latents` (naming.py). A method (scores.py) gives latents candidates with scores;
what untrained latents score (untrained.py) says which of them become names (null.py).
"""

from __future__ import annotations

from sparsight.naming.image_space import ImageSpace
from sparsight.naming.names_file import NameTable
from sparsight.naming.naming import NamingResult, forget_names, name_latents
from sparsight.naming.null import Null, UntrainedLatents, fit_null
from sparsight.naming.scores import Candidates, LatentActivations, Method, WordScores
from sparsight.naming.splicing import splice
from sparsight.naming.vlm_client import VlmSettings
from sparsight.naming.vocabulary import Vocabulary, open_vocabulary

__all__ = [
    "Candidates",
    "ImageSpace",
    "LatentActivations",
    "Method",
    "NameTable",
    "NamingResult",
    "Null",
    "UntrainedLatents",
    "VlmSettings",
    "Vocabulary",
    "WordScores",
    "fit_null",
    "forget_names",
    "name_latents",
    "open_vocabulary",
    "splice",
]
