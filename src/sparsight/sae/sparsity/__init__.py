"""What makes a code sparse: one file per kind, with its settings and operations.

A kind turns scores (pre-activations) into a code, quickly without a dense tensor (`encode`) and in
plain autograd for training (`dense`), and defines the penalty on active latents (`penalty`). Builds
on the kernels; start with `base.Sparsity`.
"""

from sparsight.sae.sparsity.abs_topk import AbsTopK
from sparsight.sae.sparsity.base import Dense, Sparsity, Weights
from sparsight.sae.sparsity.gated import Gated
from sparsight.sae.sparsity.group_max import GroupMax
from sparsight.sae.sparsity.jump_relu import JumpReLU
from sparsight.sae.sparsity.matching_pursuit import MatchingPursuit
from sparsight.sae.sparsity.relu import ReLU
from sparsight.sae.sparsity.topk import BatchTopK, TopK

__all__ = [
    "AbsTopK",
    "AnySparsity",
    "BatchTopK",
    "Dense",
    "Gated",
    "GroupMax",
    "JumpReLU",
    "MatchingPursuit",
    "ReLU",
    "Sparsity",
    "TopK",
    "Weights",
]

AnySparsity = TopK | BatchTopK | AbsTopK | GroupMax | ReLU | JumpReLU | Gated | MatchingPursuit
"""All kinds; in a configuration, the name of the kind is the tag."""
