"""Categories without labels: `python -m tools.noise_vit.categories --model DIR --out TABLE.md`.

Three vision models see the same images: the ViT trained on noise, an untrained ViT of its shape,
and the calibration CLIP. On the last block of each, SAEs are trained. An image belongs to the
latent that is strongest on it, relative to the latent's mean. K-means on the mean over patches gets
as many clusters as latents are strongest somewhere. Both are compared with labels that neither
saw, by adjusted mutual information (0: chance, 1: the same partition; Vinh et al. 2010).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsight.activations import ActivationStore, extract
from sparsight.errors import SparsightError
from sparsight.files import write_text
from sparsight.images import open_images
from sparsight.intervals import t_interval
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK
from sparsight.taxonomy.classifying import peaks_of
from sparsight.training import TrainConfig, train
from sparsight.vision import load_model
from tools.noise_vit.train import new_vit, save_vit

SITE = "blocks.-1.resid_post"
Labels = dict[str, list[str]]


def labels_of(images: Any, places: Sequence[int]) -> Labels:
    """Return the labels to compare with, by their kind: scenes have several, photos have one."""
    if not hasattr(images, "scene"):
        return {"label": [str(images.known(i).label) for i in places]}
    scenes = [images.scene(i) for i in places]
    return {
        "background": [scene.background for scene in scenes],
        "pattern": [scene.pattern for scene in scenes],
        "symbol": [scene.label for scene in scenes],
    }


def strongest_latents(sae: Any, store: ActivationStore) -> npt.NDArray[np.int64]:
    """Return each image's strongest latent, relative to the latent's mean over images."""
    parts = []
    with torch.no_grad():
        for batch in store.ordered(store.sites, batch_images=64):
            x = batch.activations[store.sites[0]]
            parts.append(peaks_of(sae.encode(x.flatten(0, 1)), x.shape[1]).to_dense())
    peaks = torch.cat(parts)
    return (peaks / peaks.mean(dim=0).clamp(min=1e-6)).argmax(dim=1).numpy()


def mean_patches(store: ActivationStore) -> npt.NDArray[np.float32]:
    """Return the mean over patches of each image, standardised."""
    view = store.with_tokens("mean")
    parts = [b.activations[view.sites[0]][:, 0] for b in view.ordered(view.sites)]
    x = torch.cat(parts)
    return ((x - x.mean(dim=0)) / x.std(dim=0).clamp(min=1e-6)).numpy()


def measure(
    model: str, images: str, folder: Path, seeds: int, n_latents: int, n_vectors: int
) -> dict[str, dict[str, list[float]]]:
    """Return, for each kind of label, the scores of latents and of k-means, one per seed."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_mutual_info_score

    source = open_images(images)
    store = extract(load_model(model), source, sites=[SITE], out=folder / "store", quiet=True)
    labels = labels_of(source, store.image_indices.tolist())
    features = mean_patches(store)
    scores: dict[str, dict[str, list[float]]] = {k: {"latents": [], "k-means": []} for k in labels}
    for seed in range(seeds):
        config = TrainConfig(
            sae=SAEConfig(n_latents=n_latents, sparsity=TopK(k=16)), n_vectors=n_vectors,
            batch_size=1024, lr=1e-3, seed=seed,
        )  # fmt: skip
        run = train(store, config, out=folder / f"run-{seed}", quiet=True)
        sae = SparseAutoencoder.from_pretrained(run.folder(), device="cpu").requires_grad_(False)
        clusters = strongest_latents(sae, store)
        count = len(np.unique(clusters))
        plain = KMeans(count, n_init=1, random_state=seed).fit_predict(features)
        for kind, values in labels.items():
            scores[kind]["latents"].append(adjusted_mutual_info_score(values, clusters))
            scores[kind]["k-means"].append(adjusted_mutual_info_score(values, plain))
    return scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all models on all collections; print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.noise_vit.categories")
    parser.add_argument("--model", type=Path, required=True, help="folder of the ViT")
    parser.add_argument("--out", type=Path, required=True, help="file of the table, Markdown")
    parser.add_argument("--images", nargs="+", default=["calibration:2000:11"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--vectors", type=int, default=200_000)
    given = parser.parse_args(arguments)
    rows = ["| images | compared with | model | latents | k-means |", "|---|---|---|---|---|"]
    try:
        with tempfile.TemporaryDirectory() as place:
            plain = Path(place) / "untrained"
            save_vit(new_vit().eval(), plain)
            models = {
                "noise ViT": str(given.model), "untrained ViT": str(plain),
                "calibration CLIP": "calibration",
            }  # fmt: skip
            for number, images in enumerate(given.images):
                for name, model in models.items():
                    folder = Path(place) / f"{number}-{name.replace(' ', '-')}"
                    found = measure(
                        model, images, folder, given.seeds, given.latents, given.vectors
                    )
                    for kind, scores in found.items():
                        cells = [_cell(scores[each]) for each in ("latents", "k-means")]
                        where = Path(images).name if ":" not in images else images
                        rows.append(f"| `{where}` | {kind} | {name} | {cells[0]} | {cells[1]} |")
                        print(rows[-1], flush=True)
    except SparsightError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    write_text(given.out, "\n".join(rows) + "\n")
    return 0


def _cell(values: Sequence[float]) -> str:
    interval = t_interval(values, -1, 1)
    ends = "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    return f"{np.mean(values):.3f}{ends}"


if __name__ == "__main__":
    raise SystemExit(main())
