"""What fine-tuning a CLIP does to the latents of its SAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sparsight.activations import LiveActivations
from sparsight.attacks import SalienceTable, find_text_salient
from sparsight.errors import MissingExtra, UserError
from sparsight.evaluation import Passes, truth_table
from sparsight.evaluation.scenes import TruthSource
from sparsight.evaluation.stability import match_latents
from sparsight.evaluation.truth import MIN_SCENES
from sparsight.finetuning.subjects import Subjects
from sparsight.images import ImageSource
from sparsight.sae import SparseAutoencoder
from sparsight.vision import ImagePass, PassSettings, Tokens, VisionModel

SHOWN_LATENTS = 12
TRUTH_SCENES = 1000


def compare_latents(
    before: VisionModel, after: VisionModel, subjects: Subjects, *, quiet: bool = True
) -> dict[str, Any]:
    """Compare the latents of the original model's SAE before and after fine-tuning.

    The same SAE reads both models. Latents count as text-salient before if they are found on one
    half of the pairs and confirmed on the other. Their responses are compared on that second half,
    so that latents that looked strong by chance do not seem to lose their response. A latent has
    lost its response if the same test on the same images no longer finds it after fine-tuning.
    Drift is measured by correlation over the same clean images: of each latent's activation (mean
    over positions) before with its own after; and, matched one to one, with any latent's after,
    which shows latents that swapped places.

    Args:
        before: the original model, on which the SAE was trained.
        after: the fine-tuned model.
        subjects: what to measure on, including an SAE.
        quiet: show no progress lines.

    Returns:
        `site`, `found_before`, `found_after`, `lost`, `kept`, `new`, `latents`: effect and q of the
        strongest ones, before and after; `drift`: `own` and `matched` mean correlation, `moved`:
        latents matched with another one, `n_alive`; `truth`: `before` and `after`, on images with a
        ground truth.

    Raises:
        UserError: the SAE belongs to another model than `before`.
    """
    sae = subjects.sae
    assert sae is not None
    settings = PassSettings(workers=subjects.workers, quiet=quiet)
    responses = _Responses.of(before, after, sae, subjects, settings)
    site, tokens = responses.first.site, str(responses.first.about["tokens"])
    clean = subjects.pairs.clean.sample(subjects.max_images, subjects.seed)
    means = [
        mean_activations(model, sae, clean, site, tokens, settings) for model in (before, after)
    ]
    return {
        "site": site,
        "n_latents": sae.n_latents,
        **responses.to_dict(),
        "drift": drift(*means),
        **_truth(before, after, subjects, site),
    }


@dataclass(frozen=True)
class _Responses:
    """Latents that respond to words: found on one half of the pairs, confirmed on the other."""

    chosen: SalienceTable
    first: SalienceTable
    """Results of the original model, on the half where responses are compared."""
    second: SalienceTable
    """Results of the fine-tuned model, on the same half."""

    @classmethod
    def of(
        cls,
        before: VisionModel,
        after: VisionModel,
        sae: SparseAutoencoder,
        subjects: Subjects,
        settings: PassSettings,
    ) -> _Responses:
        """Test the latents of both models."""
        search, rest = subjects.pairs.halves(subjects.seed)
        chosen, first, second = (
            find_text_salient(
                model,
                pairs,
                sae,
                check=check,
                contrast=subjects.contrast,
                seed=subjects.seed,
                workers=settings.workers,
                quiet=settings.quiet,
            )
            for model, pairs, check in (
                (before, search, True),
                (before, rest, True),
                (after, rest, False),
            )
        )
        return cls(chosen, first, second)

    def to_dict(self) -> dict[str, Any]:
        """Return counts, and effect and q in both models of the strongest latents before."""
        first, second = self.first, self.second
        again = set(first.found)
        confirmed = [latent for latent in self.chosen.found if latent in again]
        was, now = set(confirmed), set(second.found)
        return {
            "n_pairs": first.about["n_pairs"],
            "fdr": first.about["fdr"],
            "compares": first.about["compares"],
            "found_before": len(was),
            "found_after": len(now),
            "lost": len(was - now),
            "kept": len(was & now),
            "new": len(now - again),
            "effect_before": float(first.effect[confirmed].sum()),
            "effect_after": float(second.effect[confirmed].sum()),
            "latents": [
                {
                    "latent": latent,
                    "effect_before": float(first.effect[latent]),
                    "effect_after": float(second.effect[latent]),
                    "q_before": float(first.q[latent]),
                    "q_after": float(second.q[latent]),
                }
                for latent in confirmed[:SHOWN_LATENTS]
            ],
        }


@torch.no_grad()
def mean_activations(
    model: VisionModel,
    sae: SparseAutoencoder,
    source: ImageSource,
    site: str,
    tokens: str,
    settings: PassSettings | None = None,
) -> Float[Tensor, "latents images"]:
    """Return the activation of each latent on each image that loads, as the mean over positions.

    Raises:
        UserError: no image loads.
    """
    found = []
    with ImagePass(model, source, "latents' drift", settings) as seen:
        for batch in seen:
            x = model.read(batch.pixels, site, tokens)[site].float()  # type: ignore[arg-type]
            code = sae.encode(x.flatten(0, 1)).dense()
            found.append(code.reshape(*x.shape[:2], -1).mean(dim=1))
    return torch.cat(found).T


def drift(
    before: Float[Tensor, "latents images"], after: Float[Tensor, "latents images"]
) -> dict[str, Any]:
    """Correlate the latents' activations before and after, over the same images.

    Args:
        before: activations of the latents, one row each.
        after: activations of the same latents after.

    Returns:
        `own`: mean correlation of each latent with itself, over those active on any image before;
        `matched` and `moved`, if scipy is installed: the mean of the best one-to-one assignment,
        and how many latents it pairs with another one; `n_alive`; `fell_silent`: how many of these
        are active on no image after.
    """
    alive = before.std(dim=1) > 0
    silent = alive & (after.std(dim=1) == 0)
    one, two = (x[alive] - x[alive].mean(dim=1, keepdim=True) for x in (before, after))
    own = F.cosine_similarity(one, two, dim=1)
    found: dict[str, Any] = {
        "n_alive": int(alive.sum()),
        "fell_silent": int(silent.sum()),
        "own": float(own.mean()) if len(own) else None,
    }
    try:
        matching = match_latents(one, two)
    except (MissingExtra, UserError) as error:
        found["omitted"] = str(error)
        return found
    found["matched"] = matching.mean
    found["moved"] = int((matching.first != matching.second).sum())
    return found


def _truth(
    before: VisionModel, after: VisionModel, subjects: Subjects, site: str
) -> dict[str, Any]:
    """Return the summaries of the truth table, before and after."""
    images, sae = subjects.images, subjects.sae
    if sae is None or not isinstance(images, TruthSource):
        return {}
    scenes = images.sample(min(TRUTH_SCENES, subjects.max_images), subjects.seed)
    if len(scenes) < MIN_SCENES:
        return {}
    tokens: Tokens = sae.metadata.get("tokens") or "all"
    found = {}
    for name, model in (("before", before), ("after", after)):
        live = LiveActivations(model, scenes, [site], tokens, workers=subjects.workers)
        table = truth_table(sae.encode, Passes(live, site), scenes, seed=subjects.seed)
        found[name] = table.summary
    return {"truth": found}
