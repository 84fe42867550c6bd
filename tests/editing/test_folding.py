"""Folding: a plain model that does what the edited one does."""

from __future__ import annotations

import pytest
import torch
import transformers

from editing_parts import SITE, activations, belonging, make_sae
from sparsight.editing import (
    Clamp,
    DirectionAblation,
    Keep,
    LatentEdit,
    MeanAblation,
    NeuronEdit,
    Off,
    Scale,
    Set,
    every_write,
    fold,
    intervene,
)
from sparsight.errors import UserError
from sparsight.vision import VisionModel, load_model
from sparsight.vision.saving import save_model


def directions(d: int, n: int = 3) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(5))


def error(model: VisionModel, edits, pixels) -> float:
    """Return the error of the folded model's embeddings relative to their norm, for a real edit."""
    with intervene(model, edits):
        wanted = model.embed_images(pixels)
    before = model.embed_images(pixels)
    found = fold(model, edits).embed_images(pixels)
    assert torch.equal(model.embed_images(pixels), before)
    assert float((wanted - before).norm() / before.norm()) > 1e-3
    return float((found - wanted).norm() / wanted.norm())


@torch.no_grad()
@pytest.mark.parametrize(
    "site",
    [
        "embedding",
        "final_norm",
        "blocks.0.attn_out",
        "blocks.1.mlp_out",
        "blocks.2.mlp_pre",
        "blocks.-1.mlp_post",
    ],
)
def test_a_folded_projection_is_the_intervention(clip, pixels, site):
    assert error(clip, [DirectionAblation(directions(clip.d_in(site)), site)], pixels) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("action", [Off(), Set(0.4), Scale(-1.5), Keep(), MeanAblation([0.3, 0.1])])
@pytest.mark.parametrize("site", ["blocks.1.mlp_post", "blocks.0.mlp_pre", "blocks.0.mlp_out"])
def test_folded_neurons_are_the_intervention(clip, pixels, site, action):
    assert error(clip, NeuronEdit(site, [2, 7], action), pixels) < 1e-5


@torch.no_grad()
def test_a_mean_is_folded_into_biases_if_there_are_any(clip, pixels):
    site = "blocks.1.mlp_out"
    mean = activations(clip, pixels, site).mean(dim=0)
    edit = DirectionAblation(directions(32), site, mean=mean)
    assert error(clip, edit, pixels) < 1e-5
    edit = DirectionAblation(directions(20), "embedding", mean=torch.ones(20))
    with pytest.raises(UserError, match="no bias to hold it"):
        fold(clip, edit)


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov2_with_registers", "siglip"])
def test_directions_are_removed_from_every_write_of_models_without_a_norm_before_block_0(
    tiny, pixels, family
):
    model = tiny(family)
    rows = directions(32)
    edits = every_write(model, rows)
    assert error(model, edits, pixels) < 1e-5
    folded = fold(model, edits)
    streams = folded.read(pixels, [f"blocks.{i}.resid_post" for i in range(3)])
    for x in streams.values():
        assert (x @ rows.T).abs().max() < 1e-4 * x.norm(dim=-1).max()
    assert error(model, edits[:1], pixels) < 1e-5


@torch.no_grad()
def test_clip_without_its_embeddings_is_folded_in_every_write(clip, pixels):
    rows = directions(32)
    with pytest.raises(UserError, match=r"normalisation \(pre_layrnorm\) comes between"):
        fold(clip, every_write(clip, rows))
    edits = every_write(clip, rows, up_to="blocks.1.resid_post", embeddings=False)
    assert [each.site for each in edits] == [
        f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn_out", "mlp_out")
    ]
    assert error(clip, edits, pixels) < 1e-5


@torch.no_grad()
def test_several_edits_of_one_site_are_folded_in_the_order_of_an_intervention(clip, pixels):
    site = "blocks.1.mlp_out"
    edits = [
        DirectionAblation(directions(32), site),
        NeuronEdit(site, [1, 2], Set(3.0)),
        DirectionAblation(directions(32, 5)[3:], site),
        DirectionAblation(directions(20), "embedding"),
    ]
    assert error(clip, edits, pixels) < 1e-5


@torch.no_grad()
def test_the_folded_model_is_a_plain_clip_for_transformers(clip, pixels, tmp_path):
    site = "embedding"
    sae = make_sae(20, x=activations(clip, pixels, site), metadata=belonging(clip, site))
    edits = [
        DirectionAblation.of_latents(sae, [1, 2, 3]),
        NeuronEdit("blocks.1.mlp_post", [4, 5], Off()),
    ]
    with intervene(clip, edits):
        wanted = clip.embed_images(pixels)
    folded = fold(clip, edits)
    save_model(folded, tmp_path)
    plain = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    found = plain.get_image_features(pixel_values=pixels)
    found = getattr(found, "pooler_output", found)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert folded.weights_hash != clip.weights_hash
    assert load_model(str(tmp_path), device="cpu").weights_hash == folded.weights_hash


def test_edits_that_cannot_be_folded_are_refused_with_the_reason(tiny, clip, pixels):
    sae = make_sae(32, x=activations(clip, pixels), metadata=belonging(clip))
    rows = directions(32)
    for edit, message in (
        (LatentEdit(sae, [1], Off()), r"which latents are active.*of_latents"),
        (DirectionAblation(rows, SITE), "The residual stream is a sum"),
        (DirectionAblation(rows, "blocks.1.resid_pre"), "The residual stream is a sum"),
        (DirectionAblation(rows, "blocks.1.mlp_out", tokens="cls"), "all positions share"),
        (NeuronEdit("blocks.1.mlp_post", [1], Clamp(high=0.1)), "Clamp .* not linear"),
        (NeuronEdit("final_norm", [1], Set(1.0)), "no bias"),
        (NeuronEdit("blocks.7.mlp_out", [1], Off()), "no site"),
    ):
        with pytest.raises(UserError, match=message):
            fold(clip, edit)
    with pytest.raises(UserError, match="no linear projection comes directly before"):
        fold(tiny("siglip"), DirectionAblation(rows, "embedding"))
    with pytest.raises(UserError, match=r"up_to is blocks.0.mlp_out"):
        every_write(clip, rows, "blocks.0.mlp_out")
