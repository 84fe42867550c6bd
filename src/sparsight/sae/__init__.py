"""The sparse autoencoder: its parts, its parameters, its files.

Builds on torch alone: no images, no vision models. Start with `SparseAutoencoder`;
`sparsight.kernels` holds the operations, `objectives` what training adds to them.
"""

from sparsight.sae.autoencoder import SAEOutput, SparseAutoencoder
from sparsight.sae.code import SparseCode
from sparsight.sae.config import (
    Archetypal,
    Free,
    Matryoshka,
    MatryoshkaK,
    MultiTopK,
    SAEConfig,
)
from sparsight.sae.normaliser import Normaliser
from sparsight.sae.remedies import AuxK, GhostGradients, Resampling
from sparsight.sae.sparsity import (
    AbsTopK,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    ReLU,
    TopK,
)

__all__ = [
    "AbsTopK",
    "Archetypal",
    "AuxK",
    "BatchTopK",
    "Free",
    "Gated",
    "GhostGradients",
    "GroupMax",
    "JumpReLU",
    "MatchingPursuit",
    "Matryoshka",
    "MatryoshkaK",
    "MultiTopK",
    "Normaliser",
    "ReLU",
    "Resampling",
    "SAEConfig",
    "SAEOutput",
    "SparseAutoencoder",
    "SparseCode",
    "TopK",
]
