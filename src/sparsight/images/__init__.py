"""Where images come from: folders, tar shards, Parquet, Hugging Face data sets, rendered scenes;
and any of them with words written on.

Builds on `sparsight.calibration` (for the rendered scenes) and Pillow alone; knows no model.
Start at `open_images` (opening.py), then `ImageSource` (source.py) and `load_batches` (loading.py).
"""

from __future__ import annotations

from sparsight.images.calibration import CalibrationImages
from sparsight.images.decoding import ImageError, decode_image
from sparsight.images.folder import FolderImages
from sparsight.images.huggingface import HuggingFaceImages
from sparsight.images.lettering import TextStyle, write_on_image
from sparsight.images.loading import ImageBatch, load_batches
from sparsight.images.opening import open_images, reopen_images
from sparsight.images.parquet import ParquetImages
from sparsight.images.selection import sample_places, whole_spec
from sparsight.images.source import ImageInfo, ImageSource, SelectedImages
from sparsight.images.tar_shards import TarShardImages
from sparsight.images.writing import WorldBand, WrittenImages, WrittenScenes, written

__all__ = [
    "CalibrationImages",
    "FolderImages",
    "HuggingFaceImages",
    "ImageBatch",
    "ImageError",
    "ImageInfo",
    "ImageSource",
    "ParquetImages",
    "SelectedImages",
    "TarShardImages",
    "TextStyle",
    "WorldBand",
    "WrittenImages",
    "WrittenScenes",
    "decode_image",
    "load_batches",
    "open_images",
    "reopen_images",
    "sample_places",
    "whole_spec",
    "write_on_image",
    "written",
]
