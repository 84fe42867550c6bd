"""How often names are right, how often untrained latents get one, and how much memory it takes.

    python benchmarks/names.py truth RUN [--other calibration:4000:77] [--untrained 99]
    python benchmarks/names.py labels RUN
    python benchmarks/names.py memory

`truth`: names are found on the images of the run's index, thresholds on untrained SAEs on the same
images. They are judged on other images, by the ground truth there; and the latents of a third
untrained SAE are named on those other images. `labels`: a third of the labels is hidden, names are
found with the rest, and judged by the hidden third. `memory`: the peak of a scaled instance.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sparsight.activations import ActivationStore, LiveActivations
from sparsight.config import read_toml
from sparsight.evaluation.data import Passes
from sparsight.evaluation.truth import truth_table
from sparsight.images import open_images
from sparsight.latents import LatentIndex, Postings
from sparsight.latents.names import wording
from sparsight.naming.causal import Causal
from sparsight.naming.image_space import ImageSpace, embedded
from sparsight.naming.labels import LabelMethod
from sparsight.naming.methods import METHODS, Material
from sparsight.naming.naming import null_seeds
from sparsight.naming.null import MIN_IMAGES, Null, UntrainedLatents, fit_null
from sparsight.naming.scores import LatentActivations, Method
from sparsight.naming.text import TextCorrelation
from sparsight.naming.untrained import untrained_activations
from sparsight.naming.vocabulary import open_vocabulary
from sparsight.sae import SparseAutoencoder
from sparsight.vision import load_model
from sparsight.vision.passes import PassSettings

SETTINGS = PassSettings(64, 0, quiet=False)
RATE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("truth", "labels", "memory"))
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--other", default="calibration:4000:77")
    parser.add_argument("--untrained", type=int, default=99)
    parser.add_argument("--by", nargs="+", default=["labels", "text", "centroid"])
    given = parser.parse_args()
    if given.what == "truth":
        by_truth(given.run, given.other, given.untrained, given.by)
    elif given.what == "labels":
        by_hidden_labels(given.run)
    else:
        memory()


def opened(run: Path) -> tuple[SparseAutoencoder, LatentIndex, ActivationStore]:
    sae = SparseAutoencoder.from_pretrained(run, device="cpu")
    index = LatentIndex.open(run, sae)
    store = ActivationStore(read_toml(run / "config.toml")["store"])
    return sae, index, store.with_tokens(index.tokens)


def l0_of(index: LatentIndex) -> float:
    return float(index.table["density"].to_numpy().sum())


def first_untrained(
    sae: SparseAutoencoder, index: LatentIndex, store: ActivationStore
) -> UntrainedLatents:
    seeds = null_seeds(0, sae.n_latents)
    assert len(seeds) == 2
    return UntrainedLatents.of(
        *untrained_activations(sae, store, index.site, l0_of(index), seeds, index.n_places)
    )


@torch.no_grad()
def by_truth(run: Path, other: str, seed: int, by: Sequence[str]) -> None:
    sae, index, store = opened(run)
    model = load_model(index.manifest["model"]["id"])
    vocabulary = open_vocabulary("calibration")
    everything = np.arange(sae.n_latents)
    rows = LatentActivations(sae, everything, index.by_latent)
    untrained = first_untrained(sae, index, store)
    source = index.source()
    nulls: dict[str, Null] = {}
    with embedded(model, source, index.image_places, SETTINGS) as space:
        here = Material(
            index, sae, settings=SETTINGS, space=space, vocabulary=vocabulary, text_model=model,
            model=model, source=source,
        )  # fmt: skip
        methods = {name: METHODS[name](here) for name in by}
        names: dict[str, dict[int, str]] = {}
        for name in by:
            nulls[name] = fit_null([methods[name]], untrained, RATE)
            names[name] = accepted(nulls[name], 0, rows)
        together = fit_null(list(methods.values()), untrained, RATE)
        named = [accepted(together, place, rows) for place in range(len(by))]
        names["together"] = {k: v for each in reversed(named) for k, v in each.items()}
        nulls["together"] = together

    # Other images, and another untrained SAE.
    images = open_images(other)
    live = LiveActivations(model, images, [index.site], index.tokens, workers=0)
    table = truth_table(sae.encode, Passes(live, index.site), images)
    (fresh,) = untrained_activations(sae, live, index.site, l0_of(index), [seed], len(images))
    alive = np.nonzero(fresh.n_images >= MIN_IMAGES)[0]
    fresh = fresh.select(alive)
    false = {}
    with embedded(model, images, np.arange(len(images)), SETTINGS) as space:
        for name, null in nulls.items():
            on_others = [moved(method, space, images) for method in null.methods]
            hit = np.zeros(len(fresh), dtype=bool)
            for method, threshold in zip(on_others, null.thresholds, strict=True):
                hit |= method.candidates(fresh, 1).score[:, 0] > threshold
            false[name] = hit.mean()
    truth = {latent: (wording(e["attribute"]), e["f1"]) for latent, e in table.names.items()}
    print("\n| truth F1 | latents | method | named | named and right | right of named |")
    print("|---|---|---|---|---|---|")
    for least in (0.9, 0.5):
        known = [latent for latent, (_, f1) in truth.items() if f1 >= least]
        for name, own in names.items():
            given = [latent for latent in known if latent in own]
            right = [latent for latent in given if own[latent] == truth[latent][0]]
            print(
                f"| ≥ {least} | {len(known)} | {name} | {len(given) / len(known):.1%} "
                f"| {len(right) / len(known):.1%} | {len(right) / max(1, len(given)):.1%} |"
            )
    print("\n| method | names | false names asked | second SAE | other images, third SAE |")
    print("|---|---|---|---|---|")
    for name, null in nulls.items():
        print(
            f"| {name} | {len(names[name])} | {RATE:.1%} | {null.measured:.1%} of {null.n_check} "
            f"| {false[name]:.1%} of {len(fresh)} |"
        )


def accepted(null: Null, place: int, rows: LatentActivations) -> dict[int, str]:
    method, threshold = null.methods[place], null.thresholds[place]
    found = method.candidates(rows, 1)
    good = (found.score[:, 0] > threshold) & (rows.n_images >= MIN_IMAGES)
    return {int(i): method.words[found.word[i, 0]] for i in np.nonzero(good)[0]}


def moved(method: Method, space: ImageSpace, images: object) -> Method:
    """Return a fitted method, with the same parameters, on other images."""
    if isinstance(method, LabelMethod):
        labels = [images.known(i).label for i in range(len(images))]
        return LabelMethod(labels, np.arange(len(images)), len(images))
    vocabulary = open_vocabulary("calibration")
    assert not isinstance(method, Causal)
    model = load_model("calibration")
    other = type(method)(space, vocabulary.words, vocabulary.embed(model).cpu())
    other.mean, other.spread = method.mean, method.spread
    return other


def by_hidden_labels(run: Path) -> None:
    sae, index, store = opened(run)
    labels = index.images["label"].to_pylist()
    hidden = np.random.default_rng(0).random(len(labels)) < 1 / 3
    seen = [None if gone else label for label, gone in zip(labels, hidden, strict=True)]
    rows = LatentActivations(sae, np.arange(sae.n_latents), index.by_latent)
    untrained = first_untrained(sae, index, store)
    places = index.image_places
    null = fit_null([LabelMethod(seen, places, index.n_places)], untrained, RATE)
    method = null.methods[0]
    found = method.candidates(rows, 1)
    good = (found.score[:, 0] > null.thresholds[0]) & (rows.n_images >= MIN_IMAGES)
    label_at = {int(p): label for p, label, h in zip(places, labels, hidden, strict=True) if h}
    precise, hits, above = 0, 0, 0
    judged = 0
    for latent in np.nonzero(good)[0]:
        images, values = index.firing(int(latent))
        strong_images = images[values >= found.figures["activation"][latent, 0]].tolist()
        strong = [label_at[i] for i in strong_images if i in label_at]
        own = sum(label == method.words[found.word[latent, 0]] for label in strong)
        hits, above = hits + own, above + len(strong)
        judged += bool(strong)
        precise += bool(strong) and own / len(strong) >= 0.8
    held_out = found.figures["precision"][good, 0]
    print(f"\n| {run.name} | figure |\n|---|---|")
    print(f"| latents named by label | {good.sum()} of {(rows.n_images >= MIN_IMAGES).sum()} |")
    print(f"| different labels | {len(set(found.word[good, 0].tolist()))} of {len(method.words)} |")
    print(f"| median held-out precision | {np.median(held_out):.2f} |")
    print(f"| … ≥ .8 | {np.mean(held_out >= 0.8):.1%} |")
    print(f"| precision on the hidden third, over all images | {hits / max(1, above):.1%} |")
    print(f"| names with precision ≥ .8 on the hidden third | {precise} of {judged} |")
    print(f"| untrained latents with a name | {null.measured:.1%} of {null.n_check} |")


def memory(
    images: int = 200_000, latents: int = 16_384, words: int = 20_000, width: int = 512
) -> None:
    """Name latents of a synthetic index by text, in files as a real one is."""
    random = np.random.default_rng(0)
    per_image = 56
    with tempfile.TemporaryDirectory() as folder:
        matrix = np.memmap(Path(folder) / "e", np.float16, "w+", shape=(images, width))
        for first in range(0, images, 10_000):
            part = random.standard_normal((min(10_000, images - first), width), np.float32)
            matrix[first : first + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
        counts = np.full(latents, images * per_image // latents)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        columns = np.memmap(Path(folder) / "c", np.int32, "w+", shape=(int(offsets[-1]),))
        values = np.memmap(Path(folder) / "v", np.float32, "w+", shape=(int(offsets[-1]),))
        for row in range(latents):
            here = slice(offsets[row], offsets[row + 1])
            columns[here] = np.sort(
                random.choice(images, counts[row], replace=False, shuffle=False)
            )
            values[here] = random.random(counts[row], np.float32)
        space = ImageSpace(torch.from_numpy(matrix), np.arange(images), images)
        rows = LatentActivations(
            None, np.arange(latents), Postings(offsets, columns, values, None, images)
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        vectors = torch.nn.functional.normalize(torch.randn(words, width), dim=1)
        method = TextCorrelation(space, [str(i) for i in range(words)], vectors)
        method = method.calibrated(rows.select(np.arange(0, latents, 8)))
        method.candidates(rows)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{images:,} images × {words:,} words × {latents:,} latents: peak {peak:.2f} GB, of which "
        f"{before:.2f} GB before naming; images × words would be {images * words * 4 / 2**30:.0f} "
        f"GB, latents × words {latents * words * 4 / 2**30:.1f} GB"
    )


if __name__ == "__main__":
    main()
