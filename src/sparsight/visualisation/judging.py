"""How strongly a latent is active on an image, also after changes that optimising never saw."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from sparsight.errors import UserError
from sparsight.latents import LatentIndex, seen_pictures
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel
from sparsight.vision.tokens import Tokens
from sparsight.visualisation.colours import Levels

SHIFT = 1 / 16
JPEG_QUALITY = 75
SHRUNK = 0.75

BATCH = 8
"""Images that the model sees at a time."""


def shifted(image: Image.Image) -> Image.Image:
    """Shift an image right and down by 1/16 of its side, rounded up; edges are repeated."""
    levels = np.asarray(image)
    down, right = (max(1, round(SHIFT * side)) for side in levels.shape[:2])
    padded = np.pad(levels, ((down, 0), (right, 0), (0, 0)), mode="edge")
    return Image.fromarray(padded[: levels.shape[0], : levels.shape[1]])


def compressed(image: Image.Image) -> Image.Image:
    """Save an image as a JPEG of quality 75 and read it again."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return Image.open(file).convert("RGB")


def shrunk(image: Image.Image) -> Image.Image:
    """Shrink an image to three quarters of its side and enlarge it again."""
    width, height = (max(1, round(SHRUNK * side)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    return small.resize(image.size, Image.Resampling.BICUBIC)


HELD_OUT: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "shift": shifted,
    "jpeg": compressed,
    "shrink": shrunk,
}
"""The changes that no image is optimised for, by name."""


@dataclass(frozen=True)
class Judgement:
    """A latent's activations on one image: the strongest among its tokens, 0 if it is not active.

    Attributes:
        plain: on the image itself.
        held_out: on the image after each change of `HELD_OUT`, by name.
        rank: place of the latent among all latents by activation on the image; 1 is the strongest.
    """

    plain: float
    held_out: Mapping[str, float]
    rank: int

    @property
    def mean_held_out(self) -> float:
        """The mean over the changes."""
        return fmean(self.held_out.values())


class Judge:
    """Measures activations with the SAE's real code, on images of the model's input size.

    Args:
        model: the model.
        sae: the SAE.
        site: where it reads.
        tokens: the positions that it sees.
    """

    def __init__(
        self, model: VisionModel, sae: SparseAutoencoder, site: str, tokens: Tokens
    ) -> None:
        self.model, self.sae, self.site, self.tokens = model, sae, site, tokens
        self._levels = Levels(model)

    def __call__(self, images: Sequence[Image.Image], latent: int) -> list[Judgement]:
        """Judge images by one latent."""
        variants = list(images)
        for change in HELD_OUT.values():
            variants += map(change, images)
        values, ranks = self._activations(variants, latent)
        n = len(images)
        return [
            Judgement(
                values[i],
                {name: values[i + (k + 1) * n] for k, name in enumerate(HELD_OUT)},
                ranks[i],
            )
            for i in range(n)
        ]

    @torch.no_grad()
    def _activations(
        self, images: Sequence[Image.Image], latent: int
    ) -> tuple[list[float], list[int]]:
        """Return the latent's strongest activation on each image, and its rank there."""
        values: list[float] = []
        ranks: list[int] = []
        for start in range(0, len(images), BATCH):
            pixels = self._levels.pixels(to_levels(images[start : start + BATCH]).to(self.device))
            x = self.model.read(pixels, self.site, self.tokens)[self.site]
            code = self.sae.encode(x.flatten(0, 1).to(self.sae.W_enc.device))
            strongest = code.values.new_zeros(len(x) * self.sae.n_latents)
            place = code.rows // x.shape[1] * self.sae.n_latents + code.indices
            strongest = strongest.scatter_reduce(0, place, code.values, "amax")
            strongest = strongest.view(len(x), -1)
            own = strongest[:, latent]
            values += own.tolist()
            ranks += (1 + (strongest > own[:, None]).sum(1)).tolist()
        return values, ranks

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device


@dataclass(frozen=True)
class RealImage:
    """The best real images of a latent, as the yardstick of those made for it.

    Attributes:
        image: the top-activating image as the model sees it.
        id: its id in the source.
        judgement: its activations.
        best: largest activation among the index's top-activating images.
        best_held_out: largest mean over the held-out changes among them.
    """

    image: Image.Image
    id: str
    judgement: Judgement
    best: float
    best_held_out: float


def judge_real(judge: Judge, index: LatentIndex, latent: int) -> RealImage | None:
    """Judge the top-activating images of the index in the same way; None if there are none.

    Raises:
        UserError: an image no longer exists.
    """
    examples = index.top(latent)
    if not examples:
        return None
    pixels = torch.stack(
        [judge.model.transform(index.picture(example.image)) for example in examples]
    )
    images = seen_pictures(judge.model, pixels)
    judgements = judge(images, latent)
    first = max(range(len(images)), key=lambda i: judgements[i].plain)
    return RealImage(
        images[first],
        index.info(examples[first].image).id,
        judgements[first],
        max(each.plain for each in judgements),
        max(each.mean_held_out for each in judgements),
    )


def to_levels(images: Sequence[Image.Image]) -> Float[Tensor, "batch 3 height width"]:
    """Return images as levels from 0 to 1."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def to_images(levels: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Return levels as images, rounded to 256 steps.

    Raises:
        UserError: a level is not finite.
    """
    if not bool(torch.isfinite(levels).all()):
        raise UserError(
            "The image has pixels that are not finite. Use a lower learning rate (--lr)."
        )
    array = (levels.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(each) for each in array.permute(0, 2, 3, 1).contiguous().numpy()]
