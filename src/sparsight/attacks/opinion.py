"""CLIP's opinion of a picture: the words whose embedding comes closest to the picture's.

Found by gradient ascent through the text tower: first on mixtures of words (Gumbel-softmax with
straight-through gradients; Jang et al. 2017, Maddison et al. 2017), then by swapping single words
that the gradient recommends for ones that are truly better (as in AutoPrompt, Shin et al. 2020).
What is reported is the cosine of the text itself, read by the model as any text is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from sparsight.config import check_seed
from sparsight.errors import UserError
from sparsight.vision import VisionModel
from sparsight.vision.soft_text import SoftText

CANDIDATES = 24
"""Words that are tried at a position in each round of swaps."""

TOGETHER = 16
"""Pictures whose words are sought at once."""


@dataclass(frozen=True)
class Opinion:
    """Words for a picture, and the cosine of their embedding with the picture's."""

    text: str
    similarity: float


def clip_opinion(
    model: VisionModel,
    embeddings: Float[Tensor, "n d_embed"],
    *,
    words: int = 4,
    steps: int = 60,
    swaps: int = 2,
    lr: float = 0.5,
    temperature: tuple[float, float] = (2.0, 0.3),
    seed: int = 0,
) -> list[Opinion]:
    """Find words for each picture.

    Args:
        model: one with a text tower.
        embeddings: of pictures, from `embed_images`.
        words: how many a text has; each is one token of the model's vocabulary.
        steps: of gradient ascent.
        swaps: rounds in which each position is tried with other words.
        lr: of Adam, on the logits of the mixtures.
        temperature: of the Gumbel-softmax, at the first and the last step.
        seed: of its noise.

    Raises:
        UserError: no text tower, too many words for it, or a setting out of range.
    """
    check_seed(seed)
    if words < 1 or steps < 0 or swaps < 0 or lr <= 0 or min(temperature) <= 0:
        raise UserError(
            f"clip_opinion: words {words}, steps {steps}, swaps {swaps}, lr {lr}, temperature "
            f"{temperature}; words must be 1 or more, lr and temperatures above 0, the others 0 "
            "or more."
        )
    if embeddings.ndim != 2 or not bool(embeddings.isfinite().all()):
        raise UserError("clip_opinion: embeddings must be finite, [pictures, d_embed].")
    text = SoftText(model)
    targets = embeddings.to(text.table.weight.device).float()
    names = list(text.words.values())
    found = []
    for start in range(0, len(targets), TOGETHER):
        some = targets[start : start + TOGETHER]
        seeds = [(seed + start + i) % 2**63 for i in range(len(some))]
        for target, chosen in zip(
            some, _ascend(text, some, words, steps, lr, temperature, seeds), strict=True
        ):
            for _ in range(swaps):
                better = _swap(text, target, chosen)
                if torch.equal(better, chosen):
                    break
                chosen = better
            found.append(" ".join(names[place] for place in chosen.tolist()))
    if not found:
        return []
    with torch.no_grad():
        cosines = functional.cosine_similarity(
            model.embed_texts(found), embeddings.to(model.device).float()
        )
    return [Opinion(each, float(cosine)) for each, cosine in zip(found, cosines, strict=True)]


def _ascend(
    text: SoftText,
    targets: Float[Tensor, "n d_embed"],
    words: int,
    steps: int,
    lr: float,
    temperature: tuple[float, float],
    seeds: Sequence[int],
) -> Int[Tensor, "n words"]:
    """The best words that gradient ascent came by, for each picture on its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = (words, len(text.words))
    logits = torch.zeros(len(targets), *size, device=targets.device, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=lr)
    best = logits.detach().argmax(dim=-1)
    highest = torch.full((len(targets),), -torch.inf, device=targets.device)
    first, last = temperature
    for step in range(steps + 1):
        with torch.no_grad():
            now = logits.argmax(dim=-1)
            cosines = functional.cosine_similarity(text.embed_ids(now), targets)
            better = cosines > highest
            best = torch.where(better[:, None], now, best)
            highest = torch.where(better, cosines, highest)
        if step == steps:
            break
        tau = first * (last / first) ** (step / max(1, steps - 1))
        uniform = torch.stack([torch.rand(size, generator=each) for each in generators])
        noise = -(-uniform.clamp(1e-9, 1 - 1e-7).log()).log().to(targets.device)
        with torch.enable_grad():
            soft = ((logits + noise) / tau).softmax(dim=-1)
            hard = functional.one_hot(soft.argmax(dim=-1), size[1]).to(soft.dtype)
            embedded = text.embed(hard + soft - soft.detach())
            loss = -functional.cosine_similarity(embedded, targets).sum()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
    return best


def _swap(text: SoftText, target: Tensor, chosen: Int[Tensor, " words"]) -> Int[Tensor, " words"]:
    """Each position in turn with the best of the words that the gradient recommends there."""
    for position in range(len(chosen)):
        mixture = functional.one_hot(chosen, len(text.words)).float().requires_grad_(True)
        with torch.enable_grad():
            cosine = functional.cosine_similarity(text.embed(mixture[None]), target[None]).sum()
            (gradient,) = torch.autograd.grad(cosine, mixture)
        wanted = gradient[position].topk(min(CANDIDATES, len(text.words))).indices
        tried = chosen.repeat(len(wanted) + 1, 1)
        tried[1:, position] = wanted
        with torch.no_grad():
            chosen = tried[int(_cosines(text, tried, target).argmax())]
    return chosen


def _cosines(text: SoftText, chosen: Int[Tensor, "n words"], target: Tensor) -> Tensor:
    return functional.cosine_similarity(text.embed_ids(chosen), target[None])
