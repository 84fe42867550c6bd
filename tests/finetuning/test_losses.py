"""Each loss against plain float64 loops, and how InfoNCE differs from the loss called so."""

from __future__ import annotations

import math

import pytest
import torch

from sparsight.errors import UserError
from sparsight.finetuning.losses import (
    caption_groups,
    contrastive_targets,
    distillation,
    info_nce,
    mean_entropy,
    similarity_of_similarities,
)
from sparsight.vision import contrastive_loss


@pytest.fixture
def pairs():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(5, 8, generator=draw, dtype=torch.float64) for _ in range(2)]


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(
        sum(a * a for a in x) * sum(b * b for b in y)
    )


def cross_entropies(logits, targets):
    """Return the mean over rows of −Σ p ln softmax, in plain Python."""
    total = 0.0
    for row, wanted in zip(logits, targets, strict=True):
        whole = math.log(sum(math.exp(value) for value in row))
        total -= sum(p * (value - whole) for p, value in zip(wanted, row, strict=True))
    return total / len(logits)


def turned(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def by_hand(images, texts, scale, targets):
    logits = [[scale * cosine(i, t) for t in texts.tolist()] for i in images.tolist()]
    return (cross_entropies(logits, targets) + cross_entropies(turned(logits), turned(targets))) / 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_info_nce_is_the_formula_in_plain_loops(pairs, smoothing):
    captions = ["a", "b", "a", "c", "d"]
    targets = contrastive_targets(caption_groups(captions), smoothing)
    rows = [[0.0] * 5 for _ in range(5)]
    for i, own in enumerate(captions):
        for j, other in enumerate(captions):
            share = (own == other) / captions.count(own)
            rows[i][j] = (1 - smoothing) * share + smoothing / 5
    torch.testing.assert_close(targets, torch.tensor(rows))
    scale = torch.tensor(math.log(14.0), dtype=torch.float64)
    found = info_nce(*pairs, scale, targets.double())
    assert float(found) == pytest.approx(by_hand(*pairs, 14.0, rows), rel=1e-7)


def test_without_duplicates_and_smoothing_info_nce_is_clips_loss(pairs):
    images, texts = (each.float() for each in pairs)
    targets = contrastive_targets(caption_groups(list("abcde")))
    found = info_nce(images, texts, torch.tensor(14.0).log(), targets)
    torch.testing.assert_close(found, contrastive_loss(images, texts, 14.0))


def test_equal_captions_are_not_negatives_of_each_other(pairs):
    """If each row wanted only its own caption, a model that is right about duplicates would pay."""
    images = torch.eye(4)[[0, 1, 0, 2]]
    shared = contrastive_targets(caption_groups(["a", "b", "a", "c"]))
    scale = torch.tensor(50.0).log()
    assert info_nce(images, images, scale, torch.eye(4)) == pytest.approx(math.log(2) / 2, rel=1e-3)
    images.requires_grad_(True)
    info_nce(images, images.detach(), scale, shared).backward()
    assert images.grad.abs().max() < 1e-6


def similar_by_hand(images, texts, temperature, smoothing, entropy):
    cosines = [[cosine(i, t) for t in texts.tolist()] for i in images.tolist()]
    logits = [[cosine(row, column) / temperature for column in turned(cosines)] for row in cosines]
    n = len(logits)
    targets = [
        [1 - smoothing if i == j else smoothing / (n - 1) for j in range(n)] for i in range(n)
    ]
    loss = (cross_entropies(logits, targets) + cross_entropies(turned(logits), targets)) / 2
    for rows in (logits, turned(logits)):
        soft = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in rows]
        loss -= entropy / 2 * cross_entropies([[math.log(p) for p in row] for row in soft], soft)
    return loss


@pytest.mark.parametrize("entropy", [0.0, 0.02])
def test_similarity_of_similarities_is_the_published_formula_in_plain_loops(pairs, entropy):
    found = similarity_of_similarities(*pairs, 0.07, 0.1, entropy)
    assert float(found) == pytest.approx(similar_by_hand(*pairs, 0.07, 0.1, entropy), rel=1e-9)


def test_a_logit_scale_moves_info_nce_and_cancels_in_similarity_of_similarities(pairs):
    """The published loss takes logits, and its normalisation removes their scale."""
    targets = torch.eye(5, dtype=torch.float64)
    scales = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in (1.0, 4.0)]
    values = [info_nce(*pairs, scale, targets) for scale in scales]
    values[0].backward()
    assert abs(values[0] - values[1]) > 0.1
    assert scales[0].grad.abs() > 1e-3
    images, texts = (torch.nn.functional.normalize(each, dim=1) for each in pairs)
    found = []
    for scale in (1.0, 50.0):
        logits = scale * images @ texts.T
        rows, columns = (torch.nn.functional.normalize(x, dim=1) for x in (logits, logits.T))
        found.append((rows @ columns.T / 0.07).log_softmax(1).diagonal().mean())
    assert found[0] == pytest.approx(float(found[1]), rel=1e-12)
    ours = similarity_of_similarities(*pairs, smoothing=0.0)
    assert float(ours) == pytest.approx(
        float(similarity_of_similarities(7 * pairs[0], pairs[1], smoothing=0.0))
    )


def test_similarity_of_similarities_needs_two_images(pairs):
    with pytest.raises(UserError, match="two images"):
        similarity_of_similarities(pairs[0][:1], pairs[1][:1])


def test_distillation_is_half_the_squared_distance_of_unit_vectors(pairs):
    images, originals = pairs
    units = [torch.nn.functional.normalize(each, dim=1) for each in pairs]
    half = ((units[0] - units[1]) ** 2).sum(dim=1).mean() / 2
    torch.testing.assert_close(distillation(images, originals), half)
    assert distillation(3 * images, images) == pytest.approx(0, abs=1e-12)


def test_subtracting_entropy_makes_confident_predictions_cost_more(pairs):
    targets = torch.eye(5, dtype=torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64)
    plain, with_it = (info_nce(*pairs, scale, targets, weight) for weight in (0.0, 0.02))
    images, texts = (torch.nn.functional.normalize(each, dim=1) for each in pairs)
    entropy = mean_entropy(scale.exp() * images @ texts.T)
    torch.testing.assert_close(plain - with_it, 0.02 * entropy)
    assert mean_entropy(torch.zeros(5, 5)) == pytest.approx(math.log(5))
