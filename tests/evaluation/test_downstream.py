from __future__ import annotations

import math

import pytest
import torch

from evaluation_parts import LABELS, SITE, Pictures, make_sae, perfect_sae
from sparsight.errors import UserError
from sparsight.evaluation import downstream
from sparsight.evaluation.downstream import CONTRASTIVE_BATCH, replacing, why_not
from sparsight.vision import contrastive_loss, embed_variants, zero_shot

N = 40


def run(model, replacements, images=None, site=SITE, tokens="all", **options):
    return downstream(
        model, images or Pictures(N), site, tokens, replacements, workers=0, **options
    )


@pytest.fixture(scope="module")
def standard(clip):
    sae = make_sae()
    return {
        "reconstructed": lambda x: sae(x).x_hat,
        "zero": torch.zeros_like,
        "mean": lambda x: torch.full_like(x, 0.1),
    }


@pytest.mark.parametrize("site", [SITE, "blocks.0.attn_out", "embedding", "final_norm"])
def test_a_perfect_reconstruction_keeps_everything(clip, site):
    sae = perfect_sae(clip.d_in(site))
    found = run(
        clip, {"reconstructed": lambda x: sae(x).x_hat, "zero": torch.zeros_like}, site=site
    )
    original, same = found.zero_shot["original"], found.zero_shot["reconstructed"]
    assert (same["top1"], same["top5"], same["n"]) == (original["top1"], original["top5"], N)
    assert same["preserved"] == 1 and same["difference"] == 0 and same["kl"] < 1e-9
    loss = found.contrastive["reconstructed"]
    assert loss["loss"] == pytest.approx(found.contrastive["original"]["loss"], abs=1e-6)
    assert loss["recovered_zero"] == pytest.approx(1, abs=1e-4)


def test_the_original_equals_zero_shot_without_an_edit(clip, standard):
    found, expected = run(clip, standard).zero_shot["original"], zero_shot(clip, Pictures(N))
    assert (found["top1"], found["top5"]) == (expected.top1, expected.top5)
    assert found["interval"] == expected.interval and found["n_classes"] == len(LABELS)
    assert 0 < found["top1"] < 1


@pytest.mark.parametrize("tokens", ["all", "patches", "cls"])
@pytest.mark.parametrize("site", [SITE, "blocks.2.resid_pre", "blocks.1.mlp_out"])
def test_each_variant_equals_an_edited_pass(clip, standard, site, tokens):
    edits = {name: replacing(f, clip, site, tokens) for name, f in standard.items()}
    pixels = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = embed_variants(clip, pixels, site, edits)
        torch.testing.assert_close(found["original"], clip.embed_images(pixels))
        for name, edit in edits.items():
            with clip.edit({site: edit}):
                expected = clip.embed_images(pixels)
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(found[name], found["original"], atol=1e-3)


def test_variants_of_a_model_that_pools_by_attention_equal_edited_passes(siglip, standard):
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    edits = {name: replacing(f, siglip, SITE, "all") for name, f in standard.items()}
    with torch.no_grad():
        found = embed_variants(siglip, pixels, SITE, edits)
        for name, edit in edits.items():
            with siglip.edit({SITE: edit}):
                torch.testing.assert_close(
                    found[name], siglip.embed_images(pixels), atol=1e-5, rtol=1e-5
                )


@pytest.mark.parametrize(
    ("tokens", "replaced"), [("all", range(17)), ("patches", range(1, 17)), ("cls", [0])]
)
def test_only_the_positions_that_the_sae_was_trained_on_are_replaced(clip, tokens, replaced):
    x = torch.randn(3, 17, 32)
    changed = replacing(lambda v: v + 1, clip, SITE, tokens)(x)
    expected = x.clone()
    expected[:, list(replaced)] += 1
    torch.testing.assert_close(changed, expected)


def test_ablations_that_run_once_give_the_figures_of_many_runs(clip, standard):
    found = run(clip, standard, batch_images=4)
    with clip.edit({SITE: torch.zeros_like}):
        expected = zero_shot(clip, Pictures(N))
    assert found.zero_shot["zero"]["top1"] == expected.top1
    # With only patches ablated, the image still comes through CLS, so nothing is constant.
    found = run(clip, standard, tokens="patches", batch_images=4)
    with clip.edit({SITE: replacing(torch.zeros_like, clip, SITE, "patches")}):
        expected = zero_shot(clip, Pictures(N))
    assert found.zero_shot["zero"]["top1"] == expected.top1


