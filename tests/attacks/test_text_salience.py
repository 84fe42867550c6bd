"""Tests of latents for a response to words: against brute force, and under the null."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow.csv
import pytest
import torch

from editing_parts import activations, belonging, make_sae
from sparsight.attacks import (
    Target,
    benjamini_hochberg,
    causal_check,
    find_text_salient,
    make_pairs,
    sign_flip_p,
)
from sparsight.attacks.causal import draw_like
from sparsight.errors import SparsightError, UserError
from sparsight.images import load_batches, open_images
from sparsight.sae import SAEConfig, TopK

SITE = "blocks.2.resid_post"
N = 12


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(open_images(f"calibration:{N}:990001:single"))


@pytest.fixture(scope="module")
def sae(calibration):
    scenes = open_images("calibration:9")
    pixels = torch.stack([calibration.transform(scenes.load(i)) for i in range(9)])
    x = activations(calibration, pixels, SITE)
    config = SAEConfig(96, sparsity=TopK(6))
    return make_sae(192, config, x=x, metadata=belonging(calibration, SITE))


def dense_codes(model, sae, source):
    (batch,) = load_batches(source, model.transform, len(source), workers=0)
    x = model.read(batch.pixels, [SITE])[SITE]
    with torch.no_grad():
        code = sae.encode(x.flatten(0, 1)).dense()
    return code.view(len(source), 65, -1).numpy().astype(np.float64)


@pytest.mark.parametrize("statistic", ["mean", "max"])
def test_effects_and_densities_are_those_of_dense_codes(calibration, sae, pairs, statistic):
    table = find_text_salient(
        calibration, pairs, sae, statistic=statistic, permutations=99, workers=0
    )
    codes = {
        kind: dense_codes(calibration, sae, pairs.source(kind))
        for kind in ("clean", "control", "attacked")
    }
    pooled = {
        kind: each.mean(axis=1) if statistic == "mean" else each.max(axis=1)
        for kind, each in codes.items()
    }
    difference = pooled["attacked"] - pooled["control"]
    np.testing.assert_allclose(table.effect, difference.mean(axis=0), atol=1e-5)
    size = difference.mean(axis=0) / np.maximum(difference.std(axis=0, ddof=1), 1e-12)
    np.testing.assert_allclose(table.effect_size, size, atol=1e-3)
    active = np.stack([each != 0 for each in codes.values()]).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(table.density, active, atol=1e-9)
    np.testing.assert_allclose(table.mean["clean"], pooled["clean"].mean(axis=0), atol=1e-5)
    a, b = pooled["attacked"].mean(axis=0), pooled["control"].mean(axis=0)
    heard = a + b > 0
    np.testing.assert_allclose(table.selectivity[heard], ((a - b) / (a + b))[heard], atol=1e-4)


def test_neurons_of_an_mlp_are_tested_like_latents(calibration, pairs):
    site = "blocks.1.mlp_post"
    table = find_text_salient(
        calibration, pairs, site=site, contrast="writing", permutations=99, workers=0
    )
    read = {}
    for kind in ("control", "clean"):
        (batch,) = load_batches(pairs.source(kind), calibration.transform, N, workers=0)
        read[kind] = calibration.read(batch.pixels, [site])[site].mean(dim=1).double().numpy()
    np.testing.assert_allclose(
        table.effect, (read["control"] - read["clean"]).mean(axis=0), atol=1e-5
    )
    assert len(table) == 768 and table.about["unit"] == "neuron"
    assert (table.about["contrast"], table.about["compares"]) == ("writing", "control - clean")


@pytest.mark.parametrize("alternative", ["greater", "two-sided"])
def test_every_flip_of_few_pairs_gives_the_exact_p(alternative):
    difference = np.random.default_rng(1).normal(0.4, 1, (7, 5))
    found = sign_flip_p(difference, permutations=200, alternative=alternative)
    seen = difference.mean(axis=0)
    flips = np.array(list(itertools.product((1, -1), repeat=7))) @ difference / 7
    if alternative == "greater":
        expected = (flips >= seen - 1e-12).mean(axis=0)
    else:
        expected = (np.abs(flips) >= np.abs(seen) - 1e-12).mean(axis=0)
    np.testing.assert_allclose(found, expected)


def test_random_flips_come_near_the_exact_p_and_repeat_exactly():
    difference = np.random.default_rng(2).normal(0.3, 1, (12, 40))
    exact = sign_flip_p(difference, permutations=2**12)
    near = sign_flip_p(difference, permutations=2**12 - 1, seed=5)
    assert np.abs(exact - near).max() < 0.03
    assert (near == sign_flip_p(difference, permutations=2**12 - 1, seed=5)).all()
    assert near.min() >= 1 / 2**12


def test_flips_that_change_nothing_count_as_the_observation():
    """Half of the flips change nothing for a latent that is active on only one pair."""
    difference = np.zeros((30, 1))
    difference[3] = 0.1
    assert sign_flip_p(difference, permutations=999)[0] == pytest.approx(0.5, abs=0.06)


def test_few_flips_say_how_many_must_be_found_together(calibration, pairs):
    some = pairs.select(range(12))
    table = find_text_salient(
        calibration, some, site="blocks.2.mlp_post", permutations=99, workers=0
    )
    n, fewest = table.about["n_tested"], table.fewest
    p = np.ones(n)
    p[: fewest - 1] = 1 / 100
    assert benjamini_hochberg(p).min() > 0.05
    p[:fewest] = 1 / 100
    assert benjamini_hochberg(p).min() <= 0.05
    table.about["permutations"] = 10**6
    assert table.fewest == 1


def test_q_is_that_of_benjamini_and_hochberg():
    p = np.array([0.01, 0.04, 0.03, 0.5, 0.02])
    expected = np.array([0.05, 0.05, 0.05, 0.5, 0.05])
    np.testing.assert_allclose(benjamini_hochberg(p), expected)
    for rate in (0.05, 0.2):
        ordered = np.sort(p)
        last = max((i for i in range(5) if ordered[i] <= rate * (i + 1) / 5), default=-1)
        assert (benjamini_hochberg(p) <= rate).sum() == last + 1
    assert benjamini_hochberg(np.zeros(0)).shape == (0,)


def test_under_the_null_hardly_ever_anything_is_found():
    rng = np.random.default_rng(3)
    finds = 0
    for trial in range(40):
        difference = rng.standard_t(3, (20, 60)) * (rng.random((20, 60)) < 0.4)
        q = benjamini_hochberg(sign_flip_p(difference, permutations=999, seed=trial))
        finds += bool((q <= 0.1).any())
    assert finds <= 9  # 4 expected; 10 or more has a probability of 0.5 %


def test_among_true_responses_false_ones_keep_to_the_rate():
    rng = np.random.default_rng(4)
    shares, power = [], []
    for trial in range(20):
        difference = rng.normal(size=(40, 200))
        difference[:, :40] += 1.0
        hits = benjamini_hochberg(sign_flip_p(difference, permutations=999, seed=trial)) <= 0.1
        shares.append(hits[40:].sum() / max(1, hits.sum()))
        power.append(hits[:40].mean())
    assert np.mean(shares) <= 0.1
    assert np.mean(power) > 0.9


def test_neurons_that_see_the_band_or_letters_are_found_by_their_contrast(calibration, pairs):
    """The neurons of an early block see that there is writing, but hardly what it says."""
    found = {
        contrast: find_text_salient(
            calibration, pairs, site="blocks.0.mlp_post", contrast=contrast, workers=0
        )
        for contrast in ("writing", "word")
    }
    assert len(found["writing"].found) > 10 * max(1, len(found["word"].found))
    table = found["writing"]
    assert set(table.selective) <= set(table.found)
    assert (table.q[table.found] <= 0.05).all() and (table.effect[table.found] > 0).all()
    sizes = table.effect_size[table.found]
    assert (np.diff(sizes) <= 0).all()
    assert table.select(3) == table.selective[:3]


def test_a_table_is_written_and_read_again(calibration, sae, pairs, tmp_path):
    table = find_text_salient(
        calibration, pairs, sae, contrast="attack", permutations=99, workers=0
    )
    again = type(table).load(table.save(tmp_path / "found"))
    assert again.about == table.about and again.found == table.found
    for name in ("effect", "effect_size", "selectivity", "p", "q", "density", "tested"):
        assert (getattr(again, name) == getattr(table, name)).all()
    rows = pyarrow.csv.read_csv(tmp_path / "found" / "salience.csv")
    assert rows["latent"].to_pylist() == table.table()["latent"].to_pylist()
    (tmp_path / "found" / "salience.parquet").write_bytes(b"PAR1")
    with pytest.raises(SparsightError, match="is damaged"):
        type(table).load(tmp_path / "found")
    with pytest.raises(UserError, match="no such file"):
        type(table).load(tmp_path / "nowhere")


def test_random_latents_have_the_density_of_those_found(calibration, pairs):
    table = find_text_salient(
        calibration, pairs, site="blocks.1.mlp_post", contrast="writing", workers=0
    )
    chosen = table.found[:20]
    rng = np.random.default_rng(0)
    draws = [draw_like(table, chosen, rng) for _ in range(5)]
    for drawn in draws:
        assert len(set(drawn)) == 20 and not set(drawn) & set(table.found)
        near = np.sort(table.density[drawn]) - np.sort(table.density[chosen])
        assert np.abs(near).max() < 0.1
    assert draws[0] != draws[1]
    with pytest.raises(UserError, match=r"as many others for comparison, but only \d+ of 768"):
        draw_like(table, list(range(760)), rng)


def test_switching_off_what_sees_writing_wins_back_lost_accuracy(calibration, pairs):
    """Neurons of two blocks at once, and random ones; the full measurement is a benchmark."""
    some = make_pairs(open_images("calibration:16:77:single"))
    targets = [
        Target(
            find_text_salient(
                calibration, pairs, site=f"blocks.{i}.mlp_post", contrast="attack",
                selectivity=0.5, workers=0,
            )
        )
        for i in (1, 2)
    ]  # fmt: skip
    report = causal_check(calibration, some, targets, draws=2, workers=0)
    assert report.loss == pytest.approx(
        report.original["clean"].value - report.original["attacked"].value
    )
    won = report.found.accuracy["attacked"].value - report.original["attacked"].value
    assert report.found.won_back.value == pytest.approx(won / report.loss)
    assert len(report.random.draws) == 2
    assert not report.same_pictures and len(report.edits) == 2
    assert report.to_dict()["random"]["density"] == pytest.approx(report.density, abs=0.1)
    head, *rows = report.table()
    assert [row[0] for row in rows] == ["unedited", "found", "random ×2"]
    assert all(len(row) == len(head) for row in rows)
    again = causal_check(calibration, some, targets, draws=2, workers=0)
    assert again.to_dict() == report.to_dict()


def test_measuring_on_the_images_of_the_search_is_reported(calibration, pairs):
    table = find_text_salient(
        calibration, pairs, site="blocks.2.mlp_post", contrast="attack", workers=0
    )
    report = causal_check(calibration, pairs, Target(table, table.found[:3]), draws=0, workers=0)
    assert report.same_pictures == len(pairs) and report.random is None


def test_some_images_of_the_search_among_others_are_reported(calibration, pairs):
    search, rest = pairs.halves()
    table = find_text_salient(
        calibration, search, site="blocks.2.mlp_post", contrast="attack", workers=0
    )
    target = Target(table, table.found[:3])
    assert causal_check(calibration, rest, target, draws=0, workers=0).same_pictures == 0
    report = causal_check(calibration, pairs, target, draws=0, workers=0)
    assert report.same_pictures == len(search)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contrast": "words"}, "contrast is 'words'; expected word or writing or attack"),
        ({"statistic": "sum"}, "expected mean or max"),
        ({"alternative": "less"}, "expected greater or two-sided"),
        ({"fdr": 1.0}, "fdr is 1.0"),
        ({"permutations": 5}, "with fewer than 19"),
        ({"selectivity": 2.0}, "between -1 and 1"),
        ({"site": None}, "No site is given"),
        ({"site": "blocks.9.mlp_post"}, "has no site 'blocks.9.mlp_post'"),
        ({"site": "embedding", "tokens": "patchez"}, "expected all or patches or cls"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_settings_of_the_test_are_refused(calibration, pairs, options, message):
    with pytest.raises(UserError, match=message):
        find_text_salient(calibration, pairs, **{"site": "blocks.1.mlp_post", **options})


def test_an_sae_of_another_model_or_of_another_table_is_refused(calibration, pairs, sae):
    other = make_sae(192, metadata={"model": {"id": "other", "weights_hash": "abc"}, "site": SITE})
    with pytest.raises(UserError, match="was trained on other"):
        find_text_salient(calibration, pairs, other, workers=0)
    table = find_text_salient(calibration, pairs.select(range(4)), sae, permutations=99, workers=0)
    with pytest.raises(UserError, match="give the SAE, too"):
        Target(table, [1])
    with pytest.raises(UserError, match="was made with a different SAE"):
        Target(table, [1], other)
    with pytest.raises(UserError, match="has no latent 96, only 0 to 95"):
        Target(table, [96], sae)
    with pytest.raises(UserError, match=r"none with a selectivity of at least 0\.9"):
        Target(table, None, sae)


def test_one_pair_is_too_few(calibration, pairs):
    with pytest.raises(UserError, match="1 of 1 images load in every kind; at least two"):
        find_text_salient(calibration, pairs.select([0]), site="blocks.0.mlp_post", workers=0)
