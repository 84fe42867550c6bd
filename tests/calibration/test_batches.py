from __future__ import annotations

import itertools

import numpy as np
import torch

from sparsight.calibration import COLOURS, PATCH_GRID, PATTERNS, SYMBOLS, CalibrationWorld
from sparsight.calibration.captions import (
    BACKGROUND_TEMPLATES,
    CONTEXT_LENGTH,
    TEMPLATES,
    VOCABULARY_SIZE,
    WORD_TEMPLATES,
    caption_of,
    make_tokenizer,
)
from sparsight.calibration.world import WorldConfig
from tools.calibration_clip.batches import SCENES_ON_ONE_GROUND, difficulty, draw_batch


def test_a_batch_is_the_same_again_and_others_differ() -> None:
    one, again = (draw_batch(3, 5, 40, WorldConfig()) for _ in range(2))
    for name, value in vars(one).items():
        other = getattr(again, name)
        assert value == other if name == "captions" else torch.equal(value, other)
    for seed, step in ((3, 6), (4, 5)):
        assert not torch.equal(one.pixels, draw_batch(seed, step, 40, WorldConfig()).pixels)


def test_scenes_of_a_group_share_their_ground() -> None:
    batch = draw_batch(0, 0, 3 * SCENES_ON_ONE_GROUND, WorldConfig())
    for values in (batch.background, batch.pattern):
        groups = values.view(3, SCENES_ON_ONE_GROUND)
        assert (groups == groups[:, :1]).all()


def test_the_ground_truth_of_patches_and_of_the_scene_agree() -> None:
    batch = draw_batch(1, 2, 96, WorldConfig(writing=0.5))
    none = len(SYMBOLS)
    for row in range(96):
        on_patches = set(batch.patch_symbol[row].tolist()) - {none}
        in_scene = set(batch.symbols[row].nonzero().flatten().tolist())
        assert on_patches <= in_scene
        assert 1 <= len(in_scene) <= 2
        colours = set(batch.patch_colour[row].tolist()) - {len(COLOURS)}
        assert colours <= set(batch.colours[row].nonzero().flatten().tolist())
        assert 0 <= batch.pattern[row] < len(PATTERNS)
        word = int(batch.word[row])
        shown = set(batch.patch_word[row].tolist()) - {none}
        assert shown == (set() if word == none else {word})
        letters = {chr(97 + i) for i in batch.patch_letters[row].any(dim=0).nonzero().flatten()}
        assert letters <= (set() if word == none else set(SYMBOLS[word]))
        if word != none:
            assert len(letters) >= 0.5 * len(set(SYMBOLS[word]))
    assert batch.patch_symbol.shape == (96, PATCH_GRID**2)


def test_the_world_grows_from_easy_to_itself() -> None:
    stages = [difficulty(progress) for progress in np.linspace(0, 1, 11)]
    assert stages[0].two_objects == 0
    assert stages[0].min_size > WorldConfig().min_size
    assert all(a.spread <= b.spread for a, b in itertools.pairwise(stages))
    assert stages[3:] == [WorldConfig()] * 8


def test_the_tokenizer_is_always_the_same_and_reads_every_caption() -> None:
    one, again = make_tokenizer(), make_tokenizer()
    assert one.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    assert len(one) <= VOCABULARY_SIZE
    assert (one.pad_token_id, one.eos_token_id, one.bos_token_id) == (0, 1, 2)
    names = (*SYMBOLS, *COLOURS, *PATTERNS)
    said = [
        template.format(name)
        for template in (*TEMPLATES, *WORD_TEMPLATES, *BACKGROUND_TEMPLATES)
        for name in names
    ]
    world = CalibrationWorld(300, 77)
    said += [caption_of(world.scene(i), i / 300) for i in range(300)]
    said.append("Ünknown: 東 🙂")
    for text in said:
        ids = one(text)["input_ids"]
        assert one.decode(ids, skip_special_tokens=True).strip() == text
        assert ids[0] == one.bos_token_id and ids[-1] == one.eos_token_id
        assert len(ids) <= CONTEXT_LENGTH


def test_each_symbol_name_is_one_token() -> None:
    tokenizer = make_tokenizer()
    in_prompt = [tokenizer(f"a photo of a {name}.")["input_ids"] for name in SYMBOLS]
    assert len({len(ids) for ids in in_prompt}) == 1
    assert len({ids[5] for ids in in_prompt}) == len(SYMBOLS)


def test_short_captions_leave_out_the_ground() -> None:
    scene = CalibrationWorld(seed=4).scene(0)
    assert caption_of(scene, 0.0) == scene.caption
    for u in (0.5, 0.8):
        assert "background" not in caption_of(scene, u)
        assert scene.label in caption_of(scene, u)
