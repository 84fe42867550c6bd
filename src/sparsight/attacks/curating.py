"""The pictures of a collection that drive text-salient latents most, as a set to train or test on.

On disk, a folder that `open_images` reads with captions and labels:

- `images/00000.png`, …: the pictures, the strongest first;
- `metadata.jsonl`: of each its caption, label, score and where it came from;
- `scores.parquet`: the score of every picture of the collection, kept or not;
- `attack.tar`: the kept ones as a WebDataset shard;
- `manifest.json`: model, SAE, site, latents, collection, and how captions were made.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from sparsight.attacks.causal import Target
from sparsight.attacks.opinion import clip_opinion
from sparsight.attacks.salience import latent_reducer
from sparsight.config import check_positive
from sparsight.editing.interventions import check_belongs
from sparsight.errors import SparsightError, UserError
from sparsight.files import atomic_path, write_json, write_text
from sparsight.folders import new_folder
from sparsight.images import ImageError, ImageInfo, ImageSource, load_batches
from sparsight.progress import progress
from sparsight.redaction import without_folders
from sparsight.vision import VisionModel, classifier_weights, classify, names_by_label

Captions = Literal["own", "labels", "zero-shot", "opinion"]
"""The source's own; its labels in a sentence; the likeliest class in one; what CLIP would say."""

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
    """What `curate` wrote.

    Attributes:
        folder: where.
        n: pictures in it.
        n_seen: pictures of the collection that were scored.
        failed: pictures that did not load.
        lowest: score of the weakest picture kept.
        highest: and of the strongest.
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
    """Write the pictures that drive latents most, with captions.

    The score of a picture is the mean over latents of its activation (the mean or the maximum over
    positions, whichever the latents were found by) in units of the latent's own mean on attacked
    pictures: 1 is what an attacked picture has on average.

    Args:
        model: the one that the latents were found in.
        source: any pictures; labels are needed for captions `labels` alone.
        targets: what was found, at one site or several.
        out: folder to write; it must not be there yet.
        n: how many pictures to keep, at most; none that activates no latent.
        captions: where they come from.
        sentence: what a label or class stands in; {} is its place.
        class_names: classes for captions `zero-shot`; default the labels of `source`.
        words: of captions `opinion`.
        max_failed: share of pictures that may be broken.
        seed: of the search for opinions.
        check: make sure that SAEs are of this model and site.
        batch_size: pictures at a time.
        workers: processes that decode.
        quiet: no progress line.

    Raises:
        UserError: the folder is there; captions that cannot be had; no picture drives the latents.
        SparsightError: more pictures are broken than `max_failed` allows, or the disk is full.
    """
    out = Path(out)
    given = [targets] if isinstance(targets, Target) else list(targets)
    _check(given, n, captions, sentence, source)
    for target in given:
        if target.sae is not None:
            check_belongs(target.sae, model, target.table.site, strict=check)
    with new_folder(out) as staged:
        scores, loaded = _scores(
            model, source, given, batch_size=batch_size, workers=workers, quiet=quiet
        )
        failed = int((~loaded).sum())
        if failed > max_failed * len(source):
            raise SparsightError(
                f"{source.spec}: {failed:,} of {len(source):,} pictures could not be loaded, more "
                f"than {max_failed:.1%}."
            )
        order = np.argsort(-scores, kind="stable")
        kept = [int(i) for i in order if scores[i] != 0][:n]
        if not kept:
            raise UserError(
                f"{source.spec}: not one of {len(source):,} pictures activates any of the "
                f"{sum(len(t.chosen or ()) for t in given):,} latents. Take other pictures."
            )
        said = _captions(
            model, source, kept, captions, sentence, class_names, words, seed, batch_size
        )
        about = {
            "format_version": FORMAT_VERSION,
            "model": {
                "id": without_folders(model.id),
                "revision": model.revision,
                "weights_hash": model.weights_hash,
            },
            "targets": [_describe(target) for target in given],
            # A set is made to be handed on: paths name people.
            "images": {
                "spec": without_folders(source.spec),
                "fingerprint": source.fingerprint(),
                "n": len(source),
            },
            "captions": captions,
            "n": len(kept),
            "failed": failed,
            "score": "mean over latents of activation / mean activation on attacked pictures",
        }
        _write(staged, source, kept, scores, loaded, said, about)
    return CuratedSet(
        folder=out,
        n=len(kept),
        n_seen=int(loaded.sum()),
        failed=failed,
        lowest=float(scores[kept[-1]]),
        highest=float(scores[kept[0]]),
    )


def _check(
    targets: Sequence[Target], n: int, captions: str, sentence: str, source: ImageSource
) -> None:
    if not targets:
        raise UserError("Nothing to curate by: no target was given.")
    check_positive(n=n)
    if captions not in get_args(Captions):
        raise UserError(f"captions is {captions!r}; expected {', '.join(get_args(Captions))}.")
    if "{}" not in sentence:
        raise UserError(f"The sentence {sentence!r} has no {{}} for the class name.")


def _scores(
    model: VisionModel,
    source: ImageSource,
    targets: Sequence[Target],
    *,
    batch_size: int,
    workers: int | None,
    quiet: bool,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Of every picture; 0 and False where it does not load."""
    readers = []
    for target in targets:
        about, chosen = target.table.about, list(target.chosen or ())
        statistic: Any = "max" if about["statistic"].startswith("max") else "mean"
        unit = np.abs(target.table.mean["attacked"][chosen])
        weight = torch.from_numpy(np.divide(1.0, unit, out=np.zeros_like(unit), where=unit > 0))
        read = latent_reducer(model, target.sae, target.table.site, about["tokens"], statistic)
        readers.append((read, torch.tensor(chosen), weight))
    n_latents = sum(len(columns) for _, columns, _ in readers)
    scores = np.zeros(len(source))
    loaded = np.zeros(len(source), bool)
    with progress("curate", len(source), "images", quiet=quiet) as line:
        for batch in load_batches(
            source, model.transform, batch_size, workers=workers, min_side=model.min_side
        ):
            line.advance(len(batch.indices) + len(batch.failures))
            if not batch.indices:
                continue
            total = torch.zeros(len(batch.indices), dtype=torch.float64)
            for read, columns, weight in readers:
                value, _ = read(batch.pixels)
                total += value.cpu().double()[:, columns] @ weight
            if not bool(total.isfinite().all()):
                raise SparsightError(f"{model.id}: activations on {source.spec} are not finite.")
            scores[batch.indices] = (total / n_latents).numpy()
            loaded[batch.indices] = True
    return scores, loaded


