from __future__ import annotations

import copy
import csv
import dataclasses
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from sparsight.activations import ActivationStore, LiveActivations, extract
from sparsight.errors import UserError
from sparsight.evaluation import SweepMeasures, evaluate, measure_sweep, t_interval
from sparsight.images import open_images
from sparsight.latents import compare, plots
from sparsight.latents.comparison import spots_of, table_markdown
from sparsight.pages.plots import Spot, front, pareto
from sparsight.sae import AuxK, SAEConfig, TopK
from sparsight.training import Sweep, SweepConfig, TrainConfig, sweep
from sparsight.vision import VisionModel, load_model

SITES = ("blocks.-2.resid_post", "blocks.-1.resid_post")
BASE = TrainConfig(
    sae=SAEConfig(n_latents=96, sparsity=TopK(k=4)), n_vectors=2048, batch_size=256, lr=3e-3,
    remedy=AuxK(alpha=0.1),
)  # fmt: skip
GRID = {"k": [4, 8], "seed": [0, 1]}
MEASURES = SweepMeasures(accuracy_images=24, workers=0)


@pytest.fixture(scope="module")
def model() -> VisionModel:
    return load_model("calibration", device="cpu")


@pytest.fixture(scope="module")
def store(model: VisionModel, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    out = tmp_path_factory.mktemp("store") / "acts"
    return extract(
        model, open_images("calibration:48:3"), sites=SITES, out=out, workers=0, quiet=True
    )


@pytest.fixture(scope="module")
def held_out(model: VisionModel, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    out = tmp_path_factory.mktemp("held-out") / "acts"
    return extract(
        model, open_images("calibration:40:4"), sites=SITES, out=out, workers=0, quiet=True
    )


@pytest.fixture(scope="module")
def swept(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    out = tmp_path_factory.mktemp("swept") / "sweep"
    return sweep(store, SweepConfig(BASE, GRID), out, quiet=True)


@pytest.fixture(scope="module")
def table(swept: Sweep, held_out: ActivationStore, model: VisionModel) -> dict[str, Any]:
    return compare(swept, held_out, MEASURES, model=model, quiet=True)


def test_every_member_has_the_figures_of_evaluate(
    table: dict[str, Any], swept: Sweep, held_out: ActivationStore, model: VisionModel
) -> None:
    assert len(table["members"]) == 8
    row = table["members"][3]
    assert row["site"] == "blocks.3.resid_post" and row["name"] == "k4-seed1"
    sae = swept.runs[row["name"]].sae(row["site"])
    # 24 of 40 images are drawn at random, so the same ones must be named here.
    chosen = open_images("calibration:40:4?sample=24")
    own = evaluate(
        sae, held_out, model=model, images=chosen, baselines=False, quiet=True,
        class_names=open_images("calibration:40:4").labels(),
    ).metrics  # fmt: skip
    for key in ("fvu", "l0", "dead", "cosine", "n_latents", "n_vectors"):
        assert row[key] == pytest.approx(own[key], rel=1e-6), key
    assert row["accuracy"] == own["zero_shot"]["reconstructed"]["top1"]
    place = f"all/{row['site']}"
    assert table["original"][place]["top1"] == own["zero_shot"]["original"]["top1"]
    assert row["trained"]["fvu"] == swept.runs[row["name"]].metrics(row["site"])[-1]["fvu"]


def test_groups_are_means_over_seeds_with_student_s_interval(table: dict[str, Any]) -> None:
    assert [(g["settings"], g["site"][:8], g["n"]) for g in table["groups"]] == [
        ({"sae.sparsity.k": 4}, "blocks.2", 2), ({"sae.sparsity.k": 4}, "blocks.3", 2),
        ({"sae.sparsity.k": 8}, "blocks.2", 2), ({"sae.sparsity.k": 8}, "blocks.3", 2),
    ]  # fmt: skip
    group = table["groups"][0]
    values = [row["fvu"] for row in table["members"] if row["name"] in group["members"]][::2]
    assert group["fvu"]["mean"] == pytest.approx(fmean(values))
    assert group["fvu"]["interval"] == pytest.approx(t_interval(values))
    stability = group["stability"]
    assert stability["random"] < stability["mean_cosine"] < 1 and stability["n_seeds"] == 2
    alive = [r["n_alive"] for r in table["members"] if r["name"] in group["members"]][::2]
    assert stability["n_alive"] == alive


def test_the_folder_holds_tables_for_people_and_programs_and_plots(
    table: dict[str, Any], swept: Sweep
) -> None:
    assert json.loads((swept.out / "table.json").read_text()) == table
    with (swept.out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [row["name"] for row in table["members"]]
    assert float(rows[5]["fvu"]) == table["members"][5]["fvu"]
    text = (swept.out / "table.md").read_text()
    head = (
        "| site | k | latents | seeds | FVU | FVU of CLS | FVU of patches | L0 | dead | cosine "
        "| accuracy | stability |"
    )
    assert head in text and "Student's 95 % interval" in text
    assert text.count("\n| `blocks") == 4
    for name in ("fvu", "accuracy"):
        assert f"(plots/{name}-l0.svg)" in text
        drawn = (swept.out / "plots" / f"{name}-l0.svg").read_text()
        ET.fromstring(drawn)
        assert "blocks.2.resid_post" in drawn and "L0 (latents per vector)" in drawn


def test_a_measured_sweep_is_a_data_frame_and_a_plot_of_its_own(
    table: dict[str, Any], swept: Sweep
) -> None:
    frame = swept.to_pandas()
    settings = [row["settings"]["sae.sparsity.k"] for row in swept.table()]
    assert list(frame["sae.sparsity.k"]) == settings
    assert frame["fvu"].notna().all()
    one = swept.runs["k4-seed1"]
    assert len(one.to_pandas(one.sites[0])) == len(one.metrics(one.sites[0]))
    for given in (swept, swept.out, table):
        drawn = plots.pareto(given, "accuracy")
        assert drawn.axes[0].get_ylabel() == "zero-shot accuracy"


def test_measured_members_are_not_measured_again(
    table: dict[str, Any],
    swept: Sweep,
    store: ActivationStore,
    held_out: ActivationStore,
    model: VisionModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept.out.glob("table.*")}
    module = sys.modules["sparsight.evaluation.comparing"]
    measure, seen = module._measure, []
    monkeypatch.setattr(module, "_measure", lambda *args: seen.extend(args[2]) or measure(*args))
    assert compare(swept, held_out, MEASURES, model=model, quiet=True) == table
    assert not seen and {p: p.stat().st_mtime_ns for p in before} == before
    small = SweepConfig(BASE, {"k": [4], "seed": [0, 1]})
    first = sweep(store, small, tmp_path, sites=SITES[:1], quiet=True)
    compare(first, held_out, SweepMeasures(accuracy_images=0), quiet=True)
    assert len(seen) == 2
    larger = SweepConfig(BASE, {"k": [4, 8], "seed": [0, 1]})
    second = sweep(store, larger, tmp_path, sites=SITES[:1], quiet=True)
    grown = compare(second, held_out, SweepMeasures(accuracy_images=0), quiet=True)
    assert [each.row["name"] for each in seen[2:]] == ["k8-seed0", "k8-seed1"]
    assert [group["stability"]["n_seeds"] for group in grown["groups"]] == [2, 2]
    assert "accuracy_images is 0" in next(iter(grown["omitted"].values()))
    # Another seed is matched with the others, whose alive latents must be known.
    third = SweepConfig(BASE, {"k": [4, 8], "seed": [0, 1, 2]})
    last = sweep(store, third, tmp_path, sites=SITES[:1], quiet=True)
    assert compare(last, store, SweepMeasures(accuracy_images=0), quiet=True)["groups"][0]["n"] == 3


def test_members_with_different_positions_are_measured_separately(
    store: ActivationStore, model: VisionModel, tmp_path: Path
) -> None:
    config = SweepConfig(BASE, {"tokens": ["cls", "patches"]})
    found = sweep(store, config, tmp_path, sites=SITES[:1], quiet=True)
    table = compare(found, store, MEASURES, model=model, quiet=True)
    cls, patches = table["members"]
    assert cls["n_vectors"] == 48 and patches["n_vectors"] == 48 * (store.n_tokens[cls["site"]] - 1)
    sae = found.runs["cls"].sae()
    own = evaluate(sae, store.with_tokens("cls"), baselines=False, quiet=True).metrics
    assert cls["fvu"] == pytest.approx(own["fvu"])
    assert "| cls |" in (tmp_path / "table.md").read_text()


def test_part_of_a_store_is_measured_on_its_own_images_among_all_classes(
    swept: Sweep, held_out: ActivationStore, model: VisionModel
) -> None:
    few = held_out.select(held_out.image_indices[:6])
    table = measure_sweep(swept, few, MEASURES, model=model, quiet=True)
    original = table["original"]["all/blocks.3.resid_post"]
    assert original["n"] == 6 and original["n_classes"] == len(held_out.source().labels())


def test_live_activations_and_a_few_images_suffice(swept: Sweep, model: VisionModel) -> None:
    source = LiveActivations(model, open_images("calibration:48:3"), SITES, workers=0)
    few = SweepMeasures(max_images=5, accuracy_images=8, workers=0)
    table = measure_sweep(swept, source, few, quiet=True)
    n_tokens = source.n_tokens["blocks.3.resid_post"]
    assert {row["n_vectors"] for row in table["members"]} == {5 * n_tokens}
    assert table["original"]["all/blocks.3.resid_post"]["n"] == 8


def test_unmeasured_figures_have_a_reason(
    swept: Sweep,
    held_out: ActivationStore,
    model: VisionModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    table = measure_sweep(swept, held_out, MEASURES, quiet=True)
    assert "pip install 'sparsight[stability]'" in table["omitted"]["stability"]
    assert "No model was given" in table["omitted"]["accuracy, all/blocks.3.resid_post"]
    assert all(group["stability"] is None for group in table["groups"])
    assert "accuracy" not in table_markdown(table, "x").split("\n")[2]
    other = copy.copy(model)
    other.weights_hash = "0"
    table = measure_sweep(swept, held_out, MEASURES, model=other, quiet=True)
    assert "whose weights differ" in table["omitted"]["accuracy, all/blocks.3.resid_post"]
    with pytest.raises(UserError, match="max_images is 0"):
        SweepMeasures(max_images=0)


def test_the_front_holds_the_unbeaten_points() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0), (4.0, 1.0)]
    assert front(points, higher_is_better=False) == {0, 1, 4}
    assert front(points, higher_is_better=True) == {0}


def test_a_pareto_plot_joins_members_that_differ_only_in_sparsity() -> None:
    def group(settings: dict[str, Any], l0: float, fvu: float) -> dict[str, Any]:
        figures = {"l0": l0, "fvu": fvu}
        blocks = {key: {"mean": x, "interval": (x - 0.1, x + 0.1)} for key, x in figures.items()}
        return {"site": "here", "tokens": "all", "settings": settings, **blocks}

    groups = [
        group({"sae.sparsity": {"kind": kind}, "sae.sparsity.k": k}, k, 1 / k)
        for kind in ("topk", "batchtopk")
        for k in (2, 8, 32)
    ]
    spots = spots_of(groups, "fvu")
    assert [spot.series for spot in spots] == ["topk"] * 3 + ["batchtopk"] * 3
    assert spots[1].x == pytest.approx((8, 7.9, 8.1))
    axis = pareto(spots, "FVU", higher_is_better=False, reference=("as it is", 0.5)).axes[0]
    assert axis.get_xscale() == "log" and axis.get_ylabel() == "FVU"
    lines = [line for line in axis.lines if len(line.get_xdata()) == 3]
    elsewhere = dataclasses.replace(spots[0], y=(9, 9, 9), place="there")
    both = pareto([spots[0], elsewhere], "FVU", higher_is_better=False).axes[0]
    faces = [line.get_markerfacecolor() for line in both.lines if line.get_marker() == "o"]
    assert "#ffffff" not in faces  # sites are not compared with one another
    assert len(lines) == 2
    assert not pareto([Spot((1, 1, 1), (2, 2, 2), "")], "FVU", higher_is_better=False).legends
