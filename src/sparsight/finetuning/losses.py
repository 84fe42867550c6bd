"""The losses of fine-tuning, each a function of embeddings.

`info_nce` is the contrastive loss that CLIP was trained with. `similarity_of_similarities` is what
zer0int's published scripts compute under that name; it is here to reproduce them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparsight.errors import UserError

LARGEST_LOG_SCALE = math.log(100.0)
"""Upper limit of CLIP's learned logit scale (Radford et al. 2021, section 2.5)."""


def caption_groups(captions: Sequence[str]) -> Int[Tensor, " batch"]:
    """Return a number for each caption; equal captions have equal numbers."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in captions])


def contrastive_targets(
    groups: Int[Tensor, " batch"], smoothing: float = 0.0
) -> Float[Tensor, "batch batch"]:
    """Return the captions' targets for each image: equal captions share the mass of one.

    `(1 − smoothing) [g_i = g_j] / |{k: g_k = g_i}| + smoothing / batch`: the identity without
    duplicates and smoothing. Smoothing follows Szegedy et al. 2016 (section 7), uniformly over all
    columns.

    Args:
        groups: result of `caption_groups`.
        smoothing: share of the mass that is spread.
    """
    same = (groups[:, None] == groups[None, :]).float()
    return (1 - smoothing) * same / same.sum(dim=1, keepdim=True) + smoothing / len(groups)


def info_nce(
    images: Float[Tensor, "batch d_embed"],
    texts: Float[Tensor, "batch d_embed"],
    log_scale: Float[Tensor, ""],
    targets: Float[Tensor, "batch batch"],
    entropy: float = 0.0,
) -> Float[Tensor, ""]:
    """Return CLIP's symmetric contrastive loss in nats (Radford et al. 2021, figure 3).

    With `L = e^log_scale · Î T̂ᵀ` and rows of targets `P` that each sum to one:
    `−½ (mean_i Σ_j P_ij ln softmax(L_i·)_j + mean_j Σ_i P_ij ln softmax(L_·j)_i)`.

    Args:
        images: normalised or not.
        texts: normalised or not; row i belongs to image i.
        log_scale: the model's learned logit scale, as a logarithm.
        targets: result of `contrastive_targets`; symmetric.
        entropy: weight of `mean_entropy`, which is subtracted.
    """
    logits = log_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    return _both_ways(logits, targets) - entropy * mean_entropy(logits)


def similarity_of_similarities(
    images: Float[Tensor, "batch d_embed"],
    texts: Float[Tensor, "batch d_embed"],
    temperature: float = 0.07,
    smoothing: float = 0.1,
    entropy: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the loss of zer0int's CLIP-SAE-finetune and CLIP-fine-tune; it is not contrastive.

    From cosines `S = Î T̂ᵀ` it computes `Q_ij = cos(S_i·, S_·j) / temperature`: how similar image
    i's row of similarities is to caption j's column. Targets are `1 − smoothing` on the diagonal
    and `smoothing / (batch − 1)` elsewhere. Because every row and column is normalised, a prior
    logit scale cancels and gets no gradient; equal captions are negatives of each other.

    Args:
        images: normalised or not.
        texts: normalised or not; row i belongs to image i.
        temperature: temperature of the softmax; 0.07 in his scripts.
        smoothing: share spread over the batch; 0.1 in his scripts.
        entropy: weight of `mean_entropy`, which is subtracted; 0.02 in his script that has it.

    Raises:
        UserError: the batch has one row, for which smoothing is not defined.
    """
    n = len(images)
    if n < 2:
        raise UserError("similarity_of_similarities needs a batch of two images or more.")
    similarities = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    rows, columns = F.normalize(similarities, dim=1), F.normalize(similarities.T, dim=1)
    logits = rows @ columns.T / temperature
    targets = torch.full_like(logits, smoothing / (n - 1)).fill_diagonal_(1 - smoothing)
    return _both_ways(logits, targets) - entropy * mean_entropy(logits)


def mean_entropy(logits: Float[Tensor, "batch batch"]) -> Float[Tensor, ""]:
    """Return the mean entropy, in nats, of the softmax over rows and over columns.

    Subtracted from a loss, it keeps predictions from becoming overconfident (Pereyra et al. 2017,
    section 3); zer0int's script calls it an overfitting penalty.
    """
    found = []
    for each in (logits, logits.T):
        logs = each.log_softmax(dim=1)
        found.append(-(logs.exp() * logs).sum(dim=1).mean())
    return (found[0] + found[1]) / 2


def distillation(
    embeddings: Float[Tensor, "batch d_embed"], originals: Float[Tensor, "batch d_embed"]
) -> Float[Tensor, ""]:
    """Return how far embeddings have moved from the original model's: the mean of 1 − cosine.

    That is half the squared distance of the unit vectors. It involves no text and no class, so it
    preserves everything that the original can do with such images, not only the measured classes.
    """
    return (1 - F.cosine_similarity(embeddings, originals, dim=-1)).mean()


def _both_ways(logits: Tensor, targets: Tensor) -> Tensor:
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets.T)) / 2
