"""Texts, prompts and zero-shot accuracy, against transformers and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel

import tiny_models
from sparsight.errors import SparsightError, UserError
from sparsight.images import open_images
from sparsight.intervals import wilson_interval
from sparsight.vision.zero_shot import (
    TEMPLATES,
    ZeroShotTally,
    classifier_weights,
    classify,
    contrastive_loss,
    resolve_templates,
    zero_shot,
)

TEXTS = ["a photo of the cat .", "sun", "a drawing of many red dog and blue anchor ."]
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "cat": (120, 90, 40)}


@pytest.mark.parametrize("family", tiny_models.WITH_TEXT)
def test_text_embeddings_are_those_of_get_text_features(family, folder, model):
    whole = AutoModel.from_pretrained(folder(family)).eval()
    options = {"padding": "max_length"} if family == "siglip" else {"padding": True}
    inputs = tiny_models.tokenizer()(
        TEXTS, return_tensors="pt", max_length=16, truncation=True, **options
    )
    keys = ("input_ids",) if family == "siglip" else ("input_ids", "attention_mask")
    with torch.no_grad():
        features = whole.get_text_features(**{key: inputs[key] for key in keys})
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    assert torch.equal(model(family).embed_texts(TEXTS), features)


@pytest.mark.parametrize("family", tiny_models.WITH_TEXT)
def test_logits_are_those_of_the_whole_model(family, folder, model, pixels):
    whole = AutoModel.from_pretrained(folder(family)).eval()
    inputs = tiny_models.tokenizer()(
        TEXTS, return_tensors="pt", padding="max_length", max_length=16
    )
    with torch.no_grad():
        expected = whole(input_ids=inputs["input_ids"], pixel_values=pixels).logits_per_image
    ours = model(family)
    weights = F.normalize(ours.embed_texts(TEXTS), dim=-1)
    logits = classify(ours.embed_images(pixels), weights, ours.logit_scale) + ours.logit_bias
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiny_models.WITH_TEXT)
def test_texts_in_small_batches_embed_as_in_one(family, model):
    ours = model(family)
    torch.testing.assert_close(
        ours.embed_texts(TEXTS, batch_size=1), ours.embed_texts(TEXTS), rtol=1e-5, atol=1e-5
    )


def test_a_text_longer_than_the_context_is_truncated(model):
    assert model("clip").embed_texts(["cat " * 100]).isfinite().all()


@pytest.mark.parametrize("family", ["dinov2", "vit"])
def test_models_without_text_say_so(family, model):
    ours = model(family)
    assert not ours.has_text
    for call in (lambda: ours.embed_texts(["cat"]), lambda: ours.logit_scale):
        with pytest.raises(UserError, match="no text tower"):
            call()


@pytest.mark.parametrize("texts", ["cat", []])
def test_texts_must_be_a_list(texts, model):
    with pytest.raises(UserError, match="list of at least one text"):
        model("clip").embed_texts(texts)


def test_a_text_tower_without_a_tokenizer_says_so(folder, tmp_path):
    import shutil

    from sparsight.vision import load_model

    shutil.copytree(folder("clip"), tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "m" / name).unlink(missing_ok=True)
    ours = load_model(str(tmp_path / "m"), device="cpu")
    with pytest.raises(UserError, match="tokenizer could not be loaded"):
        ours.embed_texts(["cat"])


def test_the_sets_of_templates_are_whole():
    assert len(set(TEMPLATES["openai80"])) == 80
    assert all(template.count("{}") == 1 for ts in TEMPLATES.values() for template in ts)
    assert "itap of my {}." in TEMPLATES["openai80"]


def test_templates_may_be_the_name_of_a_set_or_one_text_or_a_list():
    assert resolve_templates("simple") == ("a photo of a {}.",)
    assert resolve_templates("the {}") == ("the {}",)
    assert resolve_templates(["the {}", "a {}"]) == ("the {}", "a {}")
    for bad in ("openai81", [], ["a photo"]):
        with pytest.raises(UserError, match="templates"):
            resolve_templates(bad)


def test_class_weights_are_unit_means_of_unit_embeddings_whatever_the_batch(model):
    ours = model("clip")
    names, sentences = ["cat", "red dog", "sun"], ["a photo of the {} .", "{}", "a drawing {}"]
    expected = []
    for name in names:
        texts = [sentence.replace("{}", name) for sentence in sentences]
        mean = F.normalize(ours.embed_texts(texts).double(), dim=-1).mean(dim=0)
        expected.append(F.normalize(mean, dim=0))
    for batch_size in (2, 100):
        weights = classifier_weights(ours, names, sentences, batch_size=batch_size)
        torch.testing.assert_close(weights.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.unchecked
def test_contrastive_loss_is_the_mean_of_both_directions():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(7, 5, generator=generator) for _ in range(2))
    total = 0.0
    for i in range(7):
        for a, b in ((images, texts), (texts, images)):
            scores = [
                10 * float(F.cosine_similarity(a[i].double(), b[j].double(), dim=0))
                for j in range(7)
            ]
            total += math.log(sum(math.exp(s) for s in scores)) - scores[i]
    assert float(contrastive_loss(images, texts, 10.0)) == pytest.approx(total / 14, rel=1e-5)
    with pytest.raises(UserError, match="row by row"):
        contrastive_loss(images, texts[:3], 10.0)


def test_tally_counts_hits_as_counting_by_hand_does():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 9, generator=generator)
    targets = torch.randint(0, 9, (50,), generator=generator)
    tally = ZeroShotTally([str(i) for i in range(9)])
    for part in range(0, 50, 8):
        tally.update(logits[part : part + 8], targets[part : part + 8])
    result = tally.result()
    ranks = [
        sorted(row, reverse=True).index(row[t])
        for row, t in zip(logits.tolist(), targets, strict=True)
    ]
    assert result.top1 == sum(rank == 0 for rank in ranks) / 50
    assert result.top5 == sum(rank < 5 for rank in ranks) / 50
    assert (result.n, result.n_classes) == (50, 9)
    first = [rank == 0 for rank, t in zip(ranks, targets, strict=True) if t == 3]
    assert result.per_class["3"] == pytest.approx(sum(first) / len(first))


def test_equal_logits_are_not_a_hit_for_every_class():
    """A constant embedding (a zeroed site) must score as one guess, not as all right."""
    tally = ZeroShotTally(list("abcd"))
    tally.update(torch.zeros(4, 4), torch.arange(4))
    assert tally.result().top1 == 0.25


def test_logits_that_are_not_finite_are_a_fault():
    with pytest.raises(SparsightError, match="not finite"):
        ZeroShotTally(["a"]).update(torch.tensor([[float("nan")]]), torch.tensor([0]))


def test_wilson_interval_has_its_published_values():
    # Newcombe (1998), Statistics in Medicine 17, table I: 81/263, 15/148, 0/20, 1/29.
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(hits, n) == pytest.approx((low, high), abs=5e-5)


@pytest.fixture
def photos(tmp_path):
    """Three classes of noisy images of one colour, and one broken image."""
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(5):
            noise = generator.integers(-25, 25, (40, 50, 3))
            image = Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))
            image.save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    return open_images(str(tmp_path / "photos"))


@pytest.mark.parametrize("family", tiny_models.WITH_TEXT)
def test_zero_shot_over_a_folder_equals_a_loop_over_its_images(family, model, photos):
    ours = model(family)
    result = zero_shot(ours, photos, templates="a photo of the {}", batch_size=4, workers=0)
    labels = photos.labels()
    texts = F.normalize(ours.embed_texts([f"a photo of the {name}" for name in labels]), dim=-1)
    hits = n = 0
    for i in range(len(photos)):
        if "broken" in photos.info(i).id:
            continue
        pixels = ours.transform(photos.load(i))[None]
        guess = int((F.normalize(ours.embed_images(pixels), dim=-1) @ texts.T).argmax())
        hits += labels[guess] == photos.info(i).label
        n += 1
    assert (result.top1, result.n, result.failed) == (hits / n, 15, 1)
    assert result.top5 == 1.0  # three classes: all are among the best five
    assert result.interval == wilson_interval(hits, n)
    assert result.to_dict()["top1"] == result.top1


def test_edits_take_effect_in_zero_shot(model, photos):
    ours = model("clip")
    with ours.edit({"embedding": lambda x: torch.zeros_like(x)}):
        result = zero_shot(ours, photos, workers=0)
    assert result.top1 == pytest.approx(1 / 3)  # one class gets all images: 5 of 15


def test_images_of_no_class_are_counted_not_scored(model, photos):
    ours = model("clip")
    names = {"red": "red sun", "blue": "blue sun"}
    result = zero_shot(ours, photos, names, workers=0)
    assert (result.n, result.unknown_label, result.unlabelled) == (10, 6, 0)
    assert set(result.per_class) == {"red", "blue"}
    assert zero_shot(ours, photos, workers=0, limit=4).n <= 4


def test_images_without_labels_are_refused(model, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    with pytest.raises(UserError, match="label"):
        zero_shot(model("clip"), open_images(str(tmp_path)), workers=0)
    with pytest.raises(UserError, match="no image could be scored"):
        zero_shot(model("clip"), open_images(str(tmp_path)), ["cat"], workers=0)


def test_embeddings_and_directions_in_half_precision_give_float32_logits():
    embeddings = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 300
    weights = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
    logits = classify(embeddings.half(), weights.half(), 100.0)
    assert logits.dtype == torch.float32
    expected = classify(embeddings.half().float(), weights.half().float(), 100.0)
    assert torch.equal(logits, expected)
