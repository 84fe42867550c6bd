"""What a person searches by: a text or an image file, checked before anything slow begins."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from sparsight.errors import UserError
from sparsight.images import ImageError, decode_image
from sparsight.images.decoding import read_image_file
from sparsight.vision.model import VisionModel

SEARCH_INSTEAD = "Search by an image (--image FILE), or use a CLIP or SigLIP."


def check_texts(model: VisionModel, instead: str = SEARCH_INSTEAD) -> None:
    """Check that texts can be compared with a model's images.

    Args:
        model: the model.
        instead: what to do if they cannot, as a sentence.

    Raises:
        UserError: the model has no joint space of images and texts, or no text tower.
    """
    if not (model.has_joint_space and model.has_text):
        lacks = "text tower" if model.has_joint_space else "joint space of images and texts"
        raise UserError(
            f"{model.id} ({model.family}) has no {lacks}, so texts cannot be compared with its "
            f"images. {instead}"
        )


def check_query(model: VisionModel, query: str) -> None:
    """Check that a model's images can be searched by a given text.

    Raises:
        UserError: see `check_texts`; or the text is empty or too long.
    """
    if not query.strip():
        raise UserError("The query is empty. Give a text or an image.")
    check_texts(model)
    count, most = model.count_tokens([query])[0], model.context_length
    if count > most:
        raise UserError(
            f"The query has {count} tokens, but {model.id} only takes {most}, start and end "
            "included. Shorten it."
        )


def read_query(path: Path, min_side: int | None = None) -> Image.Image:
    """Read the image file to search by.

    Args:
        path: the file.
        min_side: the model's, so that the query is decoded like the collection.

    Raises:
        UserError: the file does not exist, or is not an image that can be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: this image file does not exist.")
    try:
        return decode_image(read_image_file(path), min_side)
    except ImageError as error:
        raise UserError(f"{path}: cannot be read as an image ({error.reason}).") from error
