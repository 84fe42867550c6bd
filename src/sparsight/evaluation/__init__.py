"""Every number about an SAE, one file per family, each next to its baselines.

Builds on `sae`, `activations`, `vision` and `images`. Start at `evaluate` (evaluator.py); the
definitions are in reconstruction.py, sparsity.py, downstream.py and truth.py.
"""

from __future__ import annotations

from sparsight.evaluation.baselines import PCA, Moments, Neurons, untrained
from sparsight.evaluation.comparing import SweepMeasures, measure_sweep
from sparsight.evaluation.data import Passes
from sparsight.evaluation.downstream import Downstream, downstream
from sparsight.evaluation.evaluator import evaluate
from sparsight.evaluation.reconstruction import ReconstructionMeter
from sparsight.evaluation.report import EvaluationReport
from sparsight.evaluation.sparsity import LatentCounts, SparsityMeter
from sparsight.evaluation.stability import Matching, match_latents, stability
from sparsight.evaluation.truth import TruthTable, truth_table
from sparsight.intervals import bootstrap_interval, paired_difference, t_interval, wilson_interval

__all__ = [
    "PCA",
    "Downstream",
    "EvaluationReport",
    "LatentCounts",
    "Matching",
    "Moments",
    "Neurons",
    "Passes",
    "ReconstructionMeter",
    "SparsityMeter",
    "SweepMeasures",
    "TruthTable",
    "bootstrap_interval",
    "downstream",
    "evaluate",
    "match_latents",
    "measure_sweep",
    "paired_difference",
    "stability",
    "t_interval",
    "truth_table",
    "untrained",
    "wilson_interval",
]
