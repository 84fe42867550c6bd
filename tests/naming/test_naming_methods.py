from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from naming_parts import latents_of, random_activations, space_of
from sparsight.errors import UserError
from sparsight.naming import image_space, scores
from sparsight.naming.labels import MIN_SUPPORT, LabelMethod
from sparsight.naming.text import Centroid, TextCorrelation

N_IMAGES, N_WORDS = 60, 11


def word_vectors() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return normalize(torch.randn(N_WORDS, 6, generator=generator) + 1, dim=1)


WORDS = [f"word {i}" for i in range(N_WORDS)]


def dense_scores(method: TextCorrelation | Centroid, dense: np.ndarray) -> np.ndarray:
    out = np.full((len(dense), N_WORDS), np.nan)
    for block in method.blocks(latents_of(dense)):
        out[block.latents.start : block.latents.stop, block.words.start : block.words.stop] = (
            block.score.numpy()
        )
    return out


def test_a_text_score_is_the_correlation_with_the_whitened_similarity_over_all_read_images() -> (
    None
):
    unread = (4, 31)
    space = space_of(N_IMAGES, unread=unread)
    dense = random_activations(7, N_IMAGES)
    dense[:, unread] = 0
    found = dense_scores(TextCorrelation(space, WORDS, word_vectors()), dense)

    images, words = space.matrix.double().numpy(), word_vectors().double().numpy()
    images, words = images - images.mean(axis=0), words - words.mean(axis=0)
    covariance = images.T @ images / len(images)
    ridge = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    similarity = images @ np.linalg.inv(covariance + ridge) @ words.T
    expected = np.corrcoef(dense[:, space.places], similarity.T)[:7, 7:]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_centroid_is_compared_with_words_after_both_are_centred() -> None:
    space, dense = space_of(N_IMAGES), random_activations(5, N_IMAGES)
    found = dense_scores(Centroid(space, WORDS, word_vectors()), dense)
    words = normalize(word_vectors() - word_vectors().mean(dim=0), dim=1)
    for latent, activation in enumerate(dense):
        strongest = np.argsort(-activation, kind="stable")[:16]
        strongest = strongest[activation[strongest] > 0]
        mean = (space.matrix[strongest] - space.matrix.mean(dim=0)).sum(dim=0)
        expected = words @ normalize(mean, dim=0)
        np.testing.assert_allclose(found[latent], expected.numpy(), atol=1e-5)


def test_blocks_of_images_words_and_latents_change_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, untrained = random_activations(9, N_IMAGES), random_activations(20, N_IMAGES, seed=1)

    def names() -> scores.Candidates:
        method = TextCorrelation(space_of(N_IMAGES), WORDS, word_vectors())
        return method.calibrated(latents_of(untrained)).candidates(latents_of(dense))

    whole = names()
    monkeypatch.setattr(image_space, "IMAGES_AT_ONCE", 7)
    monkeypatch.setattr("sparsight.naming.text.WORDS_AT_ONCE", 3)
    monkeypatch.setattr(
        scores.LatentActivations, "blocks",
        lambda self: iter([range(0, 2), range(2, 3), range(3, len(self))] if len(self) > 3 else []),
    )  # fmt: skip
    parts = names()
    np.testing.assert_array_equal(whole.word, parts.word)
    np.testing.assert_allclose(whole.score, parts.score, rtol=1e-3)


def test_standardised_words_have_mean_0_and_deviation_1_on_untrained_latents() -> None:
    untrained = latents_of(random_activations(50, N_IMAGES, seed=2))
    method = TextCorrelation(space_of(N_IMAGES), WORDS, word_vectors()).calibrated(untrained)
    z = torch.cat([method._standardised(block) for block in method.blocks(untrained)])
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(N_WORDS), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(dim=0, correction=0), torch.ones(N_WORDS), atol=1e-4, rtol=0)


