"""Long-CLIP in the real class of transformers; for open_clip's see test_weights_open_clip.py."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPModel, CLIPProcessor

from sparsight.editing import is_split, keep_positions, lengthen, merge_positions, stretched
from sparsight.errors import UserError
from sparsight.finetuning.groups import Rates, set_trainable
from sparsight.vision import load_model
from sparsight.vision.layouts import RES
from sparsight.vision.long_clip import factor_for
from sparsight.vision.saving import write_model

SHORT = ["a photo of a sun", "an anchor and a red umbrella"]
LONG = "a photo of a sun and a cat and " * 6


@pytest.fixture
def model():
    return load_model("calibration", device="cpu")


def test_the_table_is_stretched_as_published():
    """Row by row, as the paper's code fills the table for 77 positions."""
    p = torch.randn(77, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = torch.zeros(248, 8, dtype=torch.float64)
    q[:20] = p[:20]
    for i in range(56):
        for j in range(4):
            q[20 + 4 * i + j] = (4 - j) / 4 * p[20 + i] + j / 4 * p[21 + i]
    for j in range(4):
        q[244 + j] = p[76] + j / 4 * (p[76] - p[75])
    found = stretched(p)
    assert found.shape == (248, 8)
    torch.testing.assert_close(found, q, rtol=1e-14, atol=1e-14)
    assert torch.equal(stretched(p.float())[:20], p[:20].float())
    assert torch.equal(stretched(p.float())[20::4], p[20:].float())


def test_other_lengths_and_factors():
    p = torch.arange(32.0)[:, None]
    assert stretched(p, kept=20, factor=4).shape == (68, 1)
    torch.testing.assert_close(
        stretched(p, kept=8, factor=2).squeeze(1)[8:], torch.arange(8, 32, 0.5)
    )
    assert torch.equal(stretched(p, kept=20, factor=1), p)
    assert factor_for(248, 77) == 4
    assert factor_for(68, 32) == 4
    with pytest.raises(UserError, match=r"stretched to 250.* gives: 134, 191, 248"):
        factor_for(250, 77)
    with pytest.raises(UserError, match="16 positions, of which 20 are kept"):
        stretched(torch.zeros(16, 2))


def test_short_texts_embed_as_before_and_long_ones_fit(model, tmp_path):
    before = model.embed_texts(SHORT)
    assert max(model._count_tokens(SHORT)) <= 20
    with pytest.raises(UserError, match="and 32 fit"):
        model.tokenize([LONG], truncate=False)
    lengthen(model.module)
    assert model.context_length == 68
    assert torch.equal(model.embed_texts(SHORT), before)
    count = model._count_tokens([LONG])[0]
    assert 32 < count <= 68
    assert model.tokenize([LONG], truncate=False)["input_ids"].shape == (1, count)
    other = LONG.replace("cat", "dog", 5)
    assert not torch.allclose(*(model.embed_texts([text]) for text in (LONG, other)))
    with pytest.raises(UserError, match="and 68 fit"):
        model.embed_texts([LONG * 2], truncate=False)


def test_plain_transformers_load_the_merged_table(model, tmp_path):
    before = model.embed_texts(SHORT)
    lengthen(model.module)
    with torch.no_grad():
        model.module.text_model.embeddings.position_embedding.positional_embedding_res[20:] += 0.1
    saved = write_model(model, tmp_path / "long")
    assert saved.difference == 0
    module, tools = CLIPModel.from_pretrained(saved.path), CLIPProcessor.from_pretrained(saved.path)
    assert module.config.text_config.max_position_embeddings == 68
    assert module.text_model.embeddings.position_ids.shape == (1, 68)
    assert tools.tokenizer.model_max_length == 68
    tokens = tools(text=[*SHORT, LONG], return_tensors="pt", padding=True)
    assert tokens["input_ids"].shape[1] > 32
    with torch.no_grad():
        found = module.text_projection(module.text_model(**tokens).pooler_output)
    torch.testing.assert_close(found[:2], before)
    torch.testing.assert_close(found[2:], model.embed_texts([LONG]))


def test_long_clips_own_layout_has_two_tables_and_comes_back(model, tmp_path):
    lengthen(model.module)
    path = tmp_path / "long.safetensors"
    write_model(model, path, "openai", long=True)
    state = load_file(path)
    assert state["positional_embedding"].shape == state[RES].shape == (68, 128)
    again = load_model(str(path), device="cpu")
    merged = merge_positions(model.module).text_model.embeddings.position_embedding.weight
    assert torch.equal(again.module.text_model.embeddings.position_embedding.weight, merged)
    with pytest.raises(UserError, match="only the openai layout"):
        write_model(model, tmp_path / "x", "huggingface", long=True)


def test_another_number_of_kept_positions_is_remembered(model, tmp_path):
    lengthen(model.module, kept=10, factor=2)
    table = model.module.text_model.embeddings.position_embedding
    with torch.no_grad():
        table.positional_embedding_res += 1
    expected = table.weight.detach().clone()
    assert expected.shape == (54, 128)
    path = tmp_path / "long.safetensors"
    assert write_model(model, path, "openai", long=True).difference == 0
    found = load_model(str(path), device="cpu").module.text_model.embeddings.position_embedding
    assert torch.equal(found.weight, expected)


def test_trained_positions_are_parameters_and_only_they_move(model):
    """In the published code `positional_embedding_res` is in no parameter group and never moves."""
    module = lengthen(model.module).requires_grad_(True).train()
    name = f"text_model.embeddings.position_embedding.{RES}"
    parameters = dict(module.named_parameters())
    assert name in parameters
    table = module.text_model.embeddings.position_embedding
    before, whole = table.positional_embedding_res.detach().clone(), table.weight.detach().clone()
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1)
    tokens = model.tokenize([LONG, SHORT[0]], truncate=False)
    length = int(tokens["attention_mask"].sum(dim=1).max())
    out = module(**tokens, pixel_values=torch.randn(2, 3, 64, 64))
    out.logits_per_text.square().mean().backward()
    gradient = table.positional_embedding_res.grad
    assert not gradient[:20].any()
    assert gradient[20:length].abs().sum(dim=1).gt(0).all()
    assert not gradient[length:].any()
    assert parameters["text_model.embeddings.position_embedding.weight"].grad is None
    optimiser.step()
    assert torch.equal(table.weight[:20], whole[:20])
    assert (table.positional_embedding_res[20:length] != before[20:length]).any(dim=1).all()
    assert torch.equal(table.weight[20:], table.positional_embedding_res[20:])