def _captions(
    model: VisionModel,
    source: ImageSource,
    kept: Sequence[int],
    captions: Captions,
    sentence: str,
    class_names: Sequence[str] | None,
    words: int,
    seed: int,
    batch_size: int,
) -> list[list[str]]:
    """One list a picture that is kept.

    Raises:
        UserError: they cannot be had.
    """
    infos = [source.known(i) for i in kept]
    if captions in ("own", "labels"):
        without = sum(not (info.captions if captions == "own" else info.label) for info in infos)
        if without:
            what = "captions" if captions == "own" else "labels"
            raise UserError(
                f"{source.spec}: {without:,} of the {len(kept):,} pictures to be kept have no "
                f"{what}. Take captions from zero-shot classes or from opinion."
            )
        if captions == "own":
            return [list(info.captions) for info in infos]
        names = names_by_label([info.label or "" for info in infos], None)
        return [[sentence.replace("{}", names[info.label or ""])] for info in infos]
    parts = []
    for batch in load_batches(
        source, model.transform, batch_size, indices=kept, workers=0, min_side=model.min_side
    ):
        for index, reason in batch.failures:
            raise _gone(source.known(index).uri, reason)
        parts.append(model.embed_images(batch.pixels).cpu())
    embedded = torch.cat(parts)
    if captions == "opinion":
        return [[each.text] for each in clip_opinion(model, embedded, words=words, seed=seed)]
    classes = list(names_by_label(source.labels(), class_names).values())
    if not classes:
        raise UserError(
            f"{source.spec}: has no labels, so zero-shot captions need class names. Name some."
        )
    weights = classifier_weights(model, classes, sentence).cpu()
    best = classify(embedded, weights).argmax(dim=1)
    return [[sentence.replace("{}", classes[int(place)])] for place in best]


def _gone(uri: str, reason: str) -> SparsightError:
    return SparsightError(f"{uri}: was there a moment ago, and cannot be read now ({reason}).")


def _write(
    folder: Path,
    source: ImageSource,
    kept: Sequence[int],
    scores: npt.NDArray[np.float64],
    loaded: npt.NDArray[np.bool_],
    captions: Sequence[Sequence[str]],
    about: dict[str, Any],
) -> None:
    lines = []
    (folder / "images").mkdir()
    with tarfile.open(folder / SHARD, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, (index, said) in enumerate(zip(kept, captions, strict=True)):
            key, info = f"{number:05d}", source.known(index)
            record = _record(info, said, float(scores[index]))
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
    rank = np.full(len(scores), -1, np.int64)
    rank[list(kept)] = np.arange(len(kept))
    table = pa.table(
        {
            "image": [source.known(i).id for i in range(len(scores))],
            "score": pa.array(scores, mask=~loaded),
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
    # Lossless: what JPEG does to the edges of letters is no part of the attack.
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member that is the same whenever it is written."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


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
