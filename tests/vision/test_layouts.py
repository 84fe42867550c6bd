from __future__ import annotations

import pytest
import torch

from sparsight.errors import UserError
from sparsight.vision import load_model
from sparsight.vision.layouts import (
    RES,
    gmp_parts,
    gmp_weight,
    is_openai,
    merged_positions,
    plain,
    to_huggingface,
    to_openai,
)


@pytest.fixture(scope="module")
def state():
    return load_model("calibration", device="cpu").module.state_dict()


def test_there_and_back_keeps_every_bit(state):
    openai = to_openai(state)
    assert is_openai(openai)
    assert openai["visual.proj"].shape == (192, 128)
    back = to_huggingface(openai)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_query_key_and_value_are_stacked_in_this_order(state):
    joined = to_openai(state)["visual.transformer.resblocks.1.attn.in_proj_weight"]
    for i, name in enumerate("qkv"):
        part = state[f"vision_model.encoder.layers.1.self_attn.{name}_proj.weight"]
        assert torch.equal(joined[192 * i : 192 * (i + 1)], part)


def test_parts_of_training_pass_through_and_merge_in_either_layout(state):
    openai = to_openai(state)
    key = "transformer.resblocks.0.mlp.c_fc"
    weight = openai.pop(f"{key}.weight")
    openai[f"{key}.r"], openai[f"{key}.theta"] = gmp_parts(weight)
    openai[RES] = openai["positional_embedding"] + 1
    theirs = to_huggingface(openai)
    assert theirs["text_model.encoder.layers.0.mlp.fc1.r"].shape == (512, 1)
    assert to_openai(theirs).keys() == openai.keys()
    for merged in (plain(openai), to_openai(plain(theirs))):
        torch.testing.assert_close(merged[f"{key}.weight"], weight, rtol=1e-6, atol=0)
        positions, before = merged["positional_embedding"], openai["positional_embedding"]
        assert torch.equal(positions[:20], before[:20])
        assert torch.equal(positions[20:], before[20:] + 1)
        assert not any(name.endswith((".r", ".theta", RES)) for name in merged)


def test_sizes_and_masks_among_the_weights_are_left_out(state):
    openai = to_openai(state)
    extra = dict.fromkeys(("input_resolution", "context_length", "mask1"), torch.tensor(1))
    assert to_huggingface({**openai, **extra}).keys() == state.keys()


def test_half_of_a_pair_is_refused(state):
    openai = to_openai(state)
    key = "visual.transformer.resblocks.2.mlp.c_proj"
    openai[f"{key}.theta"] = openai.pop(f"{key}.weight")
    with pytest.raises(UserError, match=r"c_proj\.theta is there, but .*c_proj\.r is missing"):
        plain(openai)
    del openai[f"{key}.theta"]
    theirs = to_huggingface(openai)
    del theirs["text_model.encoder.layers.1.self_attn.v_proj.bias"]
    with pytest.raises(UserError, match=r"v_proj\.bias is missing"):
        to_openai(theirs)


def test_weights_that_no_clip_has_are_refused_by_name():
    with pytest.raises(UserError, match=r"'visual\.trunk\.norm\.weight' does not belong"):
        to_huggingface({"visual.trunk.norm.weight": torch.zeros(3)})
    with pytest.raises(UserError, match="does not belong to a CLIP in Hugging Face's layout"):
        to_openai({"vision_model.head.probe": torch.zeros(3)})


@pytest.mark.unchecked
def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"\[10, 4\].*\[8, 4\]"):
        merged_positions(torch.zeros(8, 4), torch.zeros(10, 4), kept=4)


def test_parts_in_half_precision_are_those_of_float64_rounded_once():
    """The published code computes norms in float16, whose squares overflow or vanish."""
    weight = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)) * 60
    weight[1] *= 1e-6
    half = weight.half()
    r, theta = gmp_parts(half)
    exact = half.double().norm(dim=1, keepdim=True)
    assert torch.equal(r, exact.half())
    assert torch.equal(theta[0], (half[0].double() / exact[0]).half())
    back = gmp_weight(r, theta)
    assert back.dtype == torch.float32
    error = (back.double() - half.double()).norm(dim=1) / exact.squeeze(1)
    assert error[0] < 1e-3


def test_a_row_of_zeros_stays_zero():
    weight = torch.randn(3, 5)
    weight[1] = 0
    r, theta = gmp_parts(weight)
    assert torch.isfinite(theta).all()
    assert torch.equal(gmp_weight(r, theta)[1], torch.zeros(5))
