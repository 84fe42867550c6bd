from __future__ import annotations

import pytest

from sparsight.figures import NOT_MEASURED, figure_of, percent, rounded
from sparsight.pages import scores

TRUTH = {
    "symbol/sun": {"latent": 4, "auc": 0.9, "f1": 0.8, "iou": 0.5},
    "symbol/anchor": {"latent": 5, "auc": 0.7, "f1": 0.6, "iou": None},
    "background/red": {"latent": 6, "auc": 1.0, "f1": 1.0, "iou": 0.2},
}
METRICS = {
    "fvu": 0.0834,
    "l0": 31.7,
    "dead": 0.002,
    "dead_window": 1_000_000,
    "n_vectors": 65_000,
    "zero_shot": {
        "original": {"top1": 0.96, "top5": 1.0, "interval": [0.94, 0.98], "n": 500},
        "reconstructed": {"top1": 0.95, "top5": 0.99, "interval": [0.93, 0.97], "n": 500},
        "zero": {"top1": 0.02, "top5": 0.1, "interval": [0.01, 0.03], "n": 500},
    },
    "truth": TRUTH,
    "baselines": {
        "neurons": {"truth": {"symbol/sun": {"latent": 1, "auc": 0.6, "f1": 0.1}}},
        "untrained": {"fvu": 0.9, "l0": 32.0},
        "something_new": {"fvu": 0.5},
    },
}


def test_truth_scores_are_averaged_by_kind_over_measured_attributes() -> None:
    kinds = scores.truth_by_kind(METRICS)
    assert kinds["symbol"] == {
        "n": 2,
        "auc": pytest.approx(0.8),
        "f1": pytest.approx(0.7),
        "iou": pytest.approx(0.5),
        "iou_everywhere": None,
    }
    assert kinds["background"]["n"] == 1


def test_every_tile_shows_its_baselines() -> None:
    tiles = {tile.name: tile for tile in scores.tiles(METRICS)}
    beside = {name: {b.name: b.value for b in tile.beside} for name, tile in tiles.items()}
    assert tiles["FVU"].value == "0.0834"
    assert beside["FVU"] == {"untrained SAE": "0.900", "something_new": "0.500"}
    note = tiles["Dead latents"].note
    assert note == "of the latents: never active in the last 1,000,000 vectors"
    assert "L0" in tiles and "L0" in {tile.name for tile in scores.tiles(METRICS, 512, 32)}
    fixed = {tile.name: tile for tile in scores.tiles({**METRICS, "l0": 32.0}, 512, 32)}
    assert "L0" not in fixed and fixed["Dead latents"].note.startswith("of 512 latents: ")
    assert tiles["Zero-shot top-1"].value == "95.0 %"
    assert beside["Zero-shot top-1"] == {"original": "96.0 %", "zero instead": "2.0 %"}
    assert tiles["Mean AUC, 2 symbols"].value == "0.800"
    assert beside["Mean AUC, 2 symbols"] == {"neurons": "0.600"}


def test_tables_say_what_was_not_measured() -> None:
    table = scores.truth_table(METRICS)
    assert table is not None
    assert table.columns == ("SAE", "neurons")
    assert [(row.group, row.name, row.cells) for row in table.rows[:4]] == [
        ("symbol · 2", "AUC", ("0.800", "0.600")),
        ("", "F1", ("0.700", "0.100")),
        ("", "IoU", ("0.500", NOT_MEASURED)),
        ("background · 1", "AUC", ("1.00", NOT_MEASURED)),
    ]
    table = scores.reconstruction_table(METRICS)
    assert table is not None
    assert {row.name: row.cells for row in table.rows}["L0"] == ("31.7", "32.0", NOT_MEASURED)


def test_the_iou_of_all_patches_is_next_to_that_of_latents() -> None:
    entry = {"latent": 1, "auc": 1.0, "f1": 1.0, "iou": 0.6, "iou_everywhere": 0.7}
    table = scores.truth_table({"truth": {"background/red": entry}})
    assert table is not None
    assert table.columns == ("SAE", "all patches")
    assert [row.cells for row in table.rows] == [("1.00", ""), ("1.00", ""), ("0.600", "0.700")]


