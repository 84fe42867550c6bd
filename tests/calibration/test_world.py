from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from sparsight.calibration import (
    ATTRIBUTES,
    COLOURS,
    IMAGE_SIZE,
    PATCH_GRID,
    PATCH_SIZE,
    PATTERNS,
    SYMBOLS,
    CalibrationWorld,
    Scene,
    SceneObject,
    WorldConfig,
    write_on,
)
from sparsight.calibration.symbols import COLOUR_VALUES
from sparsight.calibration.world import MASK_COVERAGE, _glyph, _letters, letter_coverage, render
from sparsight.errors import UserError

WORLD = CalibrationWorld(n_scenes=400, seed=11)


def per_patch(pixels: np.ndarray) -> np.ndarray:
    """The mean of each patch, by the plainest of loops."""
    found = np.zeros((PATCH_GRID, PATCH_GRID))
    for row, column in itertools.product(range(PATCH_GRID), repeat=2):
        top, left = row * PATCH_SIZE, column * PATCH_SIZE
        found[row, column] = pixels[top : top + PATCH_SIZE, left : left + PATCH_SIZE].mean()
    return found


def test_a_scene_does_not_depend_on_the_order_of_asking_nor_on_the_size_of_the_world() -> None:
    forwards = [WORLD.scene(index) for index in range(20)]
    longer = CalibrationWorld(n_scenes=5_000, seed=11)
    backwards = [longer.scene(index) for index in reversed(range(20))]
    assert forwards == backwards[::-1]


