"""The sparse autoencoder: its parts, its parameters, its files.

Builds on torch alone: no images, no vision models. Start with `SparseAutoencoder`; `kernels` holds
the operations, `objectives` what training adds to them.
"""

from sparsight.sae.autoencoder import SAEOutput, SparseAutoencoder
from sparsight.sae.code import SparseCode
from sparsight.sae.config import AuxK, BatchTopK, Matryoshka, MultiTopK, SAEConfig, TopK
from sparsight.sae.normaliser import Normaliser

__all__ = [
    "AuxK",
    "BatchTopK",
    "Matryoshka",
    "MultiTopK",
    "Normaliser",
    "SAEConfig",
    "SAEOutput",
    "SparseAutoencoder",
    "SparseCode",
    "TopK",
]
