from __future__ import annotations

import numpy as np
import pytest
import torch

from latent_parts import SITE, TensorActivations, make_sae, save_clip, save_pictures
from naming_parts import latents_of
from sparsight.errors import UserError
from sparsight.evaluation.baselines import untrained
from sparsight.images import load_batches, open_images
from sparsight.naming.null import (
    MIN_IMAGES,
    UntrainedLatents,
    fit_null,
    most_false_names,
)
from sparsight.naming.scores import Candidates, LatentActivations, Method
from sparsight.naming.untrained import untrained_activations
from sparsight.vision import load_model

N_IMAGES = 20


class Given(Method):
    """A method whose score is a latent's activation in one image."""

    name = "given"
    words = ("a",)

    def __init__(self, image: int) -> None:
        self.image = image

    def candidates(self, activations: LatentActivations, n: int = 1) -> Candidates:
        offsets = activations.rows.offsets
        score = np.array(activations.rows.values[offsets[:-1] + self.image], np.float64)[:, None]
        return Candidates(np.zeros_like(score, dtype=np.int64), score)


def random_latents(n: int, seed: int) -> LatentActivations:
    return latents_of(np.random.default_rng(seed).random((n, N_IMAGES)).astype(np.float32) + 0.01)


def test_a_threshold_keeps_its_promise_in_19_of_20_draws() -> None:
    n, rate = 400, 0.05
    allowed = most_false_names(n, rate)
    assert allowed is not None
    # The share of a uniform population above the (n − allowed)-th smallest of n scores.
    draws = np.sort(np.random.default_rng(0).random((20_000, n)), axis=1)
    kept = (1 - draws[:, n - allowed - 1] <= rate).mean()
    one_more = (1 - draws[:, n - allowed - 2] <= rate).mean()
    assert kept >= 0.945 and one_more < 0.95


@pytest.mark.parametrize("methods", [1, 3])
def test_all_methods_together_give_no_more_false_names_than_asked(methods: int) -> None:
    latents = UntrainedLatents.of(random_latents(4000, 0), random_latents(4000, 1))
    null = fit_null([Given(image) for image in range(methods)], latents, 0.05)
    assert null.n_threshold == 2000 and null.n_check == 4000
    assert 0.03 < null.measured < 0.055
    assert null.false_names_together <= sum(null.false_names)
    allowed = most_false_names(2000, 0.05)
    above = np.zeros(2000, dtype=bool)
    for method, threshold in zip(null.methods, null.thresholds, strict=True):
        above |= method.candidates(latents.threshold, 1).score[:, 0] > threshold
    assert above.sum() <= allowed  # type: ignore[operator]
    if methods == 1:
        assert above.sum() == allowed


def test_the_parts_of_the_null_share_no_latent_and_all_fire_often_enough() -> None:
    dense = np.ones((100, N_IMAGES), np.float32)
    dense[::10, MIN_IMAGES - 1 :] = 0
    latents = UntrainedLatents.of(latents_of(dense), latents_of(dense))
    parts = [set(part.latents) for part in (latents.fitting, latents.threshold)]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 90
    assert latents.check.n_images.min() >= MIN_IMAGES


def test_too_few_untrained_latents_or_a_strange_rate_are_refused() -> None:
    few = UntrainedLatents.of(random_latents(40, 0), random_latents(40, 1))
    with pytest.raises(UserError, match=r"Only 20 untrained latents .*at least 59 are needed"):
        fit_null([Given(0)], few, 0.05)
    with pytest.raises(UserError, match="--false-names is 5"):
        fit_null([Given(0)], few, 5)


def test_latents_of_several_untrained_saes_are_joined_in_order() -> None:
    parts = [random_latents(3, 0), random_latents(5, 1)]
    whole = LatentActivations.joined(parts)
    assert len(whole) == 8
    np.testing.assert_array_equal(
        whole.rows.values, np.concatenate([part.rows.values for part in parts])
    )
    assert torch.equal(whole.decoder[3:], parts[1].sae.W_dec)
    some = whole.select(np.array([1, 6]))
    np.testing.assert_array_equal(
        some.rows.values[N_IMAGES:], parts[1].rows.values[3 * N_IMAGES : 4 * N_IMAGES]
    )
    assert torch.equal(some.decoder[1], parts[1].sae.W_dec[3])


def test_untrained_activations_are_the_image_maxima_of_untrained_codes(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("untrained")
    model = load_model(str(save_clip(folder / "clip")), device="cpu")
    source = open_images(save_pictures(folder / "pictures"))
    batches = load_batches(source, model.transform, 12, workers=0)
    x = torch.cat([model.read(batch.pixels, [SITE])[SITE] for batch in batches])
    given, sae = TensorActivations(x, source, model), make_sae()

    (found,) = untrained_activations(sae, given, SITE, 4.0, [5], len(source), quiet=True)
    fresh = untrained(sae, x.flatten(0, 1)[:4096], 5, 4)
    code = fresh.encode(x.flatten(0, 1))
    dense = torch.zeros(len(x) * x.shape[1], sae.n_latents)
    dense[code.rows, code.indices] = code.values
    strongest = dense.view(len(x), x.shape[1], -1).amax(dim=1).numpy()
    assert sorted(found.latents) == list(range(sae.n_latents))
    for row, latent in enumerate(found.latents):
        start, stop = found.rows.offsets[row : row + 2]
        images = found.rows.columns[start:stop]
        assert images.tolist() == np.nonzero(strongest[:, latent])[0].tolist()
        np.testing.assert_allclose(found.rows.values[start:stop], strongest[images, latent])

    (few,) = untrained_activations(
        sae, given, SITE, 4.0, [5], len(source), most_entries=60, quiet=True
    )
    kept = len(few)
    assert 0 < kept < sae.n_latents and few.rows.offsets[-1] <= 60
    np.testing.assert_array_equal(few.latents, found.latents[:kept])
    np.testing.assert_array_equal(few.rows.values, found.rows.values[: len(few.rows.values)])
