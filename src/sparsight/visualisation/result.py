"""`Visualisation`: the images made for one latent, with their activations and settings."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sparsight.config import to_dict
from sparsight.figures import rounded
from sparsight.files import check_folder, write_bytes, write_json
from sparsight.folders import replaced
from sparsight.pages.data_uris import encode_picture, is_crisp
from sparsight.visualisation.judging import Judgement, RealImage
from sparsight.visualisation.settings import VisualisationSettings

ABOUT, REAL = "visualisation.json", "real.png"
FORMAT = "sparsight visualisation"

SHOWN, GAP = 192, 6
"""Side of an image in a notebook, in pixels."""

MOST_FILES = 1000
"""Largest number of images whose files a new visualisation replaces."""


@dataclass(frozen=True, repr=False)
class Visualisation:
    """The images made for one latent, the strongest under held-out changes first.

    Attributes:
        latent: its number.
        images: of the model's input size, as the model sees them.
        judgements: their activations, in the same order.
        real: the best real image, judged in the same way; None without an index, and for a latent
            that is active on no image of it.
        settings: how the images were made, with the recipe's own values.
        site: where the SAE reads.
        statistics: where colours and spectrum come from, in words.
        history: mean pooled pre-activation of the transformed images, step by step.
        seconds: how long it took to make the images.
        notes: what could not be done, and why.
        about: the SAE and the model, for the file.
    """

    latent: int
    images: Sequence[Image.Image]
    judgements: Sequence[Judgement]
    real: RealImage | None
    settings: VisualisationSettings
    site: str
    statistics: str
    history: Sequence[float]
    seconds: float
    notes: Sequence[str]
    about: dict[str, Any]

    @property
    def best(self) -> Judgement:
        """The activations of the first image."""
        return self.judgements[0]

    @property
    def ratio(self) -> float | None:
        """The first image's activation over that of the best real image; None without one."""
        if self.real is None or not self.real.best:
            return None
        return self.best.plain / self.real.best

    @property
    def held_out_ratio(self) -> float | None:
        """The first image's mean activation under held-out changes over the best real image's.

        Both are under the same changes. None without a real image, or if no real image keeps the
        latent active under them.
        """
        if self.real is None or not self.real.best_held_out:
            return None
        return self.best.mean_held_out / self.real.best_held_out

    @property
    def strict_ratio(self) -> float | None:
        """The same mean over the best real image's activation without any change.

        None without a real image.
        """
        if self.real is None or not self.real.best:
            return None
        return self.best.mean_held_out / self.real.best

    def save(self, folder: str | Path) -> Path:
        """Write the images as PNG, the best real image, and `visualisation.json`.

        An earlier visualisation in the folder is replaced: if killed at any point, the folder holds
        the old files or the new ones.

        Returns:
            The folder.

        Raises:
            UserError: the folder cannot be created.
            SparsightError: the disk is full or the folder cannot be written.
        """
        folder = check_folder(Path(folder))
        names = [f"{i}.png" for i in range(len(self.images))]
        every = [f"{i}.png" for i in range(max(MOST_FILES, len(names)))]
        with replaced(folder, [ABOUT, REAL, *every]) as staged:
            for name, image in zip(names, self.images, strict=True):
                write_bytes(staged / name, _png(image))
            if self.real is not None:
                write_bytes(staged / REAL, _png(self.real.image))
            write_json(staged / ABOUT, self.to_dict())
        return folder

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pixels, as `visualisation.json` holds it."""
        real = None
        if self.real is not None:
            real = {
                "id": self.real.id,
                "file": REAL,
                **_activations(self.real.judgement),
                "best": self.real.best,
                "best_held_out": self.real.best_held_out,
            }
        return {
            "format": FORMAT,
            "version": 1,
            "latent": self.latent,
            "site": self.site,
            **self.about,
            "images": [
                {"file": f"{i}.png", **_activations(each)} for i, each in enumerate(self.judgements)
            ],
            "real": real,
            "ratio": self.ratio,
            "held_out_ratio": self.held_out_ratio,
            "strict_ratio": self.strict_ratio,
            "settings": to_dict(self.settings),
            "statistics": self.statistics,
            "history": list(self.history),
            "seconds": self.seconds,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        ratio = self.held_out_ratio
        beside = f"{rounded(ratio)} × the best real image under held-out changes"
        return (
            f"Visualisation(latent {self.latent}, {self.settings.recipe}, {len(self.images)} "
            f"images, {'not compared with real ones' if ratio is None else beside})"
        )

    def _repr_html_(self) -> str:
        cells = [
            _cell(image, f"made: {_words(each)}, rank {each.rank:,}")
            for image, each in zip(self.images, self.judgements, strict=True)
        ]
        if self.real is not None:
            cells.append(_cell(self.real.image, f"best real image: {_words(self.real.judgement)}"))
        title = f"latent {self.latent} · {self.settings.recipe} · activation → under changes"
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self.notes)
        return (
            f"<div><b>{html.escape(title)}</b></div>"
            f'<div style="display:flex;flex-wrap:wrap;gap:{GAP}px">{"".join(cells)}</div>{notes}'
        )


def _activations(judgement: Judgement) -> dict[str, Any]:
    return {
        "activation": judgement.plain,
        "held_out": dict(judgement.held_out),
        "mean_held_out": judgement.mean_held_out,
        "rank": judgement.rank,
    }


def _words(judgement: Judgement) -> str:
    return f"{rounded(judgement.plain)} → {rounded(judgement.mean_held_out)}"


def _cell(image: Image.Image, about: str) -> str:
    crisp = ";image-rendering:pixelated" if is_crisp(image) else ""
    words = html.escape(about, quote=True)
    return (
        f'<figure style="margin:0;width:{SHOWN}px;font-size:12px">'
        f'<img src="{encode_picture(image, SHOWN)}" alt="{words}" style="width:{SHOWN}px;'
        f'height:{SHOWN}px;object-fit:contain{crisp}"><figcaption>{words}</figcaption></figure>'
    )


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()
