"""The whole chain on the command line, small: demo, then every verb on its output."""

from __future__ import annotations

import json
import shutil

import pytest

from sparsight.cli import main

SITES = ("blocks.-2.resid_post", "blocks.-1.resid_post")
SMALL = ["--n-images", "100", "--n-test", "100", "--n-latents", "256", "--k", "8"]
SMALL += ["--n-vectors", "8192", "--latents", "2"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Return the folder of a demo, made by `sparsight demo`."""
    out = tmp_path_factory.mktemp("chain") / "demo"
    assert main(["demo", "--out", str(out), *SMALL]) == 0
    return out


@pytest.fixture
def run(demo):
    """Return the folder of one of the demo's autoencoders."""
    return sorted(path.parent for path in (demo / "runs").glob("*/sae.safetensors"))[-1]


@pytest.fixture
def fails(capsys):
    """Run a command that must end with an exit code; return its message."""

    def check(*arguments: object, code: int = 2) -> str:
        assert main(list(map(str, arguments))) == code
        message = capsys.readouterr().err
        assert "Traceback" not in message
        # One message, ours or the parser's.
        assert message.count("sparsight: ") + message.count("Error parsing") == 1, message
        return message

    return check


def everything(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_the_demo_leaves_a_store_runs_indices_and_a_report(demo, run):
    assert (demo / "report.html").stat().st_size > 50_000
    assert all((demo / name / "manifest.json").exists() for name in ("store", "held-out"))
    assert len(list((demo / "runs").glob("*/sae.safetensors"))) == len(SITES)
    for name in ("config.toml", "metrics.jsonl", "metrics.json", "config.json", "README.md"):
        assert (run / name).exists(), name
    assert (run / "index" / "latents.parquet").exists()


def test_metrics_hold_every_figure_and_its_baselines(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 < metrics["fvu"] < 1.5
    assert 0 < metrics["l0"] <= 8
    assert 0 <= metrics["dead"] <= 1
    for kind in ("original", "reconstructed", "zero", "mean"):
        shot = metrics["zero_shot"][kind]
        assert 0 <= shot["top1"] <= shot["top5"] <= 1
        assert shot["interval"][0] <= shot["top1"] <= shot["interval"][1]
    attributes = {name.split("/")[0] for name in metrics["truth"]}
    assert {"object_colour", "background", "pattern"} <= attributes
    assert all({"latent", "auc", "f1", "iou"} <= set(s) for s in metrics["truth"].values())
    for baseline in ("untrained", "pca", "neurons"):
        assert metrics["baselines"][baseline]


def test_a_second_demo_prints_the_table_and_changes_nothing(demo, capsys):
    before = everything(demo)
    assert main(["demo", "--out", str(demo), *SMALL]) == 0
    assert everything(demo) == before
    shown = capsys.readouterr().out
    assert "FVU" in shown and str(demo / "report.html") in shown.replace("\n", "")


def test_a_demo_that_lost_its_last_steps_repeats_them(demo, tmp_path, capsys):
    copy = tmp_path / "demo"
    shutil.copytree(demo, copy)
    (copy / "report.html").unlink()
    for folder in (copy / "runs").glob("*/index"):
        shutil.rmtree(folder)
    assert main(["demo", "--out", str(copy), *SMALL]) == 0
    assert (copy / "report.html").exists()
    assert len(list((copy / "runs").glob("*/index/latents.parquet"))) == len(SITES)


def test_a_demo_of_another_size_is_refused(demo, fails):
    message = fails("demo", "--out", demo, *SMALL, "--k", "7")
    assert "another k" in message


def test_evaluate_finds_model_site_and_images_without_options(run, tmp_path, capsys):
    copy = tmp_path / "sae"
    shutil.copytree(run, copy)
    (copy / "metrics.json").unlink()
    assert main(["evaluate", str(copy), "--no-baselines"]) == 0
    assert "FVU" in capsys.readouterr().out
    assert 0 < json.loads((copy / "metrics.json").read_text())["fvu"] < 1.5


def test_index_and_report_accept_the_output_of_train(run, tmp_path, capsys):
    copy = tmp_path / "sae"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "index")
    assert main(["index", str(copy), "--images", "calibration:40:3"]) == 0
    assert "named" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["report", str(copy), "--out", str(page), "--latents", "2"]) == 0
    assert page.stat().st_size > 20_000


def test_train_on_the_fly_reads_the_same_options_from_a_file(tmp_path, capsys):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        'model = "calibration"\nimages = "calibration:64"\nsites = ["blocks.0.resid_post"]\n'
        f'out = "{tmp_path}/run"\n[train]\nn_vectors = 1024\nbatch_size = 512\n'
        "[train.sae]\nn_latents = 256\nsparsity = {k = 4}\n"
    )
    assert main(["train", "--config", str(recipe), "--n-vectors", "2048"]) == 0
    assert (tmp_path / "run" / "sae.safetensors").exists()
    assert "blocks.0.resid_post" in capsys.readouterr().out


def test_k_above_the_number_of_latents_is_refused(demo, tmp_path, fails):
    message = fails(
        *("train", "--store", demo / "store", "--out", tmp_path / "run"),
        *("--sae.n-latents", "256", "--sae.sparsity.k", "300"),
    )
    assert "300" in message and "256" in message


def test_a_site_that_the_model_does_not_have_is_refused(tmp_path, fails):
    message = fails(
        *("extract", "--model", "calibration", "--images", "calibration:10"),
        *("--sites", "blocks.99.resid_post", "--out", tmp_path / "acts"),
    )
    assert "blocks.99.resid_post" in message and "resid_pre" in message


def test_a_store_of_another_width_is_refused(run, tmp_path, fails):
    arguments = ["extract", "--model", "calibration", "--images", "calibration:10"]
    acts = tmp_path / "acts"
    assert main([*arguments, "--sites", "embedding", "--out", str(acts)]) == 0
    assert "embedding" in fails("index", run, "--store", acts)
    assert "embedding" in fails("evaluate", run, "--store", acts)


def test_a_truncated_shard_is_a_fault_and_exits_with_1(demo, tmp_path, fails):
    store = tmp_path / "store"
    shutil.copytree(demo / "store", store)
    shard = next(store.glob("*/shard-00000.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    options = ["--n-vectors", "1024", "--batch-size", "512", "--sae.n-latents", "256"]
    message = fails("train", "--store", store, "--out", tmp_path / "run", *options, code=1)
    assert str(shard) in message and "cut off" in message


def test_an_unwritable_folder_is_named_before_any_work(demo, run, tmp_path, fails):
    (tmp_path / "file").write_text("no folder")
    out = tmp_path / "file" / "run"
    store = ["--store", demo / "store", "--sae.n-latents", "256"]
    assert str(out) in fails("train", *store, "--out", out, code=1)
    page = tmp_path / "file" / "page.html"
    assert str(page.parent) in fails("report", run, "--latents", "0", "--out", page, code=2)
    figures = tmp_path / "file" / "metrics.json"
    options = ["--no-baselines", "--no-downstream", "--max-images", "10", "--out", figures]
    assert str(figures.parent) in fails("evaluate", run, *options, code=2)
