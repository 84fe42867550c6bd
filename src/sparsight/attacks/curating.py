"""Collect the images that activate text-salient latents most, as a set to train or test on.

On disk, the set is a folder that `open_images` reads with captions and labels:

- `images/00000.png`, …: the images, the strongest first;
- `metadata.jsonl`: caption, label, score and origin of each image;
- `scores.parquet`: the score of every image of the collection, kept or not;
- `attack.tar`: the kept images as a WebDataset shard;
- `manifest.json`: model, SAE, site, latents, collection, and how captions were made.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sparsight.attacks.causal import Target
from sparsight.attacks.latent_reading import latent_reducer
from sparsight.attacks.opinion import clip_opinion
from sparsight.config import check_positive
from sparsight.editing.interventions import check_belongs
from sparsight.errors import SparsightError, UserError
from sparsight.files import atomic_path, write_json, write_text
from sparsight.folders import new_folder
from sparsight.images import ImageError, ImageInfo, ImageSource
from sparsight.redaction import without_folders
from sparsight.vision import (
    ImagePass,
    PassSettings,
    VisionModel,
    classifier_weights,
    classify,
    names_by_label,
)

Captions = Literal["own", "labels", "zero-shot", "opinion"]
"""The source's own captions; its labels, or the likeliest class, in a sentence; CLIP's opinion."""

FORMAT_VERSION = 1
MANIFEST, METADATA, SCORES, SHARD = (
    "manifest.json",
    "metadata.jsonl",
    "scores.parquet",
    "attack.tar",
)
SENTENCE = "a photo of a {}."


@dataclass(frozen=True)
class CuratedSet:
    """The set that `curate` wrote.

    Attributes:
        folder: the folder.
        n: number of images in it.
        n_seen: number of images of the collection that were scored.
        failed: number of images that did not load.
        lowest: score of the weakest image kept.
        highest: score of the strongest image kept.
    """

    folder: Path
    n: int
    n_seen: int
    failed: int
    lowest: float
    highest: float


@torch.no_grad()
def curate(
    model: VisionModel,
    source: ImageSource,
    targets: Sequence[Target] | Target,
    out: str | Path,
    *,
    n: int = 200,
    captions: Captions = "labels",
    sentence: str = SENTENCE,
    class_names: Sequence[str] | None = None,
    words: int = 4,
    max_failed: float = 0.01,
    seed: int = 0,
    check: bool = True,
    batch_size: int = 64,
    workers: int | None = None,
    quiet: bool = True,
) -> CuratedSet:
    """Write the images that activate latents most, with captions.

    The score of an image is the mean over latents of its activation (the mean or the maximum over
    positions, as in the test that found the latents) in units of the latent's own mean on attacked
    images: an attacked image has 1 on average.

    Args:
        model: the model in which the latents were found.
        source: any images; only captions `labels` need labels.
        targets: the latents found, at one site or several.
        out: folder to write; it must not exist yet.
        n: largest number of images to keep; images that activate no latent are never kept.
        captions: where captions come from.
        sentence: sentence for a label or class, which replaces {}.
        class_names: classes for captions `zero-shot`; default: the labels of `source`.
        words: number of words in captions `opinion`.
        max_failed: share of images that may be broken.
        seed: seed of the search for opinions.
        check: check that SAEs belong to this model and site.
        batch_size: images at a time.
        workers: processes that decode.
        quiet: show no progress line.

    Raises:
        UserError: the folder exists, captions are not available, or no image activates the latents.
        SparsightError: more images are broken than `max_failed` allows, or the disk is full.
    """
    out = Path(out)
    given = [targets] if isinstance(targets, Target) else list(targets)
    _check(given, n, captions, sentence, source)
    for target in given:
        if target.sae is not None:
            check_belongs(target.sae, model, target.table.site, strict=check)
    settings = PassSettings(batch_size, workers, quiet)
    with new_folder(out) as staged:
        scores = _scores(model, source, given, max_failed, settings)
        kept = scores.strongest(n)
        if not kept:
            raise UserError(
                f"{source.spec}: none of {len(source):,} images activates any of the "
                f"{sum(len(t.chosen or ()) for t in given):,} latents. Use other images."
            )
        if captions in ("own", "labels"):
            texts = _own_captions(source, kept, captions, sentence)
        else:
            embedded = _embedded(model, source, kept, settings)
            if captions == "opinion":
                opinions = clip_opinion(model, embedded, words=words, seed=seed)
                texts = [[opinion.text] for opinion in opinions]
            else:
                texts = _zero_shot_captions(model, source, embedded, sentence, class_names)
        about = _about(model, source, given, captions, len(kept), scores.failed)
        _write(staged, source, kept, scores, texts, about)
    return scores.summary(out, kept)


def _check(
    targets: Sequence[Target], n: int, captions: str, sentence: str, source: ImageSource
) -> None:
    if not targets:
        raise UserError("No target is given, so there is nothing to curate by. Give at least one.")
    check_positive(n=n)
    if captions not in get_args(Captions):
        raise UserError(f"captions is {captions!r}; expected {', '.join(get_args(Captions))}.")
    if "{}" not in sentence:
        raise UserError(f"The sentence {sentence!r} has no {{}} for the class name.")


@dataclass(frozen=True)
class _Scores:
    """The score of every image; 0 and False for images that do not load."""

    values: npt.NDArray[np.float64]
    loaded: npt.NDArray[np.bool_]

    @property
    def failed(self) -> int:
        return int((~self.loaded).sum())

    def strongest(self, n: int) -> list[int]:
        """Return the places of at most `n` strongest images, none of them with score 0."""
        order = np.argsort(-self.values, kind="stable")
        return [int(i) for i in order if self.values[i] != 0][:n]

    def summary(self, folder: Path, kept: Sequence[int]) -> CuratedSet:
        """Describe the set of the images that were kept, the strongest first."""
        return CuratedSet(
            folder=folder,
            n=len(kept),
            n_seen=int(self.loaded.sum()),
            failed=self.failed,
            lowest=float(self.values[kept[-1]]),
            highest=float(self.values[kept[0]]),
        )


def _scores(
    model: VisionModel,
    source: ImageSource,
    targets: Sequence[Target],
    max_failed: float,
    settings: PassSettings,
) -> _Scores:
    """Score every image."""
    readers = [_reader(model, target) for target in targets]
    n_latents = sum(len(target.chosen or ()) for target in targets)
    scores = _Scores(np.zeros(len(source)), np.zeros(len(source), bool))
    with ImagePass(model, source, "curate", settings, max_failed=max_failed) as seen:
        for batch in seen:
            total = torch.zeros(len(batch.indices), dtype=torch.float64)
            for read in readers:
                total += read(batch.pixels)
            if not bool(total.isfinite().all()):
                raise SparsightError(f"{model.id}: activations on {source.spec} are not finite.")
            scores.values[batch.indices] = (total / n_latents).numpy()
            scores.loaded[batch.indices] = True
    return scores


def _reader(model: VisionModel, target: Target) -> Callable[[Tensor], Float[Tensor, " batch"]]:
    """Return a function from pixels to the sum of a target's latents, each in its own unit."""
    about, chosen = target.table.about, list(target.chosen or ())
    statistic: Any = "max" if about["statistic"].startswith("max") else "mean"
    unit = np.abs(target.table.mean["attacked"][chosen])
    weight = torch.from_numpy(np.divide(1.0, unit, out=np.zeros_like(unit), where=unit > 0))
    reduce = latent_reducer(model, target.sae, target.table.site, about["tokens"], statistic)

    def read(pixels: Tensor) -> Tensor:
        value, _ = reduce(pixels)
        return value.cpu().double()[:, chosen] @ weight

    return read


