"""Remedies for dead latents in training: one file per remedy, with its settings and operations.

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
"""All remedies; in a configuration, the name of the remedy is the tag."""