@pytest.mark.parametrize("batch", [1, 7])
def test_figures_do_not_depend_on_the_batch_size(clip, standard, batch):
    one, other = run(clip, standard), run(clip, standard, batch_images=batch)
    for family in ("zero_shot", "contrastive"):
        for name, figures in getattr(one, family).items():
            for key, value in figures.items():
                if isinstance(value, float):
                    assert getattr(other, family)[name][key] == pytest.approx(value, abs=1e-5)


def test_kl_and_paired_difference_equal_those_by_hand(clip, standard):
    found = run(clip, standard).zero_shot["reconstructed"]
    from sparsight.vision import classifier_weights, classify

    images = Pictures(N)
    pixels = torch.stack([clip.transform(images.load(i)) for i in range(N)])
    names = {label: i for i, label in enumerate(sorted(LABELS))}
    targets = torch.tensor([names[images.info(i).label] for i in range(N)])
    with torch.no_grad():
        weights = classifier_weights(clip, [name.replace("_", " ") for name in names])
        logits = [classify(clip.embed_images(pixels), weights, clip.logit_scale)]
        with clip.edit({SITE: replacing(standard["reconstructed"], clip, SITE, "all")}):
            logits.append(classify(clip.embed_images(pixels), weights, clip.logit_scale))
    p, q = (each.double().softmax(dim=1) for each in logits)
    kl = (p * (p / q).log()).sum(dim=1).mean()
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4)
    right = [(each.argmax(dim=1) == targets).double() for each in logits]
    assert found["difference"] == pytest.approx(float((right[1] - right[0]).mean()))
    low, high = found["difference_interval"]
    assert low < found["difference"] < high


def test_contrastive_loss_is_that_of_whole_batches_of_captions(clip):
    images = Pictures(CONTRASTIVE_BATCH + 30)
    found = run(clip, {"zero": torch.zeros_like}, images).contrastive["original"]
    pixels = [clip.transform(images.load(i)) for i in range(CONTRASTIVE_BATCH)]
    with torch.no_grad():
        expected = contrastive_loss(
            clip.embed_images(torch.stack(pixels)),
            clip.embed_texts([images.info(i).caption for i in range(CONTRASTIVE_BATCH)]),
            clip.logit_scale,
        )
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert (found["n"], found["batch"], found["left_over"]) == (256, 256, 30)


def test_images_without_label_or_caption_are_counted_and_left_out(clip, standard):
    found = run(clip, standard, Pictures(N, without=4))
    assert found.zero_shot["original"]["n"] == 30 == found.contrastive["original"]["n"]
    assert found.zero_shot["original"]["unlabelled"] == 10
    few = run(clip, standard, class_names=["cat", "dog"])
    assert few.zero_shot["original"]["n"] + few.zero_shot["original"]["unknown_label"] == N
    assert few.zero_shot["original"]["n_classes"] == 2


def test_an_original_that_is_never_right_gives_no_share_preserved(clip, standard):
    images = Pictures(6)
    wrong = {label: "photo" if label == "cat" else label for label in LABELS}
    found = run(clip, standard, images, class_names=wrong)
    for name, shot in found.zero_shot.items():
        top1 = found.zero_shot["original"]["top1"]
        if name != "original":
            assert shot["preserved"] == (shot["top1"] / top1 if top1 else None)


def test_a_figure_that_cannot_be_measured_has_a_reason(clip, standard):
    found = run(clip, standard, Pictures(5, without=1))
    assert not found.zero_shot and not found.contrastive
    assert "no labels" in found.omitted["zero_shot"]
    assert "no captions" in found.omitted["contrastive"]
    assert "cannot be replaced" in why_not(clip, Pictures(3), "mean")
    assert "No model" in why_not(None, Pictures(3), "all")
    with pytest.raises(UserError, match="'mean'"):
        replacing(torch.zeros_like, clip, SITE, "mean")
    assert math.isfinite(run(clip, standard).contrastive["zero"]["loss"])
