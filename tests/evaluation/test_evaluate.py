from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation_parts import (
    SITE,
    Pictures,
    Scenes,
    TensorActivations,
    make_sae,
    perfect_sae,
)
from sparsight.activations import LiveActivations, extract
from sparsight.errors import SparsightError, UserError
from sparsight.evaluation import Passes, evaluate, evaluator
from sparsight.evaluation.report import finite
from sparsight.files import read_json
from sparsight.images import sample_places
from sparsight.sae import Normaliser, SAEConfig, SparseAutoencoder, TopK

N_SCENES = 100
HEADLINES = [
    "fvu",
    "explained_variance",
    "mse",
    "clipscope_mse",
    "clipscope_ev",
    "clipscope_dead",
    "fvu_batch",
    "cosine",
    "relative_bias",
    "l0",
    "l0_cls",
    "l0_patches",
    "dead",
    "dead_window",
    "n_vectors",
    "fvu_by_position",
    "mse_by_position",
    "normalised",
    "density",
    "low_density",
    "zero_shot",
    "contrastive",
    "truth",
    "truth_summary",
    "truth_skipped",
    "truth_scenes",
    "latent_names",
    "baselines",
    "omitted",
]


@pytest.fixture(scope="module")
def scenes(calibration):
    """An SAE of the calibration model, and the data to measure it on."""
    images = Scenes(N_SCENES, 3)
    site = "blocks.1.resid_post"
    live = LiveActivations(calibration, images, [site], "all", workers=0)
    statistics = live.stats(site)
    normaliser = Normaliser.fit("standardise", statistics.mean, statistics.second_moment)
    config = SAEConfig(n_latents=256, sparsity=TopK(8), normaliser="standardise")
    sae = SparseAutoencoder(
        calibration.d_in(site),
        config,
        normaliser=normaliser,
        seed=3,
        metadata={"site": site, "tokens": "all", "model": dict(live.model_info)},
    ).requires_grad_(False)
    return sae, live


@pytest.fixture(scope="module")
def report(scenes):
    return evaluate(*scenes, workers=0, quiet=True)


def assert_equal(one, other, path):
    """Compare up to rounding, except figures that depend on batches by definition."""
    if isinstance(one, dict):
        assert set(one) == set(other), path
        for key in one:
            if key not in ("fvu_batch", "fvu_batch_images"):
                assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, float | list | tuple):
        assert one == pytest.approx(other, rel=1e-3, abs=2e-4), path
    else:
        assert one == other, path


def noise(n=30, tokens=17, d=32, seed=0):
    return torch.randn(n, tokens, d, generator=torch.Generator().manual_seed(seed)) + 1


def test_the_report_has_every_figure_and_the_baselines(report):
    metrics = report.metrics
    assert [key for key in HEADLINES if key not in metrics] == []
    assert metrics["omitted"] == {}
    assert set(metrics["zero_shot"]) == {"original", "reconstructed", "zero", "mean"}
    assert set(metrics["baselines"]) == {"untrained", "pca", "neurons"}
    for block in metrics["baselines"].values():
        assert 0 <= block["fvu"] <= 1.5 and block["normalised"]["fvu"] is not None
        assert set(block["truth"]) == set(metrics["truth"])
        assert 0 <= block["zero_shot"]["reconstructed"]["top1"] <= 1
        assert block["l0"] == pytest.approx(metrics["l0"], abs=0.5)
    entry = next(iter(metrics["truth"].values()))
    assert {"latent", "auc", "f1", "iou", "n_positive"} <= set(entry)
    assert metrics["n_vectors"] == N_SCENES * 65 and len(metrics["fvu_by_position"]) == 65


