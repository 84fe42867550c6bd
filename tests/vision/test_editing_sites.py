"""Edits in a forward pass: exact, nested, differentiable, and removed afterwards."""

from __future__ import annotations

import pytest
import torch

from sparsight.errors import UserError
from tiny_models import FAMILIES

every_family = pytest.mark.parametrize("family", FAMILIES)


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())


@every_family
def test_an_identity_edit_of_every_site_changes_no_bit(family, model, pixels):
    ours = model(family)
    plain, embedded = ours.read(pixels, ours.sites), ours.embed_images(pixels)
    with ours.edit({site: lambda x: x.clone() for site in ours.sites}):
        edited = ours.read(pixels, ours.sites)
        assert torch.equal(ours.embed_images(pixels), embedded)
    for site in ours.sites:
        assert torch.equal(edited[site], plain[site])


@every_family
def test_an_edit_at_every_site_takes_effect_and_reads_back(family, model, pixels):
    ours = model(family)
    embedded = ours.embed_images(pixels)
    for site in ours.sites:
        value = torch.randn_like(ours.read(pixels, site)[site])
        with ours.edit({site: lambda x, value=value: value}):
            assert torch.equal(ours.read(pixels, site)[site], value), site
            assert not torch.allclose(ours.embed_images(pixels), embedded), site
        assert torch.equal(ours.embed_images(pixels), embedded), site


@every_family
def test_replacing_a_block_by_what_it_computed_gives_the_same_embedding(family, model, pixels):
    ours = model(family)
    states = ours.read(pixels, "blocks.1.resid_post")["blocks.1.resid_post"]
    other = torch.randn_like(pixels)
    with ours.edit({"blocks.1.resid_post": lambda x: states}):
        assert torch.equal(ours.embed_images(other), ours_embedding(ours, pixels))


def ours_embedding(model, pixels):
    return model.embed_images(pixels)


def test_the_stream_between_blocks_can_be_edited_from_either_side(model, pixels):
    ours = model("clip")
    with ours.edit({"blocks.0.resid_post": lambda x: x + 1}):
        after = ours.embed_images(pixels)
    with ours.edit({"blocks.1.resid_pre": lambda x: x + 1}):
        assert torch.equal(ours.embed_images(pixels), after)


def test_zeroing_attention_and_mlp_makes_a_block_do_nothing(model, pixels):
    ours = model("dinov2")
    zero = {"blocks.1.attn_out": torch.zeros_like, "blocks.1.mlp_out": torch.zeros_like}
    with ours.edit(zero):
        read = ours.read(pixels, ["blocks.1.resid_pre", "blocks.1.resid_post"])
    assert torch.equal(read["blocks.1.resid_pre"], read["blocks.1.resid_post"])


def test_inner_edits_get_the_output_of_outer_ones(model, pixels):
    ours = model("vit")
    site = "blocks.0.resid_post"
    x = ours.read(pixels, site)[site]
    with ours.edit({site: lambda x: x + 1}):
        with ours.edit({site: lambda x: x * 3}):
            assert torch.equal(ours.read(pixels, site)[site], (x + 1) * 3)
        assert torch.equal(ours.read(pixels, site)[site], x + 1)
    assert torch.equal(ours.read(pixels, site)[site], x)


@pytest.mark.parametrize("within", ["edit", "block"])
def test_hooks_are_gone_after_an_exception(within, model, pixels):
    ours = model("siglip")
    before = hooks(ours)

    def fail(x):
        if within == "edit":
            raise ZeroDivisionError
        return x

    with pytest.raises(ZeroDivisionError), ours.edit({"blocks.1.mlp_out": fail}):
        ours.read(pixels, ours.sites)
        raise ZeroDivisionError
    assert hooks(ours) == before
    ours.read(pixels, ours.sites)
    assert hooks(ours) == before


@every_family
def test_gradients_flow_through_edits_and_to_pixels(family, model, pixels):
    ours = model(family)
    shift = torch.zeros(32, requires_grad=True)
    picture = pixels.clone().requires_grad_()
    with ours.edit({"blocks.1.resid_post": lambda x: x + shift}):
        ours.embed_images(picture)[:, 0].sum().backward()
    assert shift.grad is not None
    step = 1e-3
    direction = shift.grad / shift.grad.norm()
    with torch.no_grad():
        sums = []
        for sign in (-1, 1):
            with ours.edit({"blocks.1.resid_post": lambda x, s=sign: x + s * step * direction}):
                sums.append(ours.embed_images(pixels)[:, 0].sum())
    slope = (sums[1] - sums[0]) / (2 * step)
    torch.testing.assert_close(slope, shift.grad.norm(), rtol=2e-2, atol=1e-3)
    assert picture.grad is not None and picture.grad.abs().sum() > 0
    assert all(p.grad is None for p in ours.module.parameters())


def test_the_output_of_an_edit_is_cast_to_the_models_dtype(model, pixels):
    ours = model("clip")
    with ours.edit({"blocks.0.resid_post": lambda x: x.double()}):
        out = ours.embed_images(pixels)
    assert torch.equal(out, ours.embed_images(pixels))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda x: x[:, :1], r"blocks\.1\.resid_post returned shape \[4, 1, 32\].*\[4, 17, 32\]"),
        (lambda x: None, "returned NoneType"),
        (lambda x: x.to("meta"), "on meta"),
    ],
)
def test_an_edit_with_a_wrong_output_is_refused(edit, message, model, pixels):
    ours = model("clip")
    with pytest.raises(UserError, match=message), ours.edit({"blocks.-2.resid_post": edit}):
        ours.embed_images(pixels)


def test_one_site_under_two_names_is_refused(model):
    edits = {"blocks.-1.mlp_out": torch.relu, "blocks.2.mlp_out": torch.relu}
    with pytest.raises(UserError, match="twice"), model("clip").edit(edits):
        pass


def test_an_unknown_site_is_refused_before_anything_runs(model):
    with pytest.raises(UserError, match="has no site"), model("vit").edit({"embedding": abs}):
        pass
