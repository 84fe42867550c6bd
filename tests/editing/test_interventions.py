"""Interventions: x + dec(f') - dec(f), at the right places, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from architecture_cases import ARCHITECTURES, WIDTH
from editing_parts import SITE, activations, belonging, bits, make_sae
from sparsight.editing import (
    Clamp,
    DirectionAblation,
    Intervention,
    Keep,
    LatentEdit,
    MeanAblation,
    NeuronEdit,
    Off,
    Scale,
    Set,
    intervene,
    interventions,
    mean_codes,
)
from sparsight.errors import UserError
from sparsight.sae import Normaliser, SAEConfig, SparseAutoencoder, TopK

D = 32
NORMALISERS = ("scale", "standardise", "none", "layer_norm", "constant_norm")
ACTIONS = {
    "off": Off(),
    "set": Set(1.5),
    "set each": Set([0.5, 0.0, -1.0]),
    "scale": Scale(-2.0),
    "clamp": Clamp(high=0.2),
    "wake": Clamp(low=0.3),
    "mean": MeanAblation([0.1, 0.2, 0.3]),
}


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 3 * torch.randn(50, D, generator=generator) + torch.randn(D, generator=generator)


def by_hand(sae: SparseAutoencoder, x: Tensor, chosen: list[int], action: object) -> Tensor:
    """The definition, with dense codes and the SAE's own decoder."""
    sae.eval()
    code = sae.encode(x)
    f = code.dense()
    new = f.clone()
    if isinstance(action, Keep):
        new = torch.zeros_like(f)
        new[:, chosen] = f[:, chosen]
    else:
        new[:, chosen] = action(f[:, chosen])  # type: ignore[operator]
    full = type(code).from_padded(
        new, torch.arange(sae.n_latents).expand_as(new), sae.n_latents, signed=True
    )
    old = type(code).from_padded(
        f, torch.arange(sae.n_latents).expand_as(f), sae.n_latents, signed=True
    )
    full, old = (dataclasses.replace(each, frame=code.frame) for each in (full, old))
    return (x.double() + sae.decode(full).double() - sae.decode(old).double()).float()


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_an_edit_adds_the_difference_of_the_two_decodings(x, normaliser, action):
    sae = make_sae(D, SAEConfig(WIDTH, sparsity=TopK(8), normaliser=normaliser), x=x)
    busy = sae.encode(x).indices.bincount(minlength=WIDTH).argsort(descending=True)
    chosen = [int(busy[0]), int(busy[1]), int(busy[-1])]
    expected = by_hand(sae, x, chosen, action)
    got = Intervention([LatentEdit(sae, chosen, action)])(x)
    assert not torch.equal(got, x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_edited_in_use_without_a_second_selection(x, name):
    sae = make_sae(D, ARCHITECTURES[name], x=x).train()
    if hasattr(sae, "threshold"):
        with torch.no_grad():
            sae.threshold.fill_(0.3)
    chosen = sae.eval().encode(x).indices.unique()[:3].tolist()
    sae.train()
    edit = LatentEdit(sae, chosen, Off())
    got = Intervention([edit])(x)
    assert sae.training
    expected = by_hand(sae, x, chosen, Off())
    assert not torch.equal(got, x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keeping_some_latents_switches_off_all_others(x, name):
    sae = make_sae(D, ARCHITECTURES[name], x=x)
    expected = by_hand(sae, x, [3, 5], Keep())
    torch.testing.assert_close(
        Intervention([LatentEdit(sae, [3, 5], Keep())])(x), expected, rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "edit",
    ["scale", "clamp", "inactive", "none", "keep all", "neurons", "orthogonal"],
)
def test_an_edit_that_changes_nothing_keeps_every_bit(x, dtype, edit):
    sae = make_sae(D, x=x)
    x = x[None, :4].to(dtype)
    x[0, ::3, 5] = -0.0
    never = sorted(set(range(64)) - set(sae.encode(x[0].float()).indices.tolist()))[:3]
    x_zero = x.clone()
    x_zero[..., 7] = -0.0
    axis = torch.zeros(1, D)
    axis[0, 7] = 1.0
    cases = {
        "scale": (LatentEdit(sae, None, Scale(1.0)), x),
        "clamp": (LatentEdit(sae, None, Clamp(0.0, 1e6)), x),
        "inactive": (LatentEdit(sae, never, Off()), x),
        "none": (LatentEdit(sae, [], Set(3.0)), x),
        "keep all": (LatentEdit(sae, None, Keep()), x),
        "neurons": (NeuronEdit(SITE, [5, 7], Clamp(-1e4, 1e4)), x),
        "orthogonal": (DirectionAblation(axis, SITE), x_zero),
    }
    some, given = cases[edit]
    assert torch.equal(bits(Intervention([some])(given)), bits(given))


def test_vectors_that_an_edit_does_not_touch_keep_their_bits_among_those_that_it_does(x):
    sae = make_sae(D, x=x)
    code = sae.encode(x)
    latent = int(code.indices[0])
    x = x.half()
    code = sae.encode(x.float())
    active = torch.zeros(len(x), dtype=torch.bool)
    active[code.rows[code.indices == latent]] = True
    assert 0 < active.sum() < len(x)
    got = Intervention([LatentEdit(sae, [latent], Off())])(x)
    assert torch.equal(bits(got[~active]), bits(x[~active]))
    assert (got[active] != x[active]).any(dim=1).all()


def test_half_precision_is_edited_in_float32_and_cast_once(x):
    sae = make_sae(D, x=x)
    x = x.half()
    edit = Intervention([LatentEdit(sae, None, Scale(1.37))])
    assert torch.equal(edit(x), edit(x.float()).half())


@torch.no_grad()
def test_a_model_is_edited_only_at_the_chosen_positions(clip, pixels):
    sae = make_sae(D, x=activations(clip, pixels), metadata=belonging(clip))
    before = clip.read(pixels, [SITE])[SITE]
    for tokens, where in {
        "cls": slice(0, 1),
        "patches": slice(1, None),
        "all": slice(None),
    }.items():
        with intervene(clip, LatentEdit(sae, None, Scale(0.5), tokens=tokens)):
            after = clip.read(pixels, [SITE])[SITE]
            embedded = clip.embed_images(pixels)
        expected = before.clone()
        some = before[:, where].flatten(0, 1)
        expected[:, where] = by_hand(sae, some, list(range(64)), Scale(0.5)).view_as(
            before[:, where]
        )
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
        rest = torch.ones(before.shape[1], dtype=torch.bool)
        rest[where] = False
        assert torch.equal(after[:, rest], before[:, rest])
        assert not torch.equal(embedded, clip.embed_images(pixels))
    assert torch.equal(clip.read(pixels, [SITE])[SITE], before)


@torch.no_grad()
def test_patches_of_a_model_with_registers_start_after_them(tiny, pixels):
    model = tiny("dinov2_with_registers")
    sae = make_sae(D, x=activations(model, pixels))
    before = model.read(pixels, [SITE])[SITE]
    with intervene(model, LatentEdit(sae, None, Off(), site=SITE, tokens="patches")):
        after = model.read(pixels, [SITE])[SITE]
    same = (before == after).all(dim=-1).all(dim=0)
    assert same.tolist() == [True] * 4 + [False] * 16


@torch.no_grad()
def test_tokens_are_by_default_those_that_the_sae_was_trained_on(clip, pixels):
    x = activations(clip, pixels)
    for tokens in ("cls", "patches", "all"):
        edit = LatentEdit(make_sae(D, x=x, metadata=belonging(clip, tokens=tokens)), [0], Off())
        assert (edit.tokens, edit.site) == (tokens, SITE)
    assert LatentEdit(make_sae(D), [0], Off(), site=SITE).tokens == "all"


@torch.no_grad()
def test_several_saes_of_one_site_read_the_same_vector_and_their_changes_add_up(clip, pixels):
    x = activations(clip, pixels)
    first, second = (make_sae(D, x=x, seed=seed, metadata=belonging(clip)) for seed in (0, 1))
    edits = [LatentEdit(first, None, Off()), LatentEdit(second, None, Scale(2.0))]
    found = []
    for order in (edits, edits[::-1]):
        with intervene(clip, order):
            found.append(clip.read(pixels, [SITE])[SITE].flatten(0, 1))
    torch.testing.assert_close(found[0], found[1])
    changes = [by_hand(first, x, list(range(64)), Off()) - x]
    changes.append(by_hand(second, x, list(range(64)), Scale(2.0)) - x)
    torch.testing.assert_close(found[0], x + sum(changes), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_nested_intervention_sees_the_result_of_the_outer_one(clip, pixels):
    x = activations(clip, pixels)
    sae = make_sae(D, x=x, metadata=belonging(clip))
    outer, inner = LatentEdit(sae, None, Scale(2.0)), LatentEdit(sae, None, Off())
    with intervene(clip, outer), intervene(clip, inner):
        both = clip.read(pixels, [SITE])[SITE].flatten(0, 1)
    expected = Intervention([inner])(Intervention([outer])(x))
    torch.testing.assert_close(both, expected)


@torch.no_grad()
def test_several_sites_are_edited_in_one_pass(clip, pixels):
    sites = ("blocks.0.resid_post", "embedding")
    saes = [
        make_sae(clip.d_in(site), x=activations(clip, pixels, site), metadata=belonging(clip, site))
        for site in sites
    ]
    edits = [LatentEdit(sae, None, Off()) for sae in saes]
    with intervene(clip, edits):
        both = clip.embed_images(pixels)
    with intervene(clip, edits[0]):
        one = clip.embed_images(pixels)
    expected = Intervention([edits[1]], per_image=True)(one)
    torch.testing.assert_close(both, expected)


@torch.no_grad()
def test_nothing_is_left_along_ablated_directions_whatever_other_edits_write(clip, pixels):
    x = activations(clip, pixels)
    sae = make_sae(D, x=x, metadata=belonging(clip))
    ablation = DirectionAblation.of_latents(sae, [1, 2, 3])
    for order in ([ablation, LatentEdit(sae, [1, 9], Set(5.0))],) * 2:
        with intervene(clip, order):
            got = clip.read(pixels, [SITE])[SITE].flatten(0, 1)
        assert (got @ sae.W_dec[[1, 2, 3]].T).abs().max() < 1e-4
        assert (x @ sae.W_dec[[1, 2, 3]].T).abs().max() > 0.1


def test_dependent_directions_are_projected_out_whole(x):
    a, b, c = torch.eye(D)[:3]
    rows = torch.stack([a, 2 * a, a + b, 1e3 * b, c + a])
    edit = DirectionAblation(rows, SITE)
    assert edit.basis().shape == (3, D)
    got = Intervention([edit])(x)
    torch.testing.assert_close(got[:, 3:], x[:, 3:])
    assert got[:, :3].abs().max() < 1e-5


def test_the_mean_remains_along_the_directions(x):
    mean = x.mean(dim=0)
    rows = torch.randn(4, D, generator=torch.Generator().manual_seed(0))
    got = Intervention([DirectionAblation(rows, SITE, mean=mean)])(x)
    torch.testing.assert_close(
        got @ rows.T, (mean @ rows.T).expand(len(x), -1), rtol=1e-4, atol=1e-4
    )


def test_directions_of_latents_are_in_the_units_of_the_model(x):
    sae = make_sae(D, SAEConfig(64, sparsity=TopK(8), normaliser="standardise"), x=x)
    edit = DirectionAblation.of_latents(sae, [4], site=SITE)
    off = Intervention([LatentEdit(sae, [4], Set(100.0), site=SITE)])(x) - x
    torch.testing.assert_close(
        torch.nn.functional.normalize(off, dim=1).abs(),
        edit.basis().float().abs().expand(len(x), -1),
        rtol=1e-4,
        atol=1e-4,
    )


def test_neurons_take_the_same_actions(x):
    x = x[None]
    got = Intervention([NeuronEdit(SITE, [3, 4], Set([7.0, -1.0]))])(x)
    assert (got[..., 3] == 7).all() and (got[..., 4] == -1).all()
    others = [i for i in range(D) if i not in (3, 4)]
    assert torch.equal(got[..., others], x[..., others])
    kept = Intervention([NeuronEdit(SITE, [3], Keep(), tokens="cls")], n_prefix=1)(x)
    assert torch.equal(kept[:, 1:], x[:, 1:])
    assert torch.equal(kept[:, 0, 3], x[:, 0, 3]) and kept[:, 0].count_nonzero() == 1


def test_gradients_go_through_the_edit_to_its_input_and_not_to_the_sae(x):
    torch.manual_seed(0)
    x = x[:3].double()
    sae = make_sae(D, SAEConfig(16, sparsity=TopK(4), normaliser="layer_norm"), x=x).double()
    chosen = sae.encode(x).indices.unique()[:2].tolist()
    for action in (Off(), Set(0.7), Scale(3.0), Clamp(low=0.4)):
        edit = Intervention([LatentEdit(sae, chosen, action)])
        assert torch.autograd.gradcheck(edit, x.clone().requires_grad_())
    edit(x.clone().requires_grad_()).sum().backward()
    assert all(parameter.grad is None for parameter in sae.parameters())


def test_gradients_reach_pixels_and_weights_of_the_model(clip, pixels):
    sae = make_sae(D, x=activations(clip, pixels), metadata=belonging(clip))
    weight = clip.module.vision_model.encoder.layers[0].mlp.fc1.weight
    pixels = pixels.requires_grad_()
    weight.requires_grad_()
    try:
        with intervene(clip, LatentEdit(sae, None, Scale(0.5))):
            clip.embed_images(pixels).square().sum().backward()
        edited = weight.grad.clone()
        assert pixels.grad.abs().sum() > 0
        weight.grad = None
        clip.embed_images(pixels).square().sum().backward()
        assert not torch.allclose(edited, weight.grad)
        assert sae.W_dec.grad is None
    finally:
        weight.requires_grad_(False)
        weight.grad = None


@pytest.mark.parametrize("name", ["topk", "capped topk", "batch topk", "gated", "jumprelu"])
@pytest.mark.parametrize("normaliser", ["scale", "layer_norm"])
def test_an_intervention_is_exported_without_sparsight(x, name, normaliser):
    config = dataclasses.replace(ARCHITECTURES[name], normaliser=normaliser)
    sae = make_sae(D, config, x=x)
    x = x.view(5, 10, D)
    edit = Intervention(
        [
            LatentEdit(sae, [1, 2], Set(0.8), tokens="patches"),
            LatentEdit(sae, [5, 6, 7, 8], Off(), tokens="cls"),
            NeuronEdit(SITE, [2], Off()),
            DirectionAblation(torch.eye(D)[:2], SITE),
        ]
    )
    program = torch.export.export(edit, (x,))
    torch.testing.assert_close(program.module()(x), edit(x), rtol=1e-5, atol=1e-5)


def test_mean_codes_are_those_of_all_vectors(clip, pixels):
    from evaluation_parts import TensorActivations

    x = clip.read(pixels, [SITE])[SITE]
    sae = make_sae(D, x=x.flatten(0, 1))
    means = mean_codes(sae, TensorActivations(x, site=SITE))
    torch.testing.assert_close(means, sae.encode(x.flatten(0, 1)).dense().mean(dim=0))
    got = Intervention([LatentEdit(sae, [3, 8], MeanAblation(means))])(x)
    expected = by_hand(sae, x.flatten(0, 1), [3, 8], Set(means[[3, 8]]))
    torch.testing.assert_close(got.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)


def test_an_sae_of_another_model_is_refused_by_name_unless_check_is_off(tiny, clip, pixels):
    other = tiny("vit")
    metadata = belonging(other)
    sae = make_sae(D, metadata=metadata)
    edit = LatentEdit(sae, [0], Off())
    with pytest.raises(UserError, match=r"trained on .*vit.* this model is .*clip"):
        interventions(clip, edit)
    assert list(interventions(clip, edit, check=False)) == [SITE]


def test_an_sae_of_another_site_or_width_is_refused(clip):
    sae = make_sae(D, metadata=belonging(clip, "blocks.0.resid_post"))
    with pytest.raises(UserError, match=r"trained at blocks.0.resid_post .* edit is at blocks.1"):
        interventions(clip, LatentEdit(sae, [0], Off(), site="blocks.1.resid_post"))
    assert interventions(clip, LatentEdit(sae, [0], Off(), site="blocks.-3.resid_post"))
    with pytest.raises(UserError, match=r"width 24 .* blocks.1.resid_post of .* has 32"):
        interventions(clip, LatentEdit(make_sae(24), [0], Off(), site=SITE), check=False)


def test_an_unknown_site_is_answered_with_the_known_ones(clip):
    sae = make_sae(D)
    with pytest.raises(UserError, match=r"no site 'blocks.9.resid_post'.*Its sites"):
        interventions(clip, LatentEdit(sae, [0], Off(), site="blocks.9.resid_post"))
    with pytest.raises(UserError, match="does not say at which site"):
        interventions(clip, LatentEdit(sae, [0], Off()))
    with pytest.raises(UserError, match="no patches"):
        interventions(clip, NeuronEdit("embedding", [0], Off(), tokens="patches"))
    with pytest.raises(UserError, match=r"no neuron 32; it has 0 to 31"):
        interventions(clip, NeuronEdit(SITE, [32], Off()))


def test_an_edit_that_makes_no_sense_is_refused_when_it_is_made(clip):
    sae = make_sae(D, metadata={"site": SITE})
    for wrong, message in (
        (lambda: LatentEdit(sae, [64], Off()), "no latent 64; it has 0 to 63"),
        (lambda: LatentEdit(sae, [3, 3], Off()), "3 is given twice"),
        (lambda: Set(float("nan")), "NaN"),
        (lambda: MeanAblation([float("inf")]), "infinity"),
        (lambda: Clamp(2.0, 1.0), r"low \(2.0\) must not be above"),
        (lambda: Clamp(), "give low, high"),
        (lambda: LatentEdit(sae, [1, 2], Set([1.0, 2.0, 3.0])), "one for each of the 2 chosen"),
        (lambda: DirectionAblation(torch.zeros(2, D), SITE).basis(), "0 everywhere"),
        (
            lambda: LatentEdit(
                SparseAutoencoder(D, SAEConfig(8, sparsity=TopK(2), subtract_b_dec=False), d_out=D),
                [0],
                Off(),
            ),
            "transcoder",
        ),
        (lambda: LatentEdit(make_sae(D, metadata={"tokens": "mean"}), [0], Off()), "mean over"),
        (
            lambda: Intervention(
                [LatentEdit(sae, [1, 2], Off()), LatentEdit(sae, [2, 3], Off(), tokens="cls")]
            ),
            "change the same latents of one SAE: 2",
        ),
    ):
        with pytest.raises(UserError, match=message):
            wrong()
    apart = [LatentEdit(sae, [1], Off(), tokens=tokens) for tokens in ("cls", "patches")]
    Intervention(apart)


def test_the_sae_may_train_on_while_its_view_is_in_use(x):
    sae = make_sae(D, x=x)
    edit = Intervention([LatentEdit(sae, None, Off())])
    before = edit(x)
    with torch.no_grad():
        sae.W_dec.mul_(2)
    assert not torch.equal(edit(x), before)
    assert isinstance(sae.normaliser, Normaliser) and sae.W_dec.requires_grad
