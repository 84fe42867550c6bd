"""What became of the latents of a CLIP's SAE when the CLIP was fine-tuned."""

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
    """What became of the latents of the SAE of the model before.

    The same SAE reads both models. Latents count as text-salient before if they are found on one
    half of the pairs and again on the other; there their response is compared, so that those which
    looked stronger by chance do not seem to have lost it. One has lost it if it is not found any
    more after, on the same pictures with the same test. How far latents
    have drifted is told by correlation: of each latent's activation (mean over positions) before
    with its own after over the same clean pictures; and, matched one to one, with any latent's
    after, so that one that took another's place shows.

    Args:
        before: the model that the SAE was trained on.
        after: the fine-tuned one.
        subjects: with an SAE.
        quiet: no progress lines.

    Returns:
        `site`, `found_before`, `found_after`, `lost`, `kept`, `new`, `latents`: of the strongest
        before, effect and q before and after; `drift`: `own` and `matched` mean correlation,
        `moved`: latents whose match is another one, `n_alive`; `truth`: `before` and `after`, on
        pictures whose truth is known.

    Raises:
        UserError: the SAE is not of the model before.
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
    """What responds to words: found on one half of the pairs, confirmed on the other."""

    chosen: SalienceTable
    first: SalienceTable
    """The model before, on the half where responses are compared."""
    second: SalienceTable
    """The model after, on the same half."""

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
        """Counts, and the strongest latents before with effect and q of both models."""
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
    """The activation of each latent on each image that loads, the mean over its positions.

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
    before: Float[Tensor, "latents pictures"], after: Float[Tensor, "latents pictures"]
) -> dict[str, Any]:
    """Correlations of latents' activations before and after, over the same pictures.

    Args:
        before: of latents that are the rows.
        after: of the same latents.

    Returns:
        `own`: mean correlation of each with itself, over those active on some picture before;
        `matched` and `moved`, where scipy is installed: the mean of the best assignment one to one,
        and how many have another partner than themselves; `n_alive`; `fell_silent`: how many of
        them are active on no picture after.
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
    """The summaries of the truth table, before and after."""
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
