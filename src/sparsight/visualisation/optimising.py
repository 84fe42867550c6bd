"""The loop that makes the images of one latent."""

from __future__ import annotations

import hashlib
import math

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.errors import UserError
from sparsight.progress import ProgressLine
from sparsight.visualisation.colours import ImageStatistics, Levels
from sparsight.visualisation.objective import Objective, mean_similarity
from sparsight.visualisation.recipes import make_parameters
from sparsight.visualisation.settings import VisualisationSettings
from sparsight.visualisation.views import random_views, total_variation


def optimise(
    objective: Objective,
    statistics: ImageStatistics,
    settings: VisualisationSettings,
    line: ProgressLine | None = None,
) -> tuple[Float[Tensor, "n 3 height width"], list[float]]:
    """Make images that raise the objective.

    Args:
        objective: the latent.
        statistics: colours and spectrum, on the model's device.
        settings: with the recipe's own values (`filled`).
        line: a progress line; one unit per step.

    Returns:
        The images, with levels from 0 to 1; and the mean pooled pre-activation of every step, in
        the latent's own units.

    Raises:
        UserError: what the SAE sees does not depend on the image, as CLS before the first block.
    """
    assert settings.lr is not None and settings.tv is not None
    levels = Levels(objective.model)
    size = (levels.height, levels.width)
    seeds = [_seed(settings.seed, objective.latent, i) for i in range(settings.n + 1)]
    *starts, drawn = (torch.Generator().manual_seed(seed) for seed in seeds)
    device = objective.model.device
    parameters = make_parameters(settings.recipe, statistics, size, starts).to(device)
    optimiser = parameters.optimiser(settings.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: _falling(t, settings.steps))
    history: list[float] = []
    for _ in range(settings.steps):
        images = parameters()
        views = random_views(images.repeat(settings.views, 1, 1, 1), settings.transforms, drawn)
        raised = objective(levels.pixels(views))
        looks = raised.look.view(settings.views, settings.n, -1).mean(0)
        loss = -raised.strength.sum() / settings.views
        loss = loss + settings.tv * total_variation(images).sum()
        loss = loss + settings.press * raised.rivals.sum() / settings.views
        loss = loss + settings.n * settings.diversity * mean_similarity(looks)
        optimiser.zero_grad()
        views.retain_grad()
        loss.backward()
        if not history and views.grad is not None and not bool(views.grad.any()):
            raise UserError(
                f"The latents at {objective.site} of {objective.model.id} do not depend on the "
                f"image (tokens: {objective.tokens}), so that no image can be made for them. "
                "Choose an SAE of a later site."
            )
        optimiser.step()
        schedule.step()
        history.append(objective.unit * float(raised.strength.detach().mean()))
        if line is not None:
            line.advance(1, f"latent {objective.latent}: {history[-1]:.3g}")
    with torch.no_grad():
        return parameters(), history


def _falling(step: int, steps: int) -> float:
    """Return the share of the learning rate: full at first, down to a tenth along a cosine."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def _seed(seed: int, latent: int, image: int) -> int:
    """Return a seed of its own for each latent and image, whatever else is made beside it."""
    digest = hashlib.sha256(f"visualisation {seed} {latent} {image}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
