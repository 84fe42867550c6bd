"""Scaling takes place, on the neuron axis, in each block separately, and ends afterwards."""

from __future__ import annotations

import pytest
import torch

from finetuning_samples import tiny_clip
from sparsight.errors import UserError
from sparsight.finetuning import NeuronScaling
from sparsight.finetuning.scaling import ScaledNeurons

ROWS = torch.tensor([False, False, True, True, True])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def inside(model, pixels, scaled, factor=100.0, block=1, rows=ROWS):
    """Return a block's neurons in a forward pass with scaling."""
    with scaled.applied(rows, factor):
        return model.read(pixels, f"blocks.{block}.mlp_pre")[f"blocks.{block}.mlp_pre"]


def test_gradients_differ_with_and_without_it(model, pixels):
    scaled = ScaledNeurons(model, NeuronScaling(100.0, blocks=(1,), top=4))
    weight = model.module.vision_model.encoder.layers[1].mlp.fc1.weight
    found = []
    for factor in (1.0, 100.0):
        weight.requires_grad_(True)
        with scaled.applied(ROWS, factor):
            loss = (model.embed_images(pixels) ** 2).sum()
        found.append(torch.autograd.grad(loss, weight)[0])
        weight.requires_grad_(False)
    chosen = scaled.chosen[1]
    change = (found[1] - found[0]).norm(dim=1)
    assert (change[chosen] > 0).all()
    assert found[1][chosen].norm() > 3 * found[0][chosen].norm()


def test_exactly_the_chosen_neurons_of_the_attacked_images_are_scaled(model, pixels):
    """Neither rows of the batch nor all neurons are scaled."""
    scaled = ScaledNeurons(model, NeuronScaling(100.0, blocks=(1,), top=4))
    plain = model.read(pixels, "blocks.1.mlp_pre")["blocks.1.mlp_pre"]
    with_it = inside(model, pixels, scaled)
    changed = (with_it != plain).any(dim=1)
    expected = torch.zeros_like(changed)
    expected[ROWS.nonzero(), scaled.chosen[1]] = True
    assert torch.equal(changed, expected)
    assert torch.equal(
        with_it[expected[:, None].expand_as(plain)], 100 * plain[expected[:, None].expand_as(plain)]
    )


def test_the_scaled_neurons_have_the_largest_mean_over_positions_of_attacked_images(model, pixels):
    scaled = ScaledNeurons(model, NeuronScaling(100.0, blocks=(1,), top=4))
    plain = model.read(pixels, "blocks.1.mlp_pre")["blocks.1.mlp_pre"]
    inside(model, pixels, scaled)
    mean = plain[ROWS].mean(dim=(0, 1))
    assert set(scaled.chosen[1].tolist()) == set(mean.argsort(descending=True)[:4].tolist())


def test_each_block_scales_its_own_neurons(model, pixels):
    """If hooks bound the block's number late, all would act as the last block's."""
    named = {0: [3, 5], 2: [7]}
    scaled = ScaledNeurons(model, NeuronScaling(100.0), neurons=named)
    for block, neurons in named.items():
        only = ScaledNeurons(model, NeuronScaling(100.0), neurons={block: neurons})
        plain = model.read(pixels, f"blocks.{block}.mlp_pre")[f"blocks.{block}.mlp_pre"]
        with_it = inside(model, pixels, only, block=block)
        changed = (with_it != plain).any(dim=1).any(dim=0)
        assert changed.nonzero().flatten().tolist() == neurons
    with scaled.applied(ROWS, 100.0):
        model.embed_images(pixels)
    assert {block: found.tolist() for block, found in scaled.chosen.items()} == named


def test_hooks_are_removed_afterwards(model, pixels):
    scaled = ScaledNeurons(model, NeuronScaling(100.0, blocks=(1,)))
    before = model.embed_images(pixels)
    with scaled.applied(ROWS, 100.0):
        assert not torch.equal(model.embed_images(pixels), before)
    assert torch.equal(model.embed_images(pixels), before)


def test_a_factor_of_one_or_no_attack_changes_nothing(model, pixels):
    scaled = ScaledNeurons(model, NeuronScaling(100.0))
    before = model.embed_images(pixels)
    for rows, factor in ((ROWS, 1.0), (torch.zeros(5, dtype=torch.bool), 100.0)):
        with scaled.applied(rows, factor):
            assert torch.equal(model.embed_images(pixels), before)


def test_the_factor_rises_and_ends_with_its_share_of_the_run():
    settings = NeuronScaling(factor=101.0, until=0.5, warmup=0.2)
    factors = [settings.factor_at(step, 10) for step in range(10)]
    assert factors == [51.0, 101.0, 101.0, 101.0, 101.0, 1, 1, 1, 1, 1]
    assert [NeuronScaling(factor=7, until=1).factor_at(s, 3) for s in range(3)] == [7, 7, 7]


def test_a_block_that_is_named_twice_or_from_the_end_counts_once(model, pixels):
    last = model.n_blocks - 1
    scaled = ScaledNeurons(model, NeuronScaling(factor=3, blocks=(-1, last)))
    assert list(scaled.sites) == [last]
    named = ScaledNeurons(model, NeuronScaling(factor=3), {-1: [2, 5]})
    with named.applied(torch.ones(len(pixels), dtype=torch.bool), 3.0):
        model.embed_images(pixels)
    assert named.chosen[last].tolist() == [2, 5]
    for nothing in ({}, {1: []}):
        with pytest.raises(UserError, match="no neurons to scale"):
            ScaledNeurons(model, NeuronScaling(factor=3), nothing)


def test_an_unknown_block_or_neuron_is_refused(model):
    with pytest.raises(UserError, match=r"no site 'blocks\.5\.mlp_pre'"):
        ScaledNeurons(model, NeuronScaling(2.0, blocks=(5,)))
    with pytest.raises(UserError, match="neurons 0 to 63"):
        ScaledNeurons(model, NeuronScaling(2.0), neurons={0: [64]})
    with pytest.raises(UserError, match="factor"):
        NeuronScaling(factor=-1)