def _own_captions(
    source: ImageSource, kept: Sequence[int], captions: Captions, sentence: str
) -> list[list[str]]:
    """Return the captions of each image, or its label in a sentence.

    Raises:
        UserError: an image has none.
    """
    infos = [source.known(i) for i in kept]
    without = sum(not (info.captions if captions == "own" else info.label) for info in infos)
    if without:
        lacks = "captions" if captions == "own" else "labels"
        raise UserError(
            f"{source.spec}: {without:,} of the {len(infos):,} images to keep have no {lacks}. "
            "Choose captions 'zero-shot' or 'opinion'."
        )
    if captions == "own":
        return [list(info.captions) for info in infos]
    names = names_by_label([info.label or "" for info in infos], None)
    return [[sentence.replace("{}", names[info.label or ""])] for info in infos]


def _embedded(
    model: VisionModel, source: ImageSource, kept: Sequence[int], settings: PassSettings
) -> Float[Tensor, "kept d_embed"]:
    """Embed the images to keep.

    Raises:
        SparsightError: an image does not load any more.
    """
    parts = []
    settings = PassSettings(settings.batch_size, 0)
    with ImagePass(model, source, settings=settings, indices=kept) as seen:
        for batch in seen.batches():
            for index, reason in batch.failures:
                raise _gone(source.known(index).uri, reason)
            parts.append(model.embed_images(batch.pixels).cpu())
    return torch.cat(parts)


