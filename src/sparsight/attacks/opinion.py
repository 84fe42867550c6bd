"""CLIP's opinion of an image: the words whose embedding comes closest to the image's.

They are found by gradient ascent through the text tower: first on mixtures of words (Gumbel-softmax
with straight-through gradients; Jang et al. 2017, Maddison et al. 2017), then by trying single
words that the gradient recommends and keeping those that are truly better (as in AutoPrompt, Shin
et al. 2020). The reported cosine is that of the text itself, which the model reads like any text.
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
"""Words tried at a position in each round of swaps."""

TOGETHER = 16
"""Images whose words are searched for at once."""


@dataclass(frozen=True)
class Opinion:
    """Words for an image, and the cosine of their embedding with the image's."""

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
    """Find words for each image.

    Args:
        model: a model with a text tower.
        embeddings: embeddings of images, from `embed_images`.
        words: number of words in a text; each is one token of the model's vocabulary.
        steps: steps of gradient ascent.
        swaps: rounds in which other words are tried at each position.
        lr: learning rate of Adam, on the logits of the mixtures.
        temperature: temperature of the Gumbel-softmax, at the first and the last step.
        seed: seed of its noise.

    Raises:
        UserError: the model has no text tower or it cannot take as many words, or a setting is out
            of range.
    """
    check_seed(seed)
    if words < 1 or steps < 0 or swaps < 0 or lr <= 0 or min(temperature) <= 0:
        raise UserError(
            f"clip_opinion: got words {words}, steps {steps}, swaps {swaps}, lr {lr}, temperature "
            f"{temperature}; words must be 1 or more, lr and temperatures above 0, the others 0 or "
            "more."
        )
    if embeddings.ndim != 2 or not bool(embeddings.isfinite().all()):
        raise UserError("clip_opinion: embeddings must be finite, of shape [images, d_embed].")
    text = SoftText(model)
    targets = embeddings.to(text.table.weight.device).float()
    names = list(text.words.values())
    found = []
    for start in range(0, len(targets), TOGETHER):
        chunk = targets[start : start + TOGETHER]
        seeds = [(seed + start + i) % 2**63 for i in range(len(chunk))]
        for target, chosen in zip(
            chunk, _ascend(text, chunk, words, steps, lr, temperature, seeds), strict=True
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
    return [Opinion(phrase, float(cosine)) for phrase, cosine in zip(found, cosines, strict=True)]


def _ascend(
    text: SoftText,
    targets: Float[Tensor, "n d_embed"],
    words: int,
    steps: int,
    lr: float,
    temperature: tuple[float, float],
    seeds: Sequence[int],
) -> Int[Tensor, "n words"]:
    """Return the best words that gradient ascent came across, for each image by itself."""
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
        uniform = torch.stack([torch.rand(size, generator=source) for source in generators])
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
    """Replace each word in turn by the best of those that the gradient recommends there."""
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