def test_fine_tuning_has_the_trained_positions_in_a_group_of_their_part(model):
    """In the published code they are in none."""
    lengthen(model.module)
    trained = {each.name: each for each in set_trainable(model, Rates())}
    member = trained[f"text_model.embeddings.position_embedding.{RES}"]
    assert member.part == "positions"
    assert member.parameter.requires_grad
    assert not member.decays


def test_copies_states_and_casts_keep_both_parts(model):
    module = lengthen(model.module)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.text_model.embeddings.position_embedding.positional_embedding_res += 1
    assert not torch.equal(
        module.text_model.embeddings.position_embedding.weight,
        other.text_model.embeddings.position_embedding.weight,
    )
    module.load_state_dict(other.state_dict())
    for one, two in zip(module.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    low = other.to(torch.bfloat16).text_model.embeddings.position_embedding
    assert low.weight.dtype == torch.bfloat16
    assert low.kept_positions == 20


def test_merging_leaves_a_plain_table(model):
    module = lengthen(model.module)
    table = module.text_model.embeddings.position_embedding
    assert is_split(module)
    expected = table.weight.detach().clone()
    assert merge_positions(module) is module
    assert type(table) is nn.Embedding
    assert not is_split(module)
    assert torch.equal(table.weight, expected)
    assert not any(RES in key for key in module.state_dict())
    assert merge_positions(module) is module
    keep_positions(module, 30)
    assert torch.equal(table.weight, expected)
    with pytest.raises(UserError, match="70 of 68 positions cannot be kept"):
        keep_positions(module, 70)


def test_lengthening_twice_gives_a_longer_model(model):
    lengthen(model.module, factor=2)
    lengthen(model.module, factor=2)
    assert model.context_length == 20 + 2 * 24
    assert len(model.module.text_model.embeddings.position_embedding.weight) == 68


def test_models_without_text_of_clips_kind_are_refused(folder):
    with pytest.raises(UserError, match="SiglipModel has no text tower of CLIP's kind"):
        lengthen(load_model(str(folder("siglip")), device="cpu").module)
    with pytest.raises(UserError, match="no text tower of CLIP's kind"):
        lengthen(nn.Linear(2, 2))
