"""The bar: fine-tuning recovers the accuracy that words cost, as a plain CLIP of transformers
shows.
"""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, CLIPModel

import sparsight as sp
from sparsight.attacks import make_pairs
from sparsight.calibration import CLIP_FOLDER
from sparsight.calibration.clip import zero_shot_figures

SCENES = 512


def figures(folder):
    """Measure with transformers alone, on new scenes."""
    module = CLIPModel.from_pretrained(folder).eval()
    return zero_shot_figures(module, AutoTokenizer.from_pretrained(folder), SCENES)


@pytest.mark.slow
def test_four_fifths_of_the_loss_are_recovered_for_a_point_on_clean_images(tmp_path):
    model = sp.load_model("calibration", device="cpu")
    scenes = sp.open_images("calibration:1200:41")
    data = scenes.select([i for i in range(len(scenes)) if scenes.scene(i).writing is None])
    attack = make_pairs(sp.open_images("calibration:1000:42:single"))
    run = sp.finetune(model, data, out=tmp_path / "run", attack=attack, workers=0, quiet=True)
    before, after = figures(CLIP_FOLDER), figures(run.folder)
    lost = before["clean"] - before["attacked"]
    assert lost >= 0.2
    assert after["attacked"] - before["attacked"] >= 0.8 * lost
    assert before["clean"] - after["clean"] <= 0.01 + 1 / SCENES
