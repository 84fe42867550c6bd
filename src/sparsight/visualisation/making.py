"""`visualize`: make images for latents, and judge them."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsight.errors import UserError, memory_told
from sparsight.images import ImageSource
from sparsight.interruption import noted
from sparsight.latents import LatentIndex
from sparsight.latents.belonging import check_belongs
from sparsight.progress import ProgressLine, progress
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel
from sparsight.vision.passes import PassSettings
from sparsight.vision.tokens import Tokens
from sparsight.visualisation.colours import (
    ImageStatistics,
    Levels,
    assumed_statistics,
    measure_images,
)
from sparsight.visualisation.judging import Judge, RealImage, judge_real, to_images
from sparsight.visualisation.objective import Objective, check_pool
from sparsight.visualisation.optimising import optimise
from sparsight.visualisation.result import Visualisation
from sparsight.visualisation.settings import VisualisationSettings

MEASURED = ("fourier", "maco")
"""The recipes that need the spectrum of images."""


def visualize(
    model: VisionModel,
    sae: SparseAutoencoder,
    latents: Sequence[int] | int,
    *,
    index: LatentIndex | None = None,
    images: ImageSource | None = None,
    settings: VisualisationSettings | None = None,
    check: bool = True,
    out: str | Path | None = None,
    workers: int | None = None,
    quiet: bool = True,
) -> list[Visualisation]:
    """Make images that activate latents, and compare them with the best real images.

    The pre-activation of the latent is raised by gradient ascent through the model, under random
    transforms. What counts is then measured with the SAE's real code, on the images as saved, also
    under held-out changes: a shift, a JPEG of quality 75, and a reduction to three quarters
    (`judging`). The images of one latent do not depend on which others are made.

    Args:
        model: the model.
        sae: the SAE; its metadata names site and tokens, or else the index does.
        latents: numbers of latents.
        index: index of the SAE: gives the best real images, and the images for colours and
            spectrum.
        images: images for colours and spectrum instead of those of the index. Without either, a
            spectrum like that of photos is assumed, and a note says so.
        settings: recipe, steps, transforms, seed.
        check: check that the SAE was trained on this model's weights.
        out: folder in which each result is saved as soon as it is there, in a sub-folder
            `LATENT-RECIPE`; default: nothing is saved.
        workers: processes that decode images.
        quiet: show no progress line.

    Returns:
        One result per latent, in the given order.

    Raises:
        UserError: a latent does not exist; the SAE or the index belongs to something else; the
            site lacks the tokens; or images are needed and cannot be read.
        SparsightError: memory ran out.
    """
    wanted = [latents] if isinstance(latents, int) else list(dict.fromkeys(latents))
    settings = (settings or VisualisationSettings()).filled()
    site, tokens = _where(model, sae, index, check=check)
    _check_latents(wanted, sae, index)
    check_pool(settings.pool, model, site, tokens)
    frozen = copy.deepcopy(sae).to(model.device).requires_grad_(False).eval()
    passing = PassSettings(workers=workers, quiet=quiet)
    statistics, notes = _statistics(model, index, images, settings, passing)
    about = {
        "sae": sae.fingerprint(),
        "model": {"id": model.id, "weights_hash": model.weights_hash},
        "tokens": tokens,
    }
    judge = Judge(model, frozen, site, tokens)
    maker = _Maker(judge, statistics, settings, index, notes, about)
    with (
        progress("visualize", len(wanted) * settings.steps, "steps", quiet=quiet) as line,
        memory_told("Use fewer images (--n) or views (--views)."),
    ):
        return maker.make_all(wanted, line, None if out is None else Path(out))


@dataclass(frozen=True)
class _Maker:
    """Makes the images of one latent after another."""

    judge: Judge
    statistics: ImageStatistics
    settings: VisualisationSettings
    index: LatentIndex | None
    notes: Sequence[str]
    about: dict[str, Any]

    def make_all(
        self, latents: Sequence[int], line: ProgressLine, out: Path | None
    ) -> list[Visualisation]:
        """Make the images of every latent; save each result as soon as it is there."""
        results: list[Visualisation] = []

        def what_is_kept() -> str:
            where = "nothing is saved" if out is None else f"saved in {out}"
            return f"{len(results)} of {len(latents)} latents are done, {where}."

        with noted(what_is_kept):
            for latent in latents:
                made = self.make(latent, line)
                if out is not None:
                    made.save(out / f"{latent}-{self.settings.recipe}")
                results.append(made)
        return results

    def make(self, latent: int, line: ProgressLine) -> Visualisation:
        """Make and judge the images of one latent."""
        judge, settings = self.judge, self.settings
        real, own_notes = _real(judge, self.index, latent)
        unit = self._unit(latent, real)
        objective = Objective(
            judge.model, judge.sae, judge.site, judge.tokens, latent,
            settings.pool, unit, settings.press > 0,
        )  # fmt: skip
        start = time.perf_counter()
        levels, history = optimise(objective, self.statistics, settings, line)
        seconds = time.perf_counter() - start
        drawn = to_images(levels)
        judged = judge(drawn, latent)
        order = sorted(range(len(drawn)), key=lambda i: -judged[i].mean_held_out)
        return Visualisation(
            latent=latent,
            images=[drawn[i] for i in order],
            judgements=[judged[i] for i in order],
            real=real,
            settings=settings,
            site=judge.site,
            statistics=self.statistics.origin,
            history=history,
            seconds=seconds,
            notes=[*self.notes, *own_notes],
            about=self.about,
        )

    def _unit(self, latent: int, real: RealImage | None) -> float:
        """Return a strong activation of the latent, in which the objective is measured."""
        if real is not None and real.best:
            return real.best
        known = 0.0 if self.index is None else self.index.row(latent)["max_activation"]
        return known or _strong(self.judge, self.statistics)


def _where(
    model: VisionModel, sae: SparseAutoencoder, index: LatentIndex | None, *, check: bool
) -> tuple[str, Tokens]:
    """Return site and tokens of the SAE, after checking that everything belongs together."""
    if index is not None:
        index.check_sae(sae)
    known = sae.metadata.get("site") or (index.site if index is not None else None)
    if known is None:
        raise UserError(
            "The SAE does not name the site it was trained on. Set sae.metadata['site'], or give "
            "its index."
        )
    site = model.canonical_site(str(known))
    check_belongs(sae, model, site, strict=check)
    tokens: Tokens = sae.metadata.get("tokens") or (index.tokens if index else "all")  # type: ignore[assignment]
    model.token_count(site, tokens)
    return site, tokens


def _check_latents(
    latents: Sequence[int], sae: SparseAutoencoder, index: LatentIndex | None
) -> None:
    if not latents:
        raise UserError("No latent is given; give at least one number.")
    for latent in latents:
        if not 0 <= latent < sae.n_latents:
            raise UserError(f"The SAE has no latent {latent}; it has 0 to {sae.n_latents - 1}.")


def _statistics(
    model: VisionModel,
    index: LatentIndex | None,
    images: ImageSource | None,
    settings: VisualisationSettings,
    passing: PassSettings,
) -> tuple[ImageStatistics, list[str]]:
    """Return colours and spectrum on the model's device, and notes if they are assumed."""
    _, height, width = model.input_shape
    if settings.recipe not in MEASURED:
        return assumed_statistics(height, width).to(model.device), []
    reason = "There is neither an index nor images; `sparsight index` builds an index."
    try:
        source = images or (index.source() if index is not None else None)
    except UserError as error:
        source, reason = None, str(error)
    if source is not None:
        return measure_images(model, source, settings=passing).to(model.device), []
    note = f"The spectrum is assumed to fall with 1 / frequency. {reason}"
    return assumed_statistics(height, width).to(model.device), [note]


def _real(
    judge: Judge, index: LatentIndex | None, latent: int
) -> tuple[RealImage | None, list[str]]:
    """Return the best real image, or None and the reason why there is none."""
    if index is None:
        return None, ["No index: the images are not compared with real ones."]
    try:
        real = judge_real(judge, index, latent)
    except UserError as error:
        return None, [f"Latent {latent} is not compared with real images. {error}"]
    if real is None:
        n = index.manifest["images"]["n_images"]
        return None, [
            f"Latent {latent} was never active on the {n:,} images of the index, so that there is "
            "no real image to compare with."
        ]
    return real, []


@torch.no_grad()
def _strong(judge: Judge, statistics: ImageStatistics) -> float:
    """Return a strong activation where no real image gives one.

    It is the mean strongest pre-activation of the tokens of a grey image with noise.
    """
    levels = Levels(judge.model)
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(1, 3, levels.height, levels.width, generator=generator)
    grey = statistics.mean[:, None, None] + noise.to(judge.device)
    x = judge.model.read(levels.pixels(grey), judge.site, judge.tokens)[judge.site]
    scores = judge.sae.pre_activations(x.flatten(0, 1))
    return max(float(scores.amax(1).mean()), 1e-6)
