"""The whole loop on the calibration CLIP: words fool it; latents are found and switched off."""

from __future__ import annotations

import pytest

import sparsight as sp
from sparsight.attacks import Target, causal_check, find_text_salient, make_pairs

SITE = "blocks.2.resid_post"


@pytest.mark.slow
def test_words_fool_the_model_through_latents_that_see_writing(calibration, tmp_path):
    store = sp.extract(
        calibration, sp.open_images("calibration:1500:0"), sites=[SITE], out=tmp_path / "store",
        workers=0, quiet=True,
    )  # fmt: skip
    config = sp.TrainConfig(
        sae=sp.SAEConfig(n_latents=1024, sparsity=sp.TopK(k=16)),
        n_vectors=400_000,
        batch_size=1024,
        lr=1e-3,
        remedy=sp.AuxK(alpha=1 / 8, dead_after=40_000),
    )
    sae = sp.train(store, config, out=tmp_path / "run", quiet=True).sae(SITE)
    search = make_pairs(sp.open_images("calibration:300:5001:single"))
    rest = make_pairs(sp.open_images("calibration:200:990000:single"))
    table = find_text_salient(calibration, search, sae, contrast="attack", workers=0)
    report = causal_check(calibration, rest, Target(table, sae=sae), draws=3, workers=0)

    assert report.loss >= 0.2
    assert report.found.won_back.value >= 0.6
    assert report.found.clean_change.value >= -0.02
    assert report.random.won_back.value <= 0.1
    assert report.random.density == pytest.approx(report.density, rel=0.2)