def test_figures_equal_those_of_the_whole_matrix_in_both_spaces(scenes, report):
    sae, live = scenes
    x = torch.cat([b.activations[live.sites[0]] for b in live.ordered(live.sites)]).flatten(0, 1)
    x_hat, code = sae(x)
    raw = (x.double(), x_hat.double())
    spaces = {"raw": raw, "normalised": [sae.normaliser(each).double() for each in (x, x_hat)]}
    for name, (v, w) in spaces.items():
        block = report.metrics if name == "raw" else report.metrics["normalised"]
        fvu = (v - w).square().sum() / (v - v.mean(dim=0)).square().sum()
        assert block["fvu"] == pytest.approx(float(fvu), rel=1e-5)
        assert block["clipscope_mse"] == pytest.approx(float((v - w).square().sum(1).mean()), 1e-5)
    dense = code.dense() > 0
    assert report.metrics["l0"] == pytest.approx(float(dense.sum(1).double().mean()))
    np.testing.assert_allclose(report.latents.density, dense.double().mean(0), rtol=1e-12)
    assert report.metrics["normalised"]["fvu"] != pytest.approx(report.metrics["fvu"], rel=1e-3)
    assert report.metrics["dead"] == float((~dense.any(dim=0)).double().mean())


def test_a_store_gives_the_figures_of_the_live_model(scenes, report, calibration, tmp_path):
    sae, live = scenes
    store = extract(
        calibration,
        live.images,
        sites=live.sites,
        out=tmp_path / "acts",
        dtype="float32",
        workers=0,
        quiet=True,
    )
    found = evaluate(sae, store, model=calibration, workers=0, quiet=True).metrics
    for key in ("fvu", "l0", "dead", "cosine", "truth", "zero_shot", "latent_names"):
        assert_equal(found[key], report.metrics[key], key)
    without = evaluate(sae, store, baselines=False, quiet=True).metrics
    assert "baselines" not in without and "zero_shot" not in without
    assert "No model" in without["omitted"]["zero_shot"]
    assert without["fvu"] == found["fvu"]


def test_figures_do_not_depend_on_batches_or_memory(scenes, report, monkeypatch):
    monkeypatch.setattr(evaluator, "KEPT_ENTRIES", 1000)
    monkeypatch.setattr(evaluator, "Passes", functools.partial(Passes, cache_bytes=0))
    found = evaluate(*scenes, batch_images=23, workers=0, quiet=True).metrics

    assert_equal(report.metrics, found, "")


def test_the_same_seed_gives_the_same_report(scenes, report):
    again = evaluate(*scenes, workers=0, quiet=True)
    assert json.dumps(again.metrics) == json.dumps(report.metrics)


def test_the_saved_figures_are_the_measured_ones(report, tmp_path):
    path = report.save(tmp_path)
    assert path == tmp_path / "metrics.json"
    assert read_json(path) == json.loads(json.dumps(report.metrics))
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    head, *rows = report.table()
    assert head == ("", "SAE", "untrained SAE", "PCA", "neurons")
    assert all(len(row) == 5 for row in rows)
    assert {row[0]: row[1] for row in rows}["FVU"] == f"{report.metrics['fvu']:.4g}"


def test_numbers_that_are_not_finite_become_none_with_a_reason():
    gaps = {}
    value = {"a": {"b": [1.0, float("nan")]}, "c": float("inf"), "d": 2}
    assert finite(value, "", gaps) == {"a": {"b": [1.0, None]}, "c": None, "d": 2}
    assert set(gaps) == {"a.b[1]", "c"}


@pytest.mark.parametrize("tokens", ["all", "patches", "cls"])
def test_a_perfect_sae_loses_nothing_on_any_positions(clip, tokens):
    live = LiveActivations(clip, Pictures(30), [SITE], tokens, workers=0)
    metrics = evaluate(perfect_sae(32, tokens=tokens), live, workers=0, quiet=True).metrics
    assert metrics["fvu"] == 0 and metrics["zero_shot"]["reconstructed"]["preserved"] == 1
    assert metrics["baselines"]["pca"]["fvu"] < 1e-9
    if tokens != "cls":  # 15 vectors span only 14 directions
        assert metrics["baselines"]["pca"]["components_of_equal_fvu"] == 32
    assert "calibration world" in metrics["omitted"]["truth"]
    assert ("l0_cls" in metrics) == (tokens == "all")
    assert ("fvu_cls" in metrics) == (tokens == "all")


