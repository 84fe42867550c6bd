from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

from sparsight.calibration import CLIP_FOLDER, SYMBOLS, CalibrationWorld, WorldConfig
from sparsight.calibration.captions import make_tokenizer
from sparsight.calibration.clip import embed_texts, to_input, tokenize, zero_shot_figures


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    return AutoModel.from_pretrained(CLIP_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CLIP_FOLDER)


def stated(name: str) -> float:
    """A share that the model card states, by a piece of its row."""
    card = (CLIP_FOLDER / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("|") and name in line)
    found = re.search(r"([\d.]+) % \(", row)
    assert found, row
    return float(found[1]) / 100


def test_the_package_is_small_and_holds_float16_weights() -> None:
    assert sum(file.stat().st_size for file in CLIP_FOLDER.iterdir()) < 12e6
    weights = load_file(CLIP_FOLDER / "model.safetensors")
    floats = {each.dtype for each in weights.values() if each.is_floating_point()}
    assert floats == {torch.float16}
    assert all(each.isfinite().all() for each in weights.values())


def test_it_is_an_ordinary_clip_whose_text_ends_where_the_tokenizer_says(model, tokenizer) -> None:
    assert type(model) is CLIPModel
    config = json.loads((CLIP_FOLDER / "config.json").read_text())
    assert config["model_type"] == "clip"
    # The id 2 would make transformers pool at the largest token id, as old CLIPs did.
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id != 2
    assert len(tokenizer) <= model.config.text_config.vocab_size


def test_the_packaged_tokenizer_is_the_one_that_the_code_makes(tokenizer) -> None:
    for text in ("a photo of a sun.", 'a red cat on a plain blue background with the word "urn"'):
        assert tokenizer(text)["input_ids"] == make_tokenizer()(text)["input_ids"]


@torch.no_grad()
def test_padding_does_not_change_a_text(model, tokenizer) -> None:
    texts = ["a sun.", "a red sun and a blue anchor on a striped green background"]
    together = embed_texts(model, tokenize(tokenizer, texts))
    alone = torch.cat([embed_texts(model, tokenize(tokenizer, [text])) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_image_processor_gives_what_the_model_was_trained_on() -> None:
    processor = AutoImageProcessor.from_pretrained(CLIP_FOLDER)
    images = np.stack([CalibrationWorld(seed=9).render(index).image for index in range(4)])
    given = processor([Image.fromarray(each) for each in images], return_tensors="pt")
    assert torch.allclose(given["pixel_values"], to_input(torch.from_numpy(images)), atol=1e-5)
    large = processor(Image.new("RGB", (200, 130)), return_tensors="pt")
    assert large["pixel_values"].shape == (1, 3, 64, 64)


@torch.no_grad()
def test_zero_shot_by_the_plain_api_of_transformers_finds_the_symbol(model, tokenizer) -> None:
    world = CalibrationWorld(128, 31_337, WorldConfig.single())
    scenes = [world.render(index) for index in range(len(world))]
    processor = AutoImageProcessor.from_pretrained(CLIP_FOLDER)
    pixels = processor([Image.fromarray(each.image) for each in scenes], return_tensors="pt")
    prompts = [f"a photo of a {symbol}." for symbol in SYMBOLS]
    out = model(**pixels, **tokenizer(prompts, padding=True, return_tensors="pt"))
    found = [SYMBOLS[number] for number in out.logits_per_image.argmax(dim=-1).tolist()]
    right = np.mean([name == each.scene.label for name, each in zip(found, scenes, strict=True)])
    # Three standard errors of 128 scenes below what the card states.
    claim = stated("nothing written")
    assert right >= claim - 3 * np.sqrt(claim * (1 - claim) / 128) - 0.01


def test_the_card_states_what_is_measured(model, tokenizer) -> None:
    figures = zero_shot_figures(model, tokenizer, n_scenes=128)
    rows = {"clean": "nothing written", "fooled": "fooled", "reads": "reads"}
    for name, row in rows.items():
        claim = stated(row)
        tolerance = 3 * np.sqrt(max(claim * (1 - claim), 0.01) / 128) + 0.01
        assert abs(figures[name] - claim) <= tolerance, name
