from __future__ import annotations

import pickle

import numpy as np
import pytest
from picture_files import pixels

from sparsight.images import CalibrationImages, open_images

pytest.importorskip("sparsight.calibration.world")


def test_the_spec_gives_number_of_scenes_and_seed() -> None:
    source = open_images("calibration:50:7")
    assert isinstance(source, CalibrationImages)
    assert len(source) == 50
    info, scene = source.info(12), source.scene(12)
    assert info.id == "7/00012"
    assert (info.label, info.caption) == (scene.label, scene.caption)
    assert (pixels(source.load(12)) == np.asarray(source.render(12).image)).all()


def test_scenes_do_not_depend_on_how_many_there_are() -> None:
    few, many = open_images("calibration:20:3"), open_images("calibration:2000:3")
    assert few.info(5).caption == many.info(5).caption
    assert (pixels(few.load(5)) == pixels(many.load(5))).all()


def test_a_selection_keeps_ids_and_truth() -> None:
    source = open_images("calibration:50:7")
    view = pickle.loads(pickle.dumps(source.subset(10, 20).select([2, 4])))
    assert isinstance(view, CalibrationImages)
    assert [view.info(i).id for i in range(2)] == ["7/00012", "7/00014"]
    assert view.scene(1).caption == source.scene(14).caption
    assert (pixels(view.load(0)) == pixels(source.load(12))).all()
    again = open_images(view.spec)
    assert again.fingerprint() == view.fingerprint() != source.fingerprint()
    assert again.info(1) == view.info(1)


def test_seeds_are_different_worlds() -> None:
    prints = {open_images(f"calibration:9:{seed}").fingerprint() for seed in range(3)}
    assert len(prints) == 3


def test_scenes_of_single_objects_have_a_spec_of_their_own() -> None:
    source = open_images("calibration:30:7:single")
    assert isinstance(source, CalibrationImages)
    assert all(len(source.scene(i).objects) == 1 for i in range(30))
    assert not any(source.scene(i).writing for i in range(30))
    mixed = open_images("calibration:30:7")
    assert source.info(3).id == "7-single/00003" != mixed.info(3).id
    assert source.fingerprint() != mixed.fingerprint()
    view = source.select([3, 5])
    again = open_images(pickle.loads(pickle.dumps(view)).spec)
    assert again.fingerprint() == view.fingerprint()
    assert again.info(1).uri == "calibration:30:7:single[5]"
