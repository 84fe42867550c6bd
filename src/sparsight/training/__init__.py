"""Training SAEs: the loop, its schedule, checkpoints and exact resume.

Builds on `sae` and `activations`. Start with `train`; what a run leaves on disk is `Run`.
"""

from sparsight.training.config import TrainConfig, TrainRecipe
from sparsight.training.run import Run
from sparsight.training.trainer import train

__all__ = ["Run", "TrainConfig", "TrainRecipe", "train"]
