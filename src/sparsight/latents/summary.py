"""From posting lists to the table and the examples of an index, one block of latents at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64
from torch import Tensor

from sparsight.latents.distributions import QUANTILES, Distributions
from sparsight.latents.duplicates import without_repeats
from sparsight.latents.examples import Examples, ExampleTables, LatentEntries
from sparsight.latents.label_counts import LabelCounter
from sparsight.latents.postings import Postings
from sparsight.latents.statistics import LatentStatistics, label_mixture


@dataclass(frozen=True)
class Summary:
    """What the posting lists say about every latent.

    Attributes:
        examples: strongest images and samples.
        distributions: histograms and quantiles of image maxima.
        labels: counts of labels.
        n_repeats: images in which a latent fires that nearly repeat another of them.
    """

    examples: ExampleTables
    distributions: Distributions
    labels: LabelCounter
    n_repeats: Int64[Tensor, " latents"]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the examples, by the names that they have on disk."""
        tables = {
            "top": self.examples.top,
            "samples": self.examples.bands,
            "uniform": self.examples.uniform,
        }
        return {
            f"{kind}.{part}": getattr(table, part).contiguous()
            for kind, table in tables.items()
            for part in ("image", "token", "activation")
        }


def summarise(
    postings: Postings,
    images: pa.Table,
    settings: dict[str, int],
    first: Int64[Tensor, " places"] | None = None,
) -> Summary:
    """Read all posting lists once.

    Args:
        postings: images by latent.
        images: one row per image that was read: `image` (its place), `label`.
        settings: `top_n`, `quantiles`, `samples_per_quantile`, `uniform_samples`, `seed`.
        first: for each place, the first image that its image nearly repeats; examples show each
            such group once, by its strongest image. None: nothing is known about repeats.
    """
    n = postings.n_rows
    examples = ExampleTables(
        Examples.empty(n, settings["top_n"]),
        Examples.empty(n, settings["quantiles"], settings["samples_per_quantile"]),
        Examples.empty(n, settings["uniform_samples"]),
        settings["seed"],
    )
    labels = LabelCounter(
        images["label"].to_pylist(), images["image"].to_numpy(), postings.n_columns, n
    )
    distributions = Distributions.zeros(n)
    n_repeats = torch.zeros(n, dtype=torch.int64)
    for block in postings.blocks():
        entries = LatentEntries.read(postings, block)
        once = entries if first is None else without_repeats(entries, first)
        n_repeats += (entries.latent.bincount(minlength=n)) - once.latent.bincount(minlength=n)
        examples.fill(once)
        distributions.fill(entries)
        labels.add(entries)
        postings.release()
    return Summary(examples, distributions, labels, n_repeats)


def latent_table(statistics: LatentStatistics, summary: Summary, images: pa.Table) -> pa.Table:
    """Return one row per latent; see `LatentIndex.table`."""
    active = statistics.n_active
    n = statistics.n_latents
    mean = statistics.sum / active
    columns: dict[str, Any] = {
        "latent": pa.array(range(n), pa.int32()),
        "density": pa.array((active.double() / statistics.n_vectors).numpy()),
        "mean_activation": pa.array(mean.numpy(), mask=(active == 0).numpy()),
        "max_activation": pa.array(summary.examples.top.activation[:, 0].contiguous().numpy()),
        "n_active": pa.array(active.numpy()),
        "n_active_images": pa.array(statistics.n_active_images.numpy()),
        "n_near_duplicates": pa.array(summary.n_repeats.numpy()),
        "cls_share": _cls_share(statistics),
        **_spatial(statistics),
        **_distribution(summary.distributions),
        **_labels(summary.examples.top, images),
        "map_x": pa.nulls(n, pa.float32()),
        "map_y": pa.nulls(n, pa.float32()),
        "name": pa.nulls(n, pa.string()),
        "name_score": pa.nulls(n, pa.float64()),
        "name_threshold": pa.nulls(n, pa.float64()),
        "name_source": pa.nulls(n, pa.string()),
    }
    return pa.table(columns)


def _cls_share(statistics: LatentStatistics) -> pa.Array:
    if not statistics.n_prefix:
        return pa.nulls(statistics.n_latents, pa.float64())
    share = statistics.n_active_prefix.double() / statistics.n_active
    return pa.array(share.numpy(), mask=(statistics.n_active == 0).numpy())


def _spatial(statistics: LatentStatistics) -> dict[str, pa.Array]:
    spatial, n = statistics.spatial, statistics.n_latents
    if spatial is None or spatial.null is None:
        return {name: pa.nulls(n, pa.float64()) for name in ("moran", "moran_null")}
    mean = (spatial.total / spatial.count).numpy()
    null = np.full(n, spatial.null)
    return {
        "moran": pa.array(mean, mask=(spatial.count == 0).numpy()),
        "moran_null": pa.array(null),
    }


def _distribution(distributions: Distributions) -> dict[str, pa.Array]:
    never = torch.isnan(distributions.quantiles[next(iter(QUANTILES))]).numpy()
    quantiles = {
        name: pa.array(values.numpy(), mask=never)
        for name, values in distributions.quantiles.items()
    }
    bins = distributions.histogram.shape[1]
    counts = pa.array(distributions.histogram.flatten().numpy(), pa.int64())
    return {
        **quantiles,
        "histogram": pa.FixedSizeListArray.from_arrays(counts, bins),
        "histogram_low": pa.array(distributions.low.numpy()),
        "histogram_high": pa.array(distributions.high.numpy()),
    }


def _labels(top: Examples, images: pa.Table) -> dict[str, pa.Array]:
    labels = dict(zip(images["image"].to_pylist(), images["label"].to_pylist(), strict=True))
    mixtures = [
        label_mixture(places, activations, labels)
        for places, activations in zip(top.image.tolist(), top.activation.tolist(), strict=True)
    ]
    return {
        "label_entropy": pa.array([m.entropy for m in mixtures], pa.float64()),
        "top_label": pa.array([m.label for m in mixtures], pa.string()),
        "top_label_share": pa.array([m.share for m in mixtures], pa.float64()),
    }
