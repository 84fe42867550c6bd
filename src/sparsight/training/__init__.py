"""Training SAEs: the loop, its schedule, checkpoints and exact resume.

Builds on `sae` and `activations`. Start with `train`; `Run` is the run's folder on disk. `sweep`
trains several autoencoders in one pass.
"""

from sparsight.training.config import TrainConfig, TrainRecipe
from sparsight.training.run import Run
from sparsight.training.sweeping import Sweep, SweepConfig, sweep
from sparsight.training.training import train

__all__ = ["Run", "Sweep", "SweepConfig", "TrainConfig", "TrainRecipe", "sweep", "train"]
