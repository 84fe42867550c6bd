"""Attacks on the calibration CLIP: pairs, outcomes and figures against plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sparsight.attacks import TextStyle, make_pairs, measure_attack
from sparsight.editing import NeuronEdit, Off, intervene
from sparsight.errors import UserError
from sparsight.images import load_batches, open_images
from sparsight.intervals import wilson_interval
from sparsight.vision import classifier_weights, classify

N = 24


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(open_images(f"calibration:{N}:990001:single"), seed=1)


def by_hand(model, pairs, kind):
    """Best class, and margin of the own class over the attacking word's, one image at a time."""
    names = list(pairs.class_names)
    weights = classifier_weights(model, names, "a photo of a {}.")
    (batch,) = load_batches(pairs.source(kind), model.transform, len(pairs), workers=0)
    with torch.no_grad():
        logits = classify(model.embed_images(batch.pixels), weights, model.logit_scale)
    best = [names[int(row.argmax())] for row in logits]
    margins = [
        float(row[names.index(own)] - row[names.index(word)])
        for row, own, word in zip(logits, pairs.labels, pairs.words, strict=True)
    ]
    return best, margins


def test_figures_are_those_of_plain_arithmetic(calibration, pairs):
    report = measure_attack(calibration, pairs, workers=0)
    margins = {}
    for kind in ("clean", "attacked", "same", "control"):
        best, margins[kind] = by_hand(calibration, pairs, kind)
        right = sum(b == own for b, own in zip(best, pairs.labels, strict=True))
        fooled = sum(b == word for b, word in zip(best, pairs.words, strict=True))
        assert report.accuracy[kind].value == right / N
        assert report.accuracy[kind].interval == wilson_interval(right, N)
        assert report.fooled[kind].value == fooled / N
        assert report.margin[kind].value == pytest.approx(np.mean(margins[kind]), abs=1e-3)
    shift = np.mean(np.subtract(margins["attacked"], margins["clean"]))
    found = report.margin_shift["attacked - clean"]
    assert found.value == pytest.approx(shift, abs=1e-3)
    assert found.interval[0] < found.value < found.interval[1]
    change = report.accuracy_change["attacked - clean"]
    difference = report.accuracy["attacked"].value - report.accuracy["clean"].value
    assert change.value == pytest.approx(difference)


def test_names_of_another_class_mislead_and_those_of_the_own_class_do_not(calibration, pairs):
    report = measure_attack(calibration, pairs, workers=0)
    assert report.accuracy["clean"].value >= 0.9 <= report.accuracy["same"].value
    assert report.accuracy_change["attacked - clean"].value <= -0.2
    assert report.fooled["attacked"].value > 0.2 > report.fooled["control"].value
    assert report.margin["attacked"].value < report.margin["control"].value


def test_an_edit_is_in_force_while_it_is_measured(calibration, pairs):
    some = pairs.select(range(6))
    edit = NeuronEdit("blocks.3.mlp_post", range(400), Off())
    report = measure_attack(calibration, some, edits=edit, workers=0)
    with intervene(calibration, edit):
        inside = measure_attack(calibration, some, workers=0)
    for kind in report.margin:
        assert report.margin[kind].value == pytest.approx(inside.margin[kind].value, abs=1e-4)
    assert report.edits == ["Off: 400 neurons at blocks.3.mlp_post, all"]
    plain = measure_attack(calibration, some, workers=0)
    assert plain.margin["clean"].value != pytest.approx(report.margin["clean"].value, abs=1e-2)


def test_pairs_name_the_word_and_the_truth(pairs):
    assert len(pairs) == len(pairs.words) == len(pairs.labels) == N
    assert all(word != own for word, own in zip(pairs.words, pairs.labels, strict=True))
    assert len(pairs.class_names) == 66
    for i in range(5):
        assert pairs.attacked.scene(i).writing.text == pairs.words[i]
        assert pairs.clean.info(i).label == pairs.same.scene(i).writing.text == pairs.labels[i]
        assert len(pairs.control.scene(i).writing.text) == len(pairs.words[i])


def test_halves_have_no_image_in_common(pairs):
    one, other = pairs.halves(seed=4)
    ids = [{half.clean.info(i).id for i in range(len(half))} for half in (one, other)]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == N
    for half in (one, other):
        assert [half.attacked.info(i).id for i in range(12)] == [
            half.clean.info(i).id for i in range(12)
        ]
        assert half.labels == [half.clean.info(i).label for i in range(12)]
    again = pairs.halves(seed=4)[0]
    assert again.labels == one.labels and again.clean.spec == one.clean.spec


def test_n_images_are_chosen_at_random_and_kept_in_order(pairs):
    source = open_images("calibration:60:5:single")
    some = make_pairs(source, n=10, seed=2)
    ids = [some.clean.info(i).id for i in range(10)]
    assert ids == sorted(ids) and ids[-1] > "5-single/00015"
    assert ids != [make_pairs(source, n=10, seed=3).clean.info(i).id for i in range(10)]


def test_images_on_which_a_word_does_not_fit_are_left_out_of_all_kinds(calibration, tmp_path):
    for i, (label, width) in enumerate([("sun", 64), ("anchor", 64), ("sun", 12), ("anchor", 64)]):
        (tmp_path / label).mkdir(exist_ok=True)
        Image.new("RGB", (width, 64), (i * 60, 0, 0)).save(tmp_path / label / f"{i}.png")
    pairs = make_pairs(open_images(tmp_path), style=TextStyle(size=0.3))
    report = measure_attack(calibration, pairs, workers=0)
    assert report.n == 3
    assert report.failed["attacked"] == 1
    assert "does not fit 12 × 64 pixels" in report.reasons[0]
    with pytest.raises(UserError, match="none of 1 images loads"):
        measure_attack(calibration, pairs.select([labels_at(pairs, "sun")[-1]]), workers=0)


def labels_at(pairs, label):
    return [i for i, each in enumerate(pairs.labels) if each == label]


def test_a_report_is_saved_and_shown(calibration, pairs, tmp_path):
    import json

    report = measure_attack(calibration, pairs.select(range(4)), workers=0)
    saved = json.loads(report.save(tmp_path / "attack.json").read_text())
    assert saved["accuracy"]["clean"]["value"] == report.accuracy["clean"].value
    assert saved["pairs"]["style"]["kind"] == "WorldBand"
    head, *rows = report.table()
    assert [row[0] for row in rows[:4]] == ["clean", "attacked", "same", "control"]
    assert all(len(row) == len(head) for row in rows)


def test_a_model_without_text_cannot_be_attacked(tiny, pairs):
    with pytest.raises(UserError, match="no text tower"):
        measure_attack(tiny("dinov2"), pairs, workers=0)
