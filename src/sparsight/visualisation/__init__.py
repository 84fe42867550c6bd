"""Images made for latents: feature visualisation, judged beside the best real images.

Builds on `latents`, `sae` and `vision`. Start at `visualize` (making.py), then
`VisualisationSettings` (settings.py) and `Visualisation` (result.py). What is optimised is in
recipes.py, what is raised in objective.py, the loop in optimising.py, and how images are judged in
judging.py.
"""

from __future__ import annotations

from sparsight.visualisation.colours import (
    ImageStatistics,
    assumed_statistics,
    measure_images,
)
from sparsight.visualisation.judging import Judgement, RealImage
from sparsight.visualisation.making import visualize
from sparsight.visualisation.result import Visualisation
from sparsight.visualisation.settings import Transforms, VisualisationSettings

__all__ = [
    "ImageStatistics",
    "Judgement",
    "RealImage",
    "Transforms",
    "Visualisation",
    "VisualisationSettings",
    "assumed_statistics",
    "measure_images",
    "visualize",
]