def _zero_shot_captions(
    model: VisionModel,
    source: ImageSource,
    embedded: Float[Tensor, "kept d_embed"],
    sentence: str,
    class_names: Sequence[str] | None,
) -> list[list[str]]:
    """Return a sentence with the likeliest class of each image.

    Raises:
        UserError: there are no classes.
    """
    classes = list(names_by_label(source.labels(), class_names).values())
    if not classes:
        raise UserError(
            f"{source.spec}: has no labels, so zero-shot captions need class names. Give them."
        )
    weights = classifier_weights(model, classes, sentence).cpu()
    best = classify(embedded, weights).argmax(dim=1)
    return [[sentence.replace("{}", classes[int(place)])] for place in best]


def _gone(uri: str, reason: str) -> SparsightError:
    return SparsightError(f"{uri}: was read a moment ago, but cannot be read any more ({reason}).")


def _write(
    folder: Path,
    source: ImageSource,
    kept: Sequence[int],
    scores: _Scores,
    captions: Sequence[Sequence[str]],
    about: dict[str, Any],
) -> None:
    lines = []
    (folder / "images").mkdir()
    with tarfile.open(folder / SHARD, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, (index, said) in enumerate(zip(kept, captions, strict=True)):
            key, info = f"{number:05d}", source.known(index)
            record = _record(info, said, float(scores.values[index]))
            try:
                png = _png(source.load(index))
            except ImageError as error:
                raise _gone(info.uri, error.reason) from error
            (folder / "images" / f"{key}.png").write_bytes(png)
            lines.append(json.dumps({"file_name": f"images/{key}.png", **record}))
            _add(tar, f"{key}.png", png)
            _add(tar, f"{key}.txt", said[0].encode())
            _add(tar, f"{key}.json", json.dumps(record).encode())
    write_text(folder / METADATA, "\n".join(lines) + "\n")
    rank = np.full(len(source), -1, np.int64)
    rank[list(kept)] = np.arange(len(kept))
    table = pa.table(
        {
            "image": [source.known(i).id for i in range(len(source))],
            "score": pa.array(scores.values, mask=~scores.loaded),
            "rank": pa.array(rank, mask=rank < 0),
        }
    )
    with atomic_path(folder / SCORES) as temporary:
        pq.write_table(table, temporary)
    write_json(folder / MANIFEST, about)


def _record(info: ImageInfo, captions: Sequence[str], score: float) -> dict[str, Any]:
    record: dict[str, Any] = {"caption": list(captions) if len(captions) > 1 else captions[0]}
    if info.label is not None:
        record["label"] = info.label
    return {**record, "score": score, "id": info.id, "uri": without_folders(info.uri)}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # Lossless: JPEG's artefacts at the edges of letters are not part of the attack.
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a member whose bytes do not depend on the time of writing."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _about(
    model: VisionModel,
    source: ImageSource,
    targets: Sequence[Target],
    captions: Captions,
    n: int,
    failed: int,
) -> dict[str, Any]:
    """Return the manifest of a set. Sets are shared, so folders, which may name people, are cut."""
    return {
        "format_version": FORMAT_VERSION,
        "model": {
            "id": without_folders(model.id),
            "revision": model.revision,
            "weights_hash": model.weights_hash,
        },
        "targets": [_describe(target) for target in targets],
        "images": {
            "spec": without_folders(source.spec),
            "fingerprint": source.fingerprint(),
            "n": len(source),
        },
        "captions": captions,
        "n": n,
        "failed": failed,
        "score": "mean over latents of activation / mean activation on attacked images",
    }


def _describe(target: Target) -> dict[str, Any]:
    about = target.table.about
    return {
        "site": target.table.site,
        "tokens": about["tokens"],
        "unit": about["unit"],
        "chosen": list(target.chosen or ()),
        "statistic": about["statistic"],
        "contrast": about["contrast"],
        "sae": about["sae"],
    }
