"""What latents mean: an index of what each responds to, names, heatmaps, the report.

Builds on `sae`, `activations`, `vision`, `images` and the truth table of `evaluation`.
Start at `build_index` (build.py), then `LatentIndex` (index.py) and `write_report` (report.py);
`encode` (encoding.py) writes the codes themselves, `CodeStore` (codes.py) reads them back.
`compare` (comparison.py) compares the members of a sweep.
"""

from __future__ import annotations

from sparsight.latents.build import build_index, upgrade_index
from sparsight.latents.coactivation import Coactivation
from sparsight.latents.code_shards import CodeBatch
from sparsight.latents.codes import CodeStore
from sparsight.latents.comparison import compare
from sparsight.latents.embeddings import ImageEmbeddings, SimilarImage
from sparsight.latents.encoding import encode
from sparsight.latents.export import export_index
from sparsight.latents.filters import filtered
from sparsight.latents.heatmaps import (
    activation_heatmaps,
    heat_image,
    overlay,
    patch_heatmaps,
    seen_pictures,
)
from sparsight.latents.index import Example, LatentIndex
from sparsight.latents.label_counts import LabelCounts
from sparsight.latents.names import LatentName, name_from_truth, set_names
from sparsight.latents.neighbour_tables import Neighbour, NeighbourTable
from sparsight.latents.neighbours import neighbours_across
from sparsight.latents.one_image import ImageLatents, PatchLatents, image_latents
from sparsight.latents.postings import Postings
from sparsight.latents.query import LabelShare, PatchResult, QueryResult
from sparsight.latents.report import write_report
from sparsight.latents.strips import LatentStrip, show_latent

__all__ = [
    "Coactivation",
    "CodeBatch",
    "CodeStore",
    "Example",
    "ImageEmbeddings",
    "ImageLatents",
    "LabelCounts",
    "LabelShare",
    "LatentIndex",
    "LatentName",
    "LatentStrip",
    "Neighbour",
    "NeighbourTable",
    "PatchLatents",
    "PatchResult",
    "Postings",
    "QueryResult",
    "SimilarImage",
    "activation_heatmaps",
    "build_index",
    "compare",
    "encode",
    "export_index",
    "filtered",
    "heat_image",
    "image_latents",
    "name_from_truth",
    "neighbours_across",
    "overlay",
    "patch_heatmaps",
    "seen_pictures",
    "set_names",
    "show_latent",
    "upgrade_index",
    "write_report",
]
