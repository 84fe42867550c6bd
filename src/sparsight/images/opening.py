"""`open_images`: one text says where the images are."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sparsight.config import check_seed
from sparsight.errors import SparsightError, UserError
from sparsight.images.calibration import DEFAULT_SCENES, CalibrationImages
from sparsight.images.difference import images_difference
from sparsight.images.folder import FolderImages
from sparsight.images.huggingface import HuggingFaceImages
from sparsight.images.parquet import ParquetImages
from sparsight.images.selection import (
    SELECTION_FORM,
    Sample,
    parse_selection,
    split_sample,
    split_selection,
)
from sparsight.images.source import ImageSource
from sparsight.images.tar_shards import TarShardImages
from sparsight.images.writing import parse_written, written
from sparsight.plugins import SOURCE_PLUGINS, Plugin, plugin_named, usable_plugins
from sparsight.text import path_of

KINDS = (
    "a folder, 'webdataset:PATH-{000..127}.tar', 'parquet:FILE-or-FOLDER', 'hf:NAME[:SPLIT]', "
    "'calibration[:N[:SEED[:single]]]', or 'written:KIND?of=SOURCE'"
)


def open_images(spec: str | Path | ImageSource, *, table: str | Path | None = None) -> ImageSource:
    """Open a source of images.

    Args:
        spec: one of

            - `photos/`: a folder tree, sub-folder = label. `photos/?table=labels.csv` is the same
              as `table="labels.csv"`.
            - `webdataset:shards-{000..127}.tar`: local tar shards (a plain `x.tar` will do).
            - `parquet:FILE-or-FOLDER`: Parquet with encoded images (a plain `x.parquet` will do).
            - `hf:PATH[:SPLIT]`, `hf:NAME[:SPLIT]`: a Hugging Face data set saved on disk, or from
              the Hub (extra `datasets`).
            - `calibration[:N[:SEED[:single]]]`: N (default 10,000) rendered scenes (seed 0), with
              `single` those of one object and no word.
            - `written:KIND?of=SOURCE&size=0.2`: another source with words on its labelled images
              (`WrittenImages`); values after `=` are escaped as in a web address.
            - `KIND:…` of a kind that another package registers (docs/extending.md).

            Each may end in a selection (`[0:100]`, `[::4]`, `[-100:]`, `[0:1000:10,2000]`) and in a
            seeded random sample (`?sample=1000&seed=0`), or a stratified one in which each label
            keeps its share (`?sample=1000&by=label&seed=0`). With a table:
            `photos/?table=labels.csv&sample=9`. Several are applied from left to right. A `Path` is
            opened exactly as it is; blanks around a text are ignored, unless a file of that name
            exists. An `ImageSource` is returned unchanged.
        table: CSV, text, JSON-lines or Parquet file with labels and captions of a folder's images.

    Raises:
        UserError: nothing of that kind is there; the message says what to try.
    """
    if isinstance(spec, ImageSource):
        if table is not None:
            raise UserError("table= goes with a folder, not with an open ImageSource.")
        return spec
    text = str(spec) if isinstance(spec, Path) or _is_there(str(spec)) else spec.strip()
    if not text:
        raise UserError(f"No images named. Expected {_kinds()}.")
    if isinstance(spec, Path) and os.path.lexists(path_of(spec)):
        return _open_path(spec, table)
    return _open(text, table)


def reopen_images(
    spec: str,
    fingerprint: str,
    made: str,
    n_images: int | None = None,
    ids: Callable[[], Sequence[str]] | None = None,
) -> ImageSource:
    """Open the images that something was made from, and check that they have not changed.

    Args:
        spec: the spec that they had then.
        fingerprint: the fingerprint that the source had then.
        made: what was made from the images, for the message.
        n_images: how many images there were then, if known.
        ids: returns the ids of the first images, if known.

    Raises:
        UserError: the images are no longer there, or have changed.
    """
    try:
        images = open_images(spec)
    except SparsightError as error:
        raise UserError(
            f"{made}: the images that it was made from cannot be opened: {error} The images "
            f"themselves are needed here. Bring them back to {spec}, or put a link there."
        ) from error
    if images.fingerprint() != fingerprint:
        how = ""
        if n_images is not None:
            how = f": {images_difference(images, n_images, ids() if ids is not None else ())}"
        raise UserError(f"{images.spec}: the images have changed since {made} was made{how}.")
    return images


def _open(text: str, table: str | Path | None) -> ImageSource:
    """Open a spec: each part applies to everything on its left."""
    kind = text.partition(":")[0]
    if kind not in OPENERS and _is_there(text):
        return _open_whole(text, table)
    rest, parts = split_selection(text)
    if parts is not None and not _exists(text.partition(":")[2]):
        source = _open_left(rest, table, text, parts)
        return source.select(parse_selection(parts, len(source), text))
    # In the inner source's spec, the first "?" and each "&" begin an option of that source.
    if kind != "written" or text.count("?") > 1:
        rest, sample = split_sample(text, "?" if kind == "written" else "?&")
        if sample is not None:
            return _sampled(_open(rest, table), sample)
    return _open_whole(text, table)


def _open_left(rest: str, table: str | Path | None, text: str, parts: str) -> ImageSource:
    """Open what precedes a selection; brackets that hold anything else may belong to a name."""
    try:
        return _open(rest, table)
    except UserError:
        if re.search(r"[^0-9:,\s-]", parts):
            return _open_whole(text, table)
        raise


def _sampled(source: ImageSource, sample: Sample) -> ImageSource:
    """Draw a sample from a source that was opened for it; note if it has fewer images."""
    if sample.n > len(source):
        note = f"A sample of {sample.n:,} was asked for; all {len(source):,} images are taken."
        source.notes = (*source.notes, note)
    return source.sample(sample.n, sample.seed, by_label=sample.by_label)


def _is_there(text: str) -> bool:
    """Return whether the text, as it is, names a path, or a path with a table."""
    folder, mark, table = text.partition("?table=")
    return _exists(text) or bool(mark and _exists(folder) and _exists(table))


def _exists(text: str) -> bool:
    return bool(text) and os.path.exists(path_of(text))  # noqa: PTH110 - False for a text too long


def _open_whole(text: str, table: str | Path | None) -> ImageSource:
    kind = text.partition(":")[0]
    if kind in OPENERS:
        _refuse_table(table, text)
        return OPENERS[kind](text)
    plugin = None if kind == text or _is_there(text) else plugin_named(SOURCE_PLUGINS, kind)
    if plugin is not None:
        _refuse_table(table, text)
        return _open_outside(plugin, text)
    folder, mark, named = text.partition("?table=")
    if mark and table is None and not _exists(text):
        return _open_path(Path(folder), named)
    return _open_path(Path(text), table)


def _open_outside(plugin: Plugin, text: str) -> ImageSource:
    """Open a source of another package.

    Raises:
        SparsightError: the package fails, or gives something else than a source.
    """
    source = plugin.call(text)
    if not isinstance(source, ImageSource):
        raise plugin.fault(f"gave {type(source).__name__}, which is no ImageSource, for {text}")
    return source


def open_webdataset(text: str) -> ImageSource:
    """Open `webdataset:PATH-{000..127}.tar`."""
    return TarShardImages(_after_kind(text))


def open_parquet(text: str) -> ImageSource:
    """Open `parquet:FILE-or-FOLDER`."""
    return ParquetImages(path_of(_after_kind(text)).expanduser())


def open_hf(text: str) -> ImageSource:
    """Open `hf:NAME[:SPLIT]`."""
    rest = _after_kind(text)
    if path_of(rest).is_dir():
        return HuggingFaceImages(str(path_of(rest)))
    name, colon, split = rest.rpartition(":")
    return HuggingFaceImages(name, split) if colon and name else HuggingFaceImages(rest)


def open_written(text: str) -> ImageSource:
    """Open `written:KIND?of=SOURCE`."""
    inner, kind, style, options = parse_written(text)
    n, by_label = options.pop("sample", None), options.pop("by_label", False)
    source = written(open_images(inner), kind, style, **options)
    return source if n is None else _sampled(source, Sample(n, source.seed, by_label))


def _after_kind(text: str) -> str:
    kind, _, rest = text.partition(":")
    if not rest:
        raise UserError(f"{text!r}: nothing after {kind!r}. Expected {_kinds()}.")
    return rest


def _open_path(path: Path, table: str | Path | None) -> ImageSource:
    path = path_of(path.expanduser())
    if path.is_dir():
        named = path_of(Path(table).expanduser()) if table is not None else None
        return FolderImages(path, named)
    _refuse_table(table, str(path))
    if path.suffix.lower() == ".parquet":
        return ParquetImages(path)
    if path.suffix.lower() == ".tar":
        return TarShardImages(str(path))
    if path.exists():
        raise UserError(f"{path}: is a file. Expected {_kinds()}.")
    brackets = f" A selection ends the text, e.g. {SELECTION_FORM}." if "[" in path.name else ""
    raise UserError(
        f"{path}: no such folder, and no other kind of source. Expected {_kinds()}.{brackets}"
    )


def open_calibration(text: str) -> CalibrationImages:
    """Open `calibration[:N[:SEED[:single]]]`."""
    match = re.fullmatch(r"calibration(?::([0-9]{1,18})(?::([0-9]{1,20})(:single)?)?)?", text)
    if match is None:
        raise UserError(
            f"{text!r}: expected 'calibration', 'calibration:N', 'calibration:N:SEED' or "
            "'calibration:N:SEED:single'."
        )
    n_scenes = int(match[1]) if match[1] else DEFAULT_SCENES
    if n_scenes == 0:
        raise UserError(f"{text!r}: the number of scenes must be 1 or more.")
    check_seed(seed := int(match[2] or 0))
    return CalibrationImages(n_scenes, seed, single=match[3] is not None)


def _refuse_table(table: str | Path | None, spec: str) -> None:
    if table is not None:
        raise UserError(f"{spec}: table= goes with a folder of images only.")


def _kinds() -> str:
    """Everything that opens, for messages."""
    outside = [f"'{name}:…'" for name in usable_plugins(SOURCE_PLUGINS, OPENERS)]
    return KINDS if not outside else f"{KINDS}, or of other packages {', '.join(outside)}"


OPENERS: Mapping[str, Callable[[str], ImageSource]] = {
    "webdataset": open_webdataset,
    "parquet": open_parquet,
    "hf": open_hf,
    "calibration": open_calibration,
    "written": open_written,
}
"""By the word before the colon, which never stands for a folder; a folder of that name is written
`./calibration`. Other packages add to these, see `sparsight.plugins`."""