def test_latents_that_never_fire_or_always_fire_alike_get_finite_scores() -> None:
    dense = np.zeros((2, N_IMAGES), np.float32)
    dense[1] = 2.0
    found = dense_scores(TextCorrelation(space_of(N_IMAGES), WORDS, word_vectors()), dense)
    np.testing.assert_allclose(found, 0, atol=1e-3)


def labelled(n: int, seed: int = 0) -> list[str | None]:
    random = np.random.default_rng(seed)
    return [(*"abcd", None)[i] for i in random.integers(0, 5, n)]


def brute_force(
    method: LabelMethod, labels: list[str | None], activation: np.ndarray, least: float
) -> dict[str, tuple[float, float, float]]:
    """For each label: held-out F1, precision and threshold, found by trying all thresholds."""
    held_out = method._held_out
    known = np.array([label is not None for label in labels])
    found = {}
    for label in method.words:
        own = np.array([each == label for each in labels])

        def figures(
            threshold: float, half: np.ndarray, own: np.ndarray = own
        ) -> tuple[float, float, int]:
            above = (activation >= threshold) & (activation > 0) & half & known
            hits = int((above & own).sum())
            precision = hits / max(1, int(above.sum()))
            return 2 * hits / (above.sum() + (own & half).sum()), precision, hits

        best: tuple[float, float] | None = None
        for threshold in sorted({*activation[(activation > 0) & ~held_out & known]}, reverse=True):
            f1, precision, hits = figures(threshold, ~held_out)
            good = precision >= least and hits >= MIN_SUPPORT
            if good and (best is None or f1 > best[0] + 1e-12):
                best = (f1, threshold)
        if best is not None:
            f1, precision, hits = figures(best[1], held_out)
            if precision >= least and hits >= MIN_SUPPORT:
                found[label] = (f1, precision, best[1])
    return found


@pytest.mark.parametrize("ties", [False, True])
def test_labels_and_thresholds_equal_those_found_by_trying_all(ties: bool) -> None:
    n, least = 300, 0.3
    labels = labelled(n)
    dense = random_activations(30, n)
    for latent, label in enumerate("abcd"):
        dense[latent] += [float(each == label) for each in labels]
    if ties:
        dense = np.round(dense * 3).astype(np.float32)
    method = LabelMethod(labels, np.arange(n), n, least)
    found = method.candidates(latents_of(dense))
    n_named = 0
    for latent, activation in enumerate(dense):
        expected = brute_force(method, labels, activation, least)
        words = [method.words[word] for word in found.word[latent] if word >= 0]
        assert set(words) == set(expected), latent
        for place, word in enumerate(words):
            f1, precision, threshold = expected[word]
            assert found.score[latent, place] == pytest.approx(f1)
            assert found.figures["precision"][latent, place] == pytest.approx(precision)
            assert found.figures["activation"][latent, place] == pytest.approx(threshold)
        assert list(found.score[latent]) == sorted(found.score[latent], reverse=True)
        n_named += bool(words)
    assert n_named >= 4


def test_a_label_that_fits_only_the_half_on_which_it_was_chosen_is_dropped() -> None:
    n = 200
    labels: list[str | None] = [("a", "b")[i % 2] for i in range(n)]
    method = LabelMethod(labels, np.arange(n), n)
    fires = np.array([label == "a" for label in labels])
    both, one = fires.astype(np.float32), fires.astype(np.float32)
    one[method._held_out] = 1 - one[method._held_out]
    found = method.candidates(latents_of(np.stack([both, one])))
    assert method.words[found.word[0, 0]] == "a"
    assert found.score[0, 0] == found.figures["precision"][0, 0] == 1
    assert found.figures["lift"][0, 0] == pytest.approx(2)
    assert (found.word[1] == -1).all() and np.isneginf(found.score[1]).all()


@pytest.mark.parametrize(
    ("labels", "words"), [([None, None], "no labels"), (["x", "x"], "only the label 'x'")]
)
def test_images_without_different_labels_are_refused(labels: list[str | None], words: str) -> None:
    with pytest.raises(UserError, match=f"{words}.*--by text"):
        LabelMethod(labels, np.arange(2), 2)