def test_the_mean_over_patches_has_no_downstream_and_says_so(clip):
    live = LiveActivations(clip, Pictures(30), [SITE], "mean", workers=0)
    metrics = evaluate(make_sae(tokens="mean"), live, workers=0, quiet=True).metrics
    assert "cannot be replaced" in metrics["omitted"]["zero_shot"]
    assert metrics["n_vectors"] == 30 and "zero_shot" not in metrics


def test_the_truth_table_of_one_vector_per_image_has_no_iou(calibration):
    images = Scenes(N_SCENES, 3)
    live = LiveActivations(calibration, images, ["blocks.2.resid_post"], "cls", workers=0)
    sae = make_sae(live.d_in(live.sites[0]), site=live.sites[0], tokens="cls")
    metrics = evaluate(sae, live, baselines=False, workers=0, quiet=True).metrics
    assert "no heatmap" in metrics["omitted"]["truth.iou"]
    assert metrics["truth"] and all(entry["iou"] is None for entry in metrics["truth"].values())


def test_max_images_measures_a_random_sample(clip):
    live = LiveActivations(clip, Pictures(30), [SITE], "all", workers=0)
    metrics = evaluate(
        make_sae(), live, max_images=7, batch_images=4, workers=0, quiet=True
    ).metrics
    images = Pictures(30).select(sample_places(30, 7))
    few = LiveActivations(clip, images, [SITE], "all", workers=0)
    expected = evaluate(make_sae(), few, workers=0, quiet=True).metrics
    assert metrics["n_images"] == 7 == metrics["zero_shot"]["original"]["n"]
    assert metrics["fvu"] == pytest.approx(expected["fvu"], rel=1e-6)
    assert metrics["zero_shot"]["original"] == expected["zero_shot"]["original"]


def test_a_sample_has_the_same_images_from_a_store_live_or_without_views(clip, tmp_path):
    images = Pictures(30)
    store = extract(clip, images, sites=[SITE], out=tmp_path, workers=0, quiet=True)
    chosen = sample_places(30, 7, seed=5).tolist()
    live = LiveActivations(clip, images, [SITE], "all", workers=0)
    x = torch.cat([batch.activations[SITE] for batch in store.ordered([SITE])])
    for source in (store, live, TensorActivations(x)):
        passes = Passes(source, SITE, max_images=7, seed=5, batch_images=4)
        for _ in range(2):
            found = torch.cat([batch.x for batch in passes])
            torch.testing.assert_close(found, x[chosen], rtol=1e-2, atol=1e-2)
            assert passes.n_images == 7


def test_a_selection_is_measured_on_its_own_images_everywhere(clip, tmp_path):
    images = Pictures(30)
    store = extract(clip, images, sites=[SITE], out=tmp_path, workers=0, quiet=True)
    store.source = lambda: images  # made up, so no spec can open them again
    chosen = [3, 8, 20, 21, 29]
    sae, view = make_sae(images=images.spec), store.select(chosen)
    metrics = evaluate(sae, view, model=clip, workers=0, quiet=True).metrics
    few = LiveActivations(clip, images.select(chosen), [SITE], "all", workers=0)
    expected = evaluate(make_sae(), few, workers=0, quiet=True).metrics
    assert metrics["n_images"] == 5 == metrics["zero_shot"]["original"]["n"]
    assert metrics["zero_shot"]["original"] == expected["zero_shot"]["original"]
    assert metrics["downstream_images"] == images.select(chosen).spec
    assert metrics["trained_on_these"] is True


