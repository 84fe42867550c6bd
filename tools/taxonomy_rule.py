"""Fit the gate of the taxonomy: `python -m tools.taxonomy_rule --store STORE RUN…`.

The runs are SAEs on calibration scenes. A linear discriminant (logistic regression, classes
weighted equally) separates latents with a known kind from those of untrained SAEs; its weights are
`GATE_WEIGHTS` in `sparsight.taxonomy.deciding`. Measure the result on other SAEs and other scenes,
with `sparsight taxonomy`. The published weights come from four SAEs of seed 1, one per block, with
2,048 latents and k = 16, on calibration:3000:7.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparsight.activations import ActivationStore
from sparsight.evaluation.baselines import untrained
from sparsight.evaluation.data import Passes
from sparsight.sae import SparseAutoencoder
from sparsight.taxonomy import classify
from sparsight.taxonomy.classifying import INIT_VECTORS, USUAL_K
from sparsight.taxonomy.deciding import FEWEST_IMAGES, gate_features


def fit(store: ActivationStore, runs: Sequence[Path], max_images: int) -> dict[str, float]:
    """Return the weight of each feature of the gate."""
    from sklearn.linear_model import LogisticRegression

    rows, known = [], []
    names: list[str] = []
    for run in runs:
        sae = SparseAutoencoder.from_pretrained(run, device="cpu").requires_grad_(False)
        passes = Passes(store, str(sae.metadata["site"]), max_images=max_images)
        fresh = untrained(sae, passes.first_vectors(INIT_VECTORS), 0, USUAL_K)
        (own,) = classify({run.name: (sae, store)}, max_images=max_images)
        (null,) = classify({run.name: (fresh, store)}, max_images=max_images, truth=False)
        for layer, chosen in ((own, sorted(own.truth)), (null, range(null.n_latents))):
            often = [i for i in chosen if layer.measures.images[i] >= FEWEST_IMAGES]
            features = gate_features(layer.measures)
            names = list(features)
            rows.append(np.stack([features[name][often] for name in names], axis=1))
            known += [layer is own] * len(often)
    x = np.concatenate(rows)
    scale = x.std(axis=0)
    model = LogisticRegression(class_weight="balanced", C=10, max_iter=1000).fit(x / scale, known)
    return dict(zip(names, (model.coef_[0] / scale).tolist(), strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, fit, print the weights."""
    parser = argparse.ArgumentParser(prog="python -m tools.taxonomy_rule")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--max-images", type=int, default=3000)
    given = parser.parse_args(arguments)
    weights = fit(ActivationStore(given.store), given.runs, given.max_images)
    for name, weight in weights.items():
        print(f'    "{name}": {weight:.3f},')


if __name__ == "__main__":
    main()
