"""What training does about dead latents: one file per remedy, its settings and its operations.

A remedy adds a loss for the dead latents (`loss`), or changes them between two steps (`renew`).
Start with `base.Remedy`.
"""

from sparsight.sae.remedies.auxk import AuxK
from sparsight.sae.remedies.base import LeftOver, Remedy, Residuals, Trained
from sparsight.sae.remedies.ghost import GhostGradients
from sparsight.sae.remedies.resampling import Resampling

__all__ = [
    "AnyRemedy",
    "AuxK",
    "GhostGradients",
    "LeftOver",
    "Remedy",
    "Resampling",
    "Residuals",
    "Trained",
]

AnyRemedy = AuxK | GhostGradients | Resampling
"""All remedies, for configurations, which are tagged by the name of the remedy."""