def test_other_images_downstream_are_named(clip):
    live = LiveActivations(clip, Pictures(30), [SITE], "all", workers=0)
    metrics = evaluate(
        make_sae(), live, images=Pictures(12), baselines=False, workers=0, quiet=True
    ).metrics
    assert metrics["images"] == Pictures(30).spec
    assert metrics["downstream_images"] == Pictures(12).spec
    assert metrics["zero_shot"]["original"]["n"] == 12
    assert metrics["trained_on_these"] is None


def test_a_wrong_template_fails_before_anything_is_measured(clip, monkeypatch):
    live = LiveActivations(clip, Pictures(30), [SITE], "all", workers=0)
    monkeypatch.setattr(live, "ordered", None)
    with pytest.raises(UserError, match="typo80"):
        evaluate(make_sae(), live, templates="typo80", workers=0, quiet=True)


def test_missing_images_leave_the_figures_of_the_activations():
    metrics = evaluate(make_sae(), TensorActivations(noise()), quiet=True).metrics
    assert metrics["fvu"] > 0 and metrics["omitted"]["truth"] == "the pictures are gone"


def test_too_few_scenes_leave_out_only_the_truth_table(calibration):
    live = LiveActivations(calibration, Scenes(12, 3), ["blocks.0.resid_post"], "all", workers=0)
    sae = make_sae(live.d_in(live.sites[0]), site=live.sites[0])
    metrics = evaluate(sae, live, baselines=False, workers=0, quiet=True).metrics
    assert "needs 20 scenes" in metrics["omitted"]["truth"] and metrics["fvu"] > 0


def test_the_dead_window_is_the_one_asked_for():
    x = noise(40, 5)
    sae, source = make_sae(n_latents=200), TensorActivations(noise(40, 5))
    metrics = evaluate(sae, source, dead_window=15, baselines=False, quiet=True).metrics
    silent = ~(sae.encode(x.flatten(0, 1)[-15:]).dense() > 0).any(dim=0)
    assert (metrics["dead_window"], metrics["dead"]) == (15, float(silent.double().mean()))
    assert metrics["clipscope_dead_window"] == 200 and metrics["clipscope_dead"] < metrics["dead"]


def test_mismatched_inputs_are_refused(clip, siglip):
    source = TensorActivations(noise(), weights_hash="abc", id="some-model")
    refused = {
        "32 dimensions, but the SAE takes 16": (make_sae(16), source, {}),
        "blocks.7.resid_post": (make_sae(site="blocks.7.resid_post"), source, {}),
        "tokens='cls'": (make_sae(tokens="cls"), source, {}),
        "weights differ": (make_sae(model={"id": "b", "weights_hash": "xyz"}), source, {}),
        "but the model is": (make_sae(), source, {"model": clip}),
        "max_images is 0": (make_sae(), source, {"max_images": 0}),
        "batch_images is 0": (make_sae(), source, {"batch_images": 0}),
        "dead_window is 0": (make_sae(), source, {"dead_window": 0}),
        "No images to evaluate on": (make_sae(), TensorActivations(noise(0)), {}),
    }
    for message, (sae, activations, options) in refused.items():
        with pytest.raises(UserError, match=message):
            evaluate(sae, activations, quiet=True, **options)


def test_weights_that_are_not_finite_are_a_fault_and_name_the_site():
    sae = make_sae()
    sae.W_dec[:, 3] = float("nan")
    with pytest.raises(SparsightError, match=r"blocks\.1\.resid_post"):
        evaluate(sae, TensorActivations(noise()), quiet=True)


class Largest(TorchDispatchMode):
    """Watches the size of the largest dense tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.layout == torch.strided:
            self.entries = max(self.entries, out.numel())
        return out


def test_no_temporary_is_as_large_as_vectors_times_latents():
    sae = make_sae(n_latents=20_000)
    with Largest() as largest:
        evaluate(sae, TensorActivations(noise(64)), quiet=True)
    assert sae.W_enc.numel() < largest.entries < 64 * 17 * 20_000 / 4
