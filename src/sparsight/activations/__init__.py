"""A model's activations on images: extracted to shards on disk, or computed on the fly.

Builds on `vision` and `images`. Start with `extract`; `ActivationStore` reads back what it wrote,
and `ActivationSource` is the interface that training, evaluation and the index ask of either.
"""

from sparsight.activations.extraction import extract
from sparsight.activations.live import LiveActivations
from sparsight.activations.prefetch import Prefetcher
from sparsight.activations.source import (
    ActivationSource,
    OrderedBatch,
    matching_sites,
    with_tokens,
)
from sparsight.activations.split import HeldOut, held_out_of, seen_in_training
from sparsight.activations.statistics import SiteStatistics
from sparsight.activations.store import ActivationStore
from sparsight.activations.stream import VectorStream
from sparsight.activations.summary import ExtractionSummary

__all__ = [
    "ActivationSource",
    "ActivationStore",
    "ExtractionSummary",
    "HeldOut",
    "LiveActivations",
    "OrderedBatch",
    "Prefetcher",
    "SiteStatistics",
    "VectorStream",
    "extract",
    "held_out_of",
    "matching_sites",
    "seen_in_training",
    "with_tokens",
]
