"""Which cosine tells near-duplicate images from different ones: planted copies of 50 images.

    python benchmarks/duplicates.py RUN

RUN has an index with pooled or joint embeddings. Each of 50
images is changed in known ways, and embedded as the index embeds images. A copy is found if its
cosine with the original is at least the threshold. The closest images of the collection are listed
below, so that a person can see which of them repeat each other.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import torch
from PIL import Image

from sparsight.latents import LatentIndex
from sparsight.latents.duplicates import THRESHOLDS, first_of_kind
from sparsight.vision import VisionModel, load_model

N_IMAGES = 50
Photo = Image.Image


def jpeg(quality: int) -> Callable[[Photo], Photo]:
    """Return a function that compresses an image as JPEG."""

    def compressed(image: Photo) -> Photo:
        data = io.BytesIO()
        image.save(data, "JPEG", quality=quality)
        return Image.open(io.BytesIO(data.getvalue())).convert("RGB")

    return compressed


def halved(image: Photo) -> Photo:
    """Return an image at half its size."""
    size = (max(1, image.width // 2), max(1, image.height // 2))
    return image.resize(size, Image.Resampling.BICUBIC)


def cropped(share: float) -> Callable[[Photo], Photo]:
    """Return a function that cuts a share of the size off each side."""

    def inner(image: Photo) -> Photo:
        x, y = round(share * image.width), round(share * image.height)
        return image.crop((x, y, image.width - x, image.height - y))

    return inner


CHANGES: dict[str, Callable[[Photo], Photo]] = {
    "JPEG 90": jpeg(90),
    "JPEG 75": jpeg(75),
    "JPEG 50": jpeg(50),
    "JPEG 25": jpeg(25),
    "half the size": halved,
    "cropped by 2 % on each side": cropped(0.02),
    "cropped by 5 % on each side": cropped(0.05),
    "10 % brighter": lambda image: image.point(lambda value: min(255, int(value * 1.1))),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def main() -> None:
    """Print a table of the changes, and the images that nearly repeat another."""
    index = LatentIndex.open(sys.argv[1])
    embeddings = index.embeddings
    threshold = THRESHOLDS[embeddings.kind]
    model: VisionModel = load_model(index.manifest["model"]["id"], device="cpu")
    random = torch.Generator().manual_seed(1)
    rows = torch.randperm(len(embeddings), generator=random)[:N_IMAGES].tolist()
    photos = [index.picture(int(embeddings.places[row])).convert("RGB") for row in rows]
    print(f"| change | least cosine | median | found at {threshold} |\n|---|---|---|---|")
    for name, change in CHANGES.items():
        copies = torch.stack([embeddings.embed_photo(change(photo), model) for photo in photos])
        unit = torch.nn.functional.normalize(copies, dim=1)
        cosine = (unit * embeddings.matrix[rows].float()).sum(1)
        found = float((cosine >= threshold).float().mean())
        print(f"| {name} | {cosine.min():.3f} | {cosine.median():.3f} | {found:.0%} |")
    first = first_of_kind(embeddings.matrix, threshold - 0.02)
    repeats = (first != torch.arange(len(first))).nonzero()[:, 0]
    cosine = (embeddings.matrix[repeats].float() * embeddings.matrix[first[repeats]].float()).sum(1)
    print(f"\nClosest images of {len(first):,}:\n")
    for place in cosine.argsort(descending=True).tolist():
        pair = (repeats[place], first[repeats[place]])
        ids = (index.info(int(embeddings.places[row])).id for row in pair)
        print(f"{cosine[place]:.3f}", *ids)


if __name__ == "__main__":
    main()