def test_another_process_draws_the_same_pixels() -> None:
    code = (
        "import hashlib; from sparsight.calibration import CalibrationWorld\n"
        "world = CalibrationWorld(400, 11)\n"
        "print(*[hashlib.sha256(world.render(i).image).hexdigest() for i in range(8)])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    here = [hashlib.sha256(WORLD.render(index).image).hexdigest() for index in range(8)]
    assert done.stdout.split() == here


def test_scene_zero_is_what_it_has_always_been() -> None:
    # What was measured on a world holds only as long as its scenes stay what they are.
    scenes = [dataclasses.asdict(CalibrationWorld(seed=0).scene(index)) for index in range(200)]
    digest = hashlib.sha256(json.dumps(scenes, sort_keys=True).encode()).hexdigest()
    assert digest == "cdd419f8bccc18f34d85e7c9ba62964e7467b3de7be74db6278fa013d6ebd849"


def test_seeds_give_different_worlds() -> None:
    first = {CalibrationWorld(seed=seed).scene(0) for seed in range(5)}
    assert len(first) == 5


def test_an_index_beyond_the_world_is_refused() -> None:
    for index in (-1, 400):
        with pytest.raises(IndexError, match="400"):
            WORLD.scene(index)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"writing": 1.5}, "writing"),
        ({"two_objects": -0.1}, "two_objects"),
        ({"spread": float("nan")}, "spread"),
        ({"min_size": 4}, "min_size"),
        ({"max_size": 64}, "max_size"),
        ({"min_size": 30, "max_size": 20}, "30 to 20"),
    ],
)
def test_a_world_that_cannot_be_is_refused(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        WorldConfig(**wrong)


def test_a_world_without_scenes_is_refused() -> None:
    with pytest.raises(UserError, match="n_scenes"):
        CalibrationWorld(n_scenes=0)


def test_there_are_enough_symbols_colours_and_patterns() -> None:
    assert len(set(SYMBOLS)) == len(SYMBOLS) >= 64
    assert len(set(COLOURS)) == len(COLOURS) == 12
    assert PATTERNS == ("plain", "striped", "checkered", "dotted")
    assert all(name.isalpha() and name.islower() and len(name) <= 9 for name in SYMBOLS)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_every_symbol_is_drawn_and_is_not_the_box_of_a_missing_glyph(symbol: str) -> None:
    for size in (18, 36):
        glyph = _glyph(symbol, size)
        assert max(glyph.shape) == size
        assert 0.05 < glyph.mean() < 0.95
        assert glyph.max() > 0.7


def test_no_two_symbols_look_alike() -> None:
    # 24 pixels, centred on one page: as far apart as a small model could tell.
    pages = np.zeros((len(SYMBOLS), 24, 24))
    for page, symbol in zip(pages, SYMBOLS, strict=True):
        glyph = _glyph(symbol, 24)
        top, left = (24 - glyph.shape[0]) // 2, (24 - glyph.shape[1]) // 2
        page[top : top + glyph.shape[0], left : left + glyph.shape[1]] = glyph
    apart = np.abs(pages[:, None] - pages[None]).sum(axis=(2, 3))
    inked = pages.sum(axis=(1, 2))
    unlike = apart / np.maximum(inked[:, None], inked[None])
    unlike[np.diag_indices(len(SYMBOLS))] = np.inf
    assert unlike.min() > 0.15


def test_objects_stand_out_from_the_ground_and_lie_within_the_image() -> None:
    for index in range(len(WORLD)):
        scene = WORLD.scene(index)
        ground = np.array(COLOUR_VALUES[scene.background])
        for thing in scene.objects:
            assert np.linalg.norm(ground - COLOUR_VALUES[thing.colour]) > 100
            assert thing.size / 2 - 1 <= min(thing.x, thing.y)
            assert max(thing.x, thing.y) <= IMAGE_SIZE - thing.size / 2 + 1
        assert len({thing.symbol for thing in scene.objects}) == len(scene.objects)
        assert len({thing.colour for thing in scene.objects}) == len(scene.objects)


def test_shares_of_pairs_and_words_are_those_of_the_config() -> None:
    scenes = [CalibrationWorld(2_000, 3).scene(index) for index in range(2_000)]
    pairs = np.mean([len(scene.objects) == 2 for scene in scenes])
    written = np.mean([scene.writing is not None for scene in scenes])
    assert abs(pairs - WorldConfig().two_objects) < 0.04
    assert abs(written - WorldConfig().writing) < 0.04
    seen = {thing.symbol for scene in scenes for thing in scene.objects}
    assert seen == set(SYMBOLS)


def test_the_world_of_clean_tests_has_one_object_and_no_word() -> None:
    world = CalibrationWorld(100, 3, WorldConfig.single())
    for index in range(len(world)):
        scene = world.scene(index)
        assert len(scene.objects) == 1
        assert scene.writing is None


def test_coverage_is_the_share_of_each_patch_that_takes_on_the_object_s_colour() -> None:
    for index in range(60):
        rendered = WORLD.render(index)
        scene = rendered.scene
        for number, thing in enumerate(scene.objects):
            in_black, in_white = (
                render(
                    dataclasses.replace(
                        scene,
                        objects=(
                            *scene.objects[:number],
                            dataclasses.replace(thing, colour=colour),
                            *scene.objects[number + 1 :],
                        ),
                    )
                ).image.astype(float)
                for colour in ("black", "white")
            )
            contrast = COLOUR_VALUES["white"][0] - COLOUR_VALUES["black"][0]
            visible = (in_white - in_black).mean(axis=2) / contrast
            assert np.allclose(rendered.object_coverage[number], per_patch(visible), atol=0.005)


def test_a_word_s_coverage_is_its_band() -> None:
    seen = 0
    for index in range(60):
        rendered = WORLD.render(index)
        if rendered.scene.writing is None:
            assert not rendered.writing_coverage.any()
            continue
        seen += 1
        writing = rendered.scene.writing
        height, width = _letters(writing.text, writing.size).shape
        band = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
        band[writing.y : writing.y + height, writing.x : writing.x + width] = 1
        assert np.allclose(rendered.writing_coverage, per_patch(band))
        together = rendered.object_coverage.sum(axis=0) + rendered.writing_coverage
        assert together.max() <= 1 + 1e-5
    assert seen > 10


def test_masks_show_each_value_where_it_is_and_the_ground_where_nothing_is() -> None:
    for index in range(60):
        rendered = WORLD.render(index)
        scene = rendered.scene
        covered = np.zeros((PATCH_GRID, PATCH_GRID), bool)
        for thing, coverage in zip(scene.objects, rendered.object_coverage, strict=True):
            shown = coverage >= MASK_COVERAGE
            covered |= shown
            assert (rendered.mask("symbol", thing.symbol) == shown).all()
            assert (rendered.mask("object_colour", thing.colour) == shown).all()
            assert shown.any() or scene.writing is not None
        if scene.writing is not None:
            mask = rendered.mask("word", scene.writing.text)
            assert mask.any()
            covered |= mask
        for attribute, value in (("background", scene.background), ("pattern", scene.pattern)):
            assert (rendered.mask(attribute, value) == ~covered).all()
        for attribute in ATTRIBUTES:
            assert not rendered.mask(attribute, "no such value").any()


def test_a_mask_of_an_unknown_attribute_is_refused() -> None:
    with pytest.raises(UserError, match="object_colour"):
        WORLD.render(0).mask("size", "large")


def test_a_covered_object_gives_way_to_the_one_above_it() -> None:
    below = SceneObject("heart", "red", 36, 32, 32)
    above = SceneObject("diamond", "blue", 36, 32, 32)
    both = render(Scene("white", "plain", 0, (below, above), None))
    alone = render(Scene("white", "plain", 0, (below,), None))
    assert both.object_coverage[0].sum() < 0.6 * alone.object_coverage[0].sum()
    assert (both.object_coverage[0] <= alone.object_coverage[0] + 1e-6).all()


def test_captions_say_what_is_there() -> None:
    scene = Scene(
        "green",
        "striped",
        0,
        (SceneObject("sun", "red", 20, 16, 30), SceneObject("anchor", "blue", 20, 48, 30)),
        None,
    )
    assert scene.caption == "a red sun and a blue anchor on a striped green background"
    assert scene.label == "sun"
    written = write_on(scene, "cat", np.random.default_rng(0))
    assert written.caption == scene.caption + ' with the word "cat"'
    assert written.attributes() == {
        "symbol": {"sun", "anchor"},
        "object_colour": {"red", "blue"},
        "background": {"green"},
        "pattern": {"striped"},
        "word": {"cat"},
    }


def test_writing_on_a_scene_changes_nothing_outside_the_band() -> None:
    rng = np.random.default_rng(5)
    world = CalibrationWorld(40, 8, WorldConfig.single())
    for index in range(len(world)):
        before = world.render(index)
        after = render(write_on(before.scene, SYMBOLS[index], rng))
        assert after.scene.objects == before.scene.objects
        untouched = np.kron(after.writing_coverage == 0, np.ones((PATCH_SIZE, PATCH_SIZE), bool))
        assert (after.image[untouched] == before.image[untouched]).all()
        # The object stays to be seen beside the word that contradicts it.
        assert after.object_coverage.sum() > 0.5 * before.object_coverage.sum()


@pytest.mark.parametrize("text", (*SYMBOLS, *COLOURS))
def test_every_word_is_written_in_letters_that_can_be_read(text: str) -> None:
    scene = Scene("white", "plain", 0, (SceneObject("sun", "red", 20, 32, 32),), None)
    writing = write_on(scene, text, np.random.default_rng(1)).writing
    assert writing is not None
    assert writing.size >= 8
    letters = _letters(text, writing.size)
    assert letters.shape[1] <= IMAGE_SIZE
    rows = np.flatnonzero((letters > 0.5).any(axis=1))
    assert rows[-1] - rows[0] + 1 >= 5
    assert set(letter_coverage(writing)) == set(text)


def test_a_text_too_wide_for_the_image_is_refused() -> None:
    with pytest.raises(UserError, match="too wide"):
        write_on(WORLD.scene(0), "incomprehensibilities", np.random.default_rng(0))
