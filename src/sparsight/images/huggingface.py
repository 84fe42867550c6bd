"""A Hugging Face data set, saved on disk or from the Hub (extra `datasets`)."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

from PIL import Image

from sparsight.errors import MissingExtra, UserError
from sparsight.images.columns import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    as_captions,
    as_label,
    find_column,
    left_out,
)
from sparsight.images.decoding import decode_image, read_image_file
from sparsight.images.parquet import image_bytes
from sparsight.images.source import ImageInfo, ImageSource
from sparsight.text import without_surrogates


class HuggingFaceImages(ImageSource):
    """One split of a data set: a folder written by `save_to_disk`, or a name on the Hub.

    `ClassLabel` numbers are replaced by their names. The id is `SPLIT/ROW`.

    Args:
        name: a folder or a Hub name.
        split: name of the split; None takes the only one, or `train` if there are several.

    Raises:
        MissingExtra: `datasets` is not installed.
        UserError: the data set or split does not exist, has no rows, or has no column of images.
    """

    def __init__(self, name: str, split: str | None = None) -> None:
        try:
            import datasets
        except ImportError:
            raise MissingExtra("the datasets library", "datasets") from None
        folder = Path(name)
        if folder.is_dir():
            name = str(folder.absolute())
        loaded = _load(datasets, name, split)
        if isinstance(loaded, dict):
            others = {other: len(rows) for other, rows in loaded.items()}
            asked, split = split, _choose_split(name, list(loaded), split)
            del others[split]
            if asked is None and others:
                sizes = ", ".join(f"{other} ({n:,})" for other, n in others.items())
                self.notes = (f"The split {split} is read; left out: {sizes}.",)
            loaded = loaded[split]
        elif split is not None and folder.is_dir():
            raise UserError(f"hf:{name}: is one split, not several; leave ':{split}' out.")
        self.split = split
        self.spec = without_surrogates(f"hf:{name}" + (f":{split}" if split else ""))
        if len(loaded) == 0:
            raise UserError(f"{self.spec}: holds no rows.")
        features = loaded.features
        self._image_column = _image_column(datasets, self.spec, features)
        rest = [column for column in features if column != self._image_column]
        self._label_column = find_column(rest, LABEL_COLUMNS)
        self._caption_column = find_column(rest, CAPTION_COLUMNS)
        read = ((self._label_column, LABEL_COLUMNS), (self._caption_column, CAPTION_COLUMNS))
        self.notes = (*self.notes, *left_out(rest, *read))
        label_feature: Any = features.get(self._label_column) if self._label_column else None
        is_class = isinstance(label_feature, datasets.ClassLabel)
        self._class_names: list[str] | None = list(label_feature.names) if is_class else None
        self._fingerprint = str(loaded._fingerprint)
        without_decoding = loaded.cast_column(self._image_column, datasets.Image(decode=False))
        self._encoded = without_decoding.select_columns([self._image_column])
        texts = [column for column in (self._label_column, self._caption_column) if column]
        self._texts = without_decoding.select_columns(texts) if texts else None

    def __len__(self) -> int:
        return len(self._encoded)

    def info(self, index: int) -> ImageInfo:
        """See `ImageSource.info`."""
        cells: dict[str, Any] = {}
        self._check_index(index)
        if self._texts is not None:
            cells = self._texts[index]
        return ImageInfo(
            id=f"{self.split or 'all'}/{index:06d}",
            uri=f"{self.spec}[{index}]",
            label=as_label(cells.get(self._label_column or ""), self._class_names),
            captions=as_captions(cells.get(self._caption_column or "")),
        )

    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        """See `ImageSource.load`."""
        cell = self._encoded[self._check_index(index)][self._image_column]
        if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
            return decode_image(read_image_file(Path(cell["path"])), min_side)
        return decode_image(image_bytes(cell), min_side)

    def fingerprint(self) -> str:
        """Hash the fingerprint that `datasets` keeps, and the number of rows."""
        return hashlib.sha256(f"{self._fingerprint}\0{len(self)}".encode()).hexdigest()

    def labels(self) -> list[str]:
        """See `ImageSource.labels`; reads only the label column."""
        if self._texts is None or self._label_column is None:
            return []
        found = {
            as_label(value, self._class_names) for value in self._texts.unique(self._label_column)
        }
        return sorted(label for label in found if label is not None)


def _load(datasets: Any, name: str, split: str | None) -> Any:
    folder = Path(name)
    try:
        if folder.is_dir():
            return datasets.load_from_disk(name)
        # Before version 4, datasets ran a script that came with the images, if that was allowed.
        may_run = "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters
        options = {"trust_remote_code": False} if may_run else {}
        return datasets.load_dataset(name, split=split, **options)
    except Exception as error:  # datasets and the Hub client raise dozens of exception types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        where = "a folder written by save_to_disk" if folder.is_dir() else "a folder or a Hub name"
        raise UserError(
            f"hf:{name}: cannot be opened as {where} ({type(error).__name__}: {reason})."
        ) from error


def _choose_split(name: str, splits: list[str], wanted: str | None) -> str:
    if wanted is None and len(splits) == 1:
        return splits[0]
    chosen = wanted or "train"
    if chosen not in splits:
        raise UserError(
            f"hf:{name}: has no split {chosen!r}. Name one of them: "
            + ", ".join(f"hf:{name}:{split}" for split in splits)
        )
    return chosen


def _image_column(datasets: Any, spec: str, features: Any) -> str:
    image_columns = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    column = find_column(image_columns, IMAGE_COLUMNS) or next(iter(image_columns), None)
    if column is None:
        found = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in features.items())
        raise UserError(f"{spec}: no column of type Image; found {found}.")
    return column