def test_replacements_are_compared_and_the_saes_stands_out() -> None:
    pca = {"zero_shot": {"reconstructed": {"top1": 0.5, "kl": 1.5}}}
    table = scores.downstream_table({**METRICS, "baselines": {"pca": pca}})
    assert table is not None
    assert table.columns == ("top-1", "95 % interval", "top-5", "KL")
    assert {row.name: row.cells for row in table.rows} == {
        "original": ("96.0 %", "94.0–98.0 %", "100.0 %", NOT_MEASURED),
        "SAE": ("95.0 %", "93.0–97.0 %", "99.0 %", NOT_MEASURED),
        "PCA": ("50.0 %", NOT_MEASURED, NOT_MEASURED, "1.50"),
        "zero instead": ("2.0 %", "1.0–3.0 %", "10.0 %", NOT_MEASURED),
    }
    best = {row.name: row.best for row in table.rows if row.best}
    assert best == {"SAE": {0, 2}}, "the only KL is not the best of several"
    assert "above the original" not in table.note
    pca["zero_shot"]["reconstructed"]["top1"] = 0.97
    table = scores.downstream_table({**METRICS, "baselines": {"pca": pca}})
    assert table is not None and "PCA above the original: a reconstruction also" in table.note
    assert {row.name: row.best for row in table.rows if row.best} == {"SAE": {2}, "PCA": {0}}


def test_without_figures_there_are_no_tables() -> None:
    for make in (
        scores.reconstruction_table,
        scores.downstream_table,
        scores.truth_table,
        scores.attribute_table,
    ):
        assert make({}) is None
    assert [tile.value for tile in scores.tiles({})] == [NOT_MEASURED] * 3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.08341, "0.0834"),
        (31.68, "31.7"),
        (0, "0"),
        (123456.7, "123,457"),
        (1368.6, "1,369"),
        (0.00012, "1.2e-04"),
        (-0.5, "-0.500"),
        (None, NOT_MEASURED),
        (float("nan"), "nan"),
    ],
)
def test_figures_have_three_digits(value: float | None, text: str) -> None:
    assert rounded(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.945, "94.5 %"), (0.0, "0.0 %"), (0.00012, "0.012 %"), (None, NOT_MEASURED)],
)
def test_shares_are_in_per_cent(value: float | None, text: str) -> None:
    assert percent(value) == text


def test_the_page_says_whether_figures_are_from_the_training_data_and_warns_about_cls():
    metrics = {"fvu": 0.057, "fvu_cls": 0.31, "fvu_patches": 0.05, "trained_on_these": True}
    assert scores.measured_on(metrics).startswith("Measured on the training data")
    assert "not trained on" in scores.measured_on({"trained_on_these": False})
    held_out = {"trained_on_these": False, "held_out": True}
    assert scores.measured_on(held_out).startswith("Measured on held-out images")
    assert scores.measured_on({}) == ""
    assert "FVU 0.310" in scores.cls_warning(metrics)
    assert scores.cls_warning(metrics | {"fvu_cls": 0.06}) == scores.cls_warning({}) == ""
    whole, cls, *_ = scores.tiles(metrics)
    assert "patches alone 0.0500" in whole.note and "measured on the training data" in whole.note
    assert cls.name == "FVU of CLS" and cls.value == "0.310"
    assert "training data" in scores.reconstruction_table(metrics).note


def test_the_best_figure_of_a_row_stands_out_even_if_it_is_a_baselines() -> None:
    pca = {"fvu": 0.05, "l0": 31.7, "truth": {"symbol/sun": {"iou": 0.815, "auc": 0.4}}}
    metrics = {**METRICS, "baselines": {"pca": pca}}
    rows = {row.name: row for row in scores.reconstruction_table(metrics).rows}
    assert rows["FVU"].best == {1} and rows["L0"].best == frozenset()
    truth = {row.name: row.best for row in scores.truth_table(metrics).rows[:3]}
    assert truth == {"AUC": {0}, "F1": frozenset(), "IoU": {1}}
    assert scores.best([0.3, 0.30001, 0.4], figure_of("fvu")) == {0, 1}, "both look alike"


def test_sites_stand_side_by_side_with_their_baselines() -> None:
    second = {"fvu": 0.2, "fvu_cls": 0.4, "trained_on_these": True}
    table = scores.sites_table([("blocks.5", METRICS), ("blocks.8", second)])
    assert table is not None and [row.name for row in table.rows] == ["blocks.5", "blocks.8"]
    column = table.columns.index("FVU, untrained SAE")
    assert [row.cells[column] for row in table.rows] == ["0.900", NOT_MEASURED]
    assert "Measured on the training data" in table.note
    assert scores.sites_table([("a", {}), ("b", {})]) is None
