"""Search with embeddings that an SAE reconstructs: the table `retrieval` in QUALITY.md.

Tied TopK autoencoders of several widths and k on the embedding of the calibration CLIP, after an
observation of zer0int's: narrow ones find "only stop signs". Queries are one text or one image of
each of the 66 symbols; they search scenes of single objects.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import tyro
from tables import QUALITY, keep
from torch.nn.functional import normalize

import sparsight as sp
from sparsight.calibration import SYMBOLS
from sparsight.editing import Collection, SearchResult, embed_collection
from sparsight.intervals import bootstrap_interval
from sparsight.sae import AuxK, SAEConfig, SparseAutoencoder, TopK
from sparsight.training import SweepConfig, TrainConfig


@dataclass(frozen=True)
class Options:
    """Train a grid of autoencoders, search with each; write the table."""

    widths: tuple[int, ...] = (64, 256, 1024)
    """Latents; the embedding has 128 dimensions."""

    ks: tuple[int, ...] = (2, 8, 32)
    """Active latents."""

    seeds: int = 2
    """Seeds per kind of autoencoder."""

    n_images: int = 2000
    """Scenes to train on."""

    n_vectors: int = 200_000
    """Vectors to train each autoencoder on."""

    n_search: int = 660
    """Scenes to search: about 10 per symbol."""

    top: int = 10
    """Number of top results to examine."""

    out: Path = QUALITY
    """File that keeps the table."""


@dataclass(frozen=True)
class Figures:
    """Figures about the results of one query."""

    precision: float
    """Share of results that show the symbol."""

    labels: float
    """Effective number of symbols in the results: exp(entropy)."""

    looks: float
    """Mean of 1 − cosine between the plain embeddings of two results."""


def main(options: Options) -> None:
    model = sp.load_model("calibration", device="cpu")
    config = SweepConfig(
        TrainConfig(
            sae=SAEConfig(256, sparsity=TopK(8), tied=True),
            n_vectors=options.n_vectors,
            batch_size=1024,
            remedy=AuxK(),
        ),
        {
            "n_latents": list(options.widths),
            "k": list(options.ks),
            "seed": list(range(options.seeds)),
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        store = sp.extract(
            model,
            sp.open_images(f"calibration:{options.n_images}:0"),
            sites=["embedding"],
            out=Path(folder) / "store",
        )
        trained = sp.sweep(store, config, out=Path(folder) / "sweep", quiet=True)
        images = sp.open_images(f"calibration:{options.n_search}:1:single")
        collection = embed_collection(model, images)
        others = sp.open_images(f"calibration:{options.n_search}:2:single")
        queries = pictures(embed_collection(model, others), others)
        rows = [plain_row(collection, queries, options.top)]
        runs = dict(trained.runs.items())
        for width in options.widths:
            for k in options.ks:
                saes = [
                    run.sae()
                    for run in runs.values()
                    if (run.sae().n_latents, run.sae().config.sparsity.k) == (width, k)
                ]
                rows.append(row(collection, queries, saes, options.top))
    title = (
        f"Search with reconstructed embeddings: calibration CLIP, tied TopK on the embedding, "
        f"{options.n_vectors:,} vectors of {options.n_images:,} scenes, {options.seeds} seeds; the "
        f"first {options.top} of {options.n_search:,} scenes of single objects, for each symbol"
    )
    keep(title, rows, options.out, name="retrieval")


def pictures(collection: Collection, images: Any) -> dict[str, torch.Tensor]:
    """Return the embedding of one image per symbol."""
    found: dict[str, torch.Tensor] = {}
    for place, row in zip(collection.places, collection.embeddings, strict=True):
        found.setdefault(images.info(place).label, row)
    return found


def plain_row(collection: Collection, queries: dict[str, torch.Tensor], top: int) -> dict[str, Any]:
    """Make the row without an autoencoder."""
    texts = [figures(collection, collection.search(f"a photo of a {s}", top=top), s)
             for s in SYMBOLS]  # fmt: skip
    shown = [figures(collection, collection.search(queries[s], top=top), s) for s in queries]
    return {"latents": "none", "k": "", "FVU": "", **cells(texts, shown, None)}


def row(
    collection: Collection,
    queries: dict[str, torch.Tensor],
    saes: Sequence[SparseAutoencoder],
    top: int,
) -> dict[str, Any]:
    """Average over the autoencoders of one kind, for each symbol."""
    texts, shown, alone = ([[] for _ in saes] for _ in range(3))
    for sae, *lists in zip(saes, texts, shown, alone, strict=True):
        for symbol in SYMBOLS:
            text = f"a photo of a {symbol}"
            for found, query, mode, more in (
                (lists[0], text, "reconstructed", {}),
                (lists[1], queries.get(symbol), "reconstructed", {}),
                (lists[2], queries.get(symbol), "query", {"n_query_latents": 1}),
            ):
                if query is not None:
                    hits = collection.search(query, mode, sae=sae, top=top, **more)
                    found.append(figures(collection, hits, symbol))
    fvu = fmean(error(sae, collection.embeddings) for sae in saes)
    about = {"latents": saes[0].n_latents, "k": saes[0].config.sparsity.k, "FVU": fvu}
    return {**about, **cells(means(texts), means(shown), means(alone))}


def means(by_seed: Sequence[Sequence[Figures]]) -> list[Figures]:
    """Average the figures of each query over seeds."""
    return [
        Figures(*(fmean(getattr(each, name) for each in found) for name in vars(found[0])))
        for found in zip(*by_seed, strict=True)
    ]


def cells(
    texts: Sequence[Figures], shown: Sequence[Figures], alone: Sequence[Figures] | None
) -> dict[str, str]:
    """Format figures for the table, with bootstrap intervals over the symbols."""
    out = {}
    for name, found in (("text", texts), ("picture", shown), ("one latent", alone)):
        for title, field in (("precision", "precision"), ("symbols", "labels"), ("looks", "looks")):
            values = [getattr(each, field) for each in found or ()]
            interval = bootstrap_interval(values)
            out[f"{name}: {title}"] = (
                f"{fmean(values):.2f} [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
            )
    return {key: value for key, value in out.items() if key != "text: looks"}


def figures(collection: Collection, found: SearchResult, symbol: str) -> Figures:
    """Measure the results of one query."""
    counts = Counter(hit.label for hit in found.hits)
    n = len(found.hits)
    entropy = -sum(c / n * math.log(c / n) for c in counts.values())
    place = {image: i for i, image in enumerate(collection.places)}
    rows = normalize(collection.embeddings[[place[hit.image] for hit in found.hits]], dim=1)
    apart = 1 - (rows @ rows.T)
    looks = float(apart.sum() / (n * (n - 1)))
    return Figures(counts[symbol] / n, math.exp(entropy), looks)


@torch.no_grad()
def error(sae: SparseAutoencoder, x: torch.Tensor) -> float:
    """Return the FVU."""
    spread = (x.double() - x.double().mean(dim=0)).square().sum()
    return float((sae(x).x_hat - x).double().square().sum() / spread)


if __name__ == "__main__":
    main(tyro.cli(Options))
