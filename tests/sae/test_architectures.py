from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from architecture_cases import ARCHITECTURES, WIDTH
from sparsight.errors import UserError
from sparsight.kernels import using
from sparsight.sae import (
    AbsTopK,
    Archetypal,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    Normaliser,
    ReLU,
    SAEConfig,
    SparseAutoencoder,
    TopK,
)
from sparsight.sae.objectives import Plan

D = 24
NORMALISERS = ("scale", "standardise", "none", "layer_norm", "constant_norm")


def _vectors(n: int = 300, seed: int = 0) -> torch.Tensor:
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) * 2 + 1
    x[:, 3] *= 100  # a massive dimension, as residual streams have
    return x


def _fitted(config: SAEConfig, *, seed: int = 1, dtype: torch.dtype = torch.float32):
    """Return an SAE whose parameters all differ from their initial values."""
    x = _vectors().double()
    normaliser = Normaliser.fit(config.normaliser, x.mean(0), x.square().mean(0))
    sample = normaliser(x.float())
    sae = SparseAutoencoder(D, config, normaliser=normaliser, sample=sample, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        if isinstance(config.sparsity, BatchTopK):
            sae.threshold.fill_(0.4)
    sae.constrain()
    return sae.to(dtype).requires_grad_(False).eval()


def _by_hand(sae: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
    """Return the dense code from the formulas, one vector at a time."""
    sparsity, z = sae.config.sparsity, sae.normaliser(x)
    centre = sae.b_dec if sae.config.subtract_b_dec else torch.zeros_like(sae.b_dec)
    rows = []
    for vector in z:
        s = sae.W_enc @ (vector - centre) + sae.b_enc
        f = torch.zeros_like(s)
        if isinstance(sparsity, TopK):
            kept = s.topk(sparsity.k).indices
            f[kept] = s[kept] if not sparsity.rectify else s[kept].relu()
        elif isinstance(sparsity, BatchTopK):
            f = s * (s >= sae.threshold)
        elif isinstance(sparsity, AbsTopK):
            kept = s.abs().topk(sparsity.k).indices
            f[kept] = s[kept]
        elif isinstance(sparsity, GroupMax):
            for group in torch.arange(len(s)).chunk(sparsity.k):
                best = group[s[group].argmax()]
                f[best] = s[best].relu()
        elif isinstance(sparsity, ReLU):
            f = s.relu()
        elif isinstance(sparsity, JumpReLU):
            f = s * (s > sae.threshold)
        elif isinstance(sparsity, Gated):
            magnitude = sae.r_mag.exp() * (s - sae.b_enc) + sae.b_mag
            f = (s > 0) * magnitude.relu()
        elif isinstance(sparsity, MatchingPursuit):
            r = vector - centre
            for _ in range(sparsity.k):
                best = (sae.W_dec @ r).argmax()
                amount = (sae.W_dec[best] @ r).relu()
                f[best] += amount
                r = r - amount * sae.W_dec[best]
        if sae.config.soft_cap is not None:
            f = sae.config.soft_cap * (f / sae.config.soft_cap).tanh()
        rows.append(f)
    return torch.stack(rows)


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_code_and_the_reconstruction_match_the_formulas(name: str, normaliser: str) -> None:
    config = dataclasses.replace(ARCHITECTURES[name], normaliser=normaliser)
    sae = _fitted(config, dtype=torch.float64)
    x = _vectors().double()
    found = sae(x)
    expected = _by_hand(sae, x)
    torch.testing.assert_close(found.code.dense(), expected, rtol=1e-9, atol=1e-9)
    z_hat = expected @ sae.W_dec + sae.b_dec
    frame = sae.normaliser.frame(x)
    by_hand = (
        z_hat * sae.normaliser.scale + sae.normaliser.mean
        if frame is None
        else z_hat * frame.scale + frame.mean
    )
    torch.testing.assert_close(found.x_hat, by_hand, rtol=1e-9, atol=1e-9)
    assert found.code.values.ne(0).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sparse_and_dense_codes_have_the_same_values_and_gradients(name: str) -> None:
    sae = _fitted(ARCHITECTURES[name], dtype=torch.float64).train()
    sae.requires_grad_(True)
    z = sae.normaliser(_vectors(64).double())
    weigh = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sparsity = sae.config.sparsity
    gradients = []
    for quick in (True, False):
        sae.zero_grad()
        weights = sae.weights()
        if quick:
            code = sparsity.encode(weights, z, training=True).dense()
        else:
            code = sparsity.dense(weights, z, training=True).code
        (code * weigh).sum().backward()
        found = {key: each.grad for key, each in sae.named_parameters() if key != "threshold"}
        gradients.append((code.detach(), found))
    (quick_code, quick_found), (dense_code, dense_found) = gradients
    torch.testing.assert_close(quick_code, dense_code, rtol=1e-9, atol=1e-10)
    for key, each in dense_found.items():
        other = quick_found[key]
        zero = torch.zeros_like(sae.get_parameter(key))
        torch.testing.assert_close(
            zero if other is None else other, zero if each is None else each, rtol=1e-8, atol=1e-9
        )


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_comes_back_from_disk_with_the_same_bits(
    name: str, normaliser: str, tmp_path: Path
) -> None:
    sae = _fitted(dataclasses.replace(ARCHITECTURES[name], normaliser=normaliser))
    sae.save_pretrained(tmp_path)
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert again.config == sae.config
    assert again.fingerprint() == sae.fingerprint()
    x = _vectors()
    assert torch.equal(again(x).x_hat, sae(x).x_hat)


@pytest.mark.parametrize("normaliser", ("scale", "standardise", "none"))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folding_a_normaliser_keeps_codes_and_reconstructions(name: str, normaliser: str) -> None:
    sae = _fitted(dataclasses.replace(ARCHITECTURES[name], normaliser=normaliser)).double()
    x = _vectors().double()
    if name == "matching pursuit" and normaliser != "none":
        with pytest.raises(UserError, match="MatchingPursuit"):
            sae.fold()
        return
    folded = sae.fold()
    assert folded.config.normaliser == "none"
    torch.testing.assert_close(folded(x).code.dense(), sae(x).code.dense(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(folded(x).x_hat, sae(x).x_hat, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normaliser", ("layer_norm", "constant_norm"))
def test_a_normaliser_that_measures_each_vector_cannot_be_folded(normaliser: str) -> None:
    sae = _fitted(SAEConfig(WIDTH, normaliser=normaliser))
    with pytest.raises(UserError, match="depends on each vector"):
        sae.fold()


def test_a_code_without_its_frame_is_refused_if_the_normaliser_needs_one() -> None:
    sae = _fitted(SAEConfig(WIDTH, normaliser="layer_norm"))
    code = dataclasses.replace(sae.encode(_vectors(4)), frame=None)
    with pytest.raises(UserError, match="frame"):
        sae.decode(code)


def test_tied_weights_are_one_matrix_and_one_tensor_on_disk(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    sae = _fitted(SAEConfig(WIDTH, sparsity=TopK(8), tied=True))
    assert sae.W_dec is sae.W_enc
    sae.save_pretrained(tmp_path)
    assert "W_dec" not in load_file(tmp_path / "sae.safetensors")
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert again.W_dec is again.W_enc


def test_archetypal_rows_stay_near_the_hull_of_their_anchors() -> None:
    config = SAEConfig(WIDTH, dictionary=Archetypal(n_anchors=16, delta=0.1))
    sae = _fitted(config)
    assert sae.mixture.min() >= 0
    torch.testing.assert_close(sae.mixture.sum(dim=1), torch.ones(WIDTH))
    assert sae.relaxation.norm(dim=1).max() <= 0.1 + 1e-6
    rows = (sae.mixture @ sae.anchors + sae.relaxation) * sae.log_multiplier.exp()
    torch.testing.assert_close(sae.W_dec, rows)


def test_a_transcoder_predicts_its_target_in_the_targets_own_units(tmp_path: Path) -> None:
    config = SAEConfig(WIDTH, subtract_b_dec=False, skip=True, normaliser="standardise")
    x, y = _vectors(), torch.randn(300, 10, generator=torch.Generator().manual_seed(5)) * 7 - 3
    source, target = (
        Normaliser.fit("standardise", each.double().mean(0), each.double().square().mean(0))
        for each in (x, y)
    )
    sae = SparseAutoencoder(D, config, d_out=10, normaliser=source, target_normaliser=target)
    with torch.no_grad():
        sae.W_skip.copy_(torch.randn(10, D, generator=torch.Generator().manual_seed(6)))
    sae.eval()
    z = source(x)
    expected = target.invert(sae.encode(x).dense() @ sae.W_dec + sae.b_dec + z @ sae.W_skip.T)
    torch.testing.assert_close(sae(x).x_hat, expected)
    folded = sae.fold()
    torch.testing.assert_close(folded(x).x_hat, sae(x).x_hat, rtol=1e-4, atol=1e-4)
    sae.save_pretrained(tmp_path)
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(again(x).x_hat, sae(x).x_hat)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subtract_b_dec": True}, "subtract_b_dec"),
        ({"tied": True}, "tied"),
        ({"sparsity": MatchingPursuit(4)}, "MatchingPursuit"),
        ({"dictionary": Archetypal()}, "archetypal"),
    ],
)
def test_parts_that_a_transcoder_cannot_have_are_refused(settings: dict, message: str) -> None:
    config = dataclasses.replace(SAEConfig(WIDTH, subtract_b_dec=False), **settings)
    with pytest.raises(UserError, match=message):
        SparseAutoencoder(D, config, d_out=10)


def test_parts_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="skip"):
        SparseAutoencoder(D, SAEConfig(WIDTH, skip=True))
    with pytest.raises(UserError, match="tied"):
        SAEConfig(WIDTH, tied=True, dictionary=Archetypal())
    with pytest.raises(UserError, match="divide"):
        SAEConfig(WIDTH, sparsity=GroupMax(7))


def test_an_autoencoder_of_the_first_version_of_the_format_still_loads(tmp_path: Path) -> None:
    import json

    sae = _fitted(SAEConfig(WIDTH, sparsity=BatchTopK(4)))
    sae.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    found = json.loads(path.read_text())
    found["format_version"] = 1
    found["config"] = {
        "n_latents": WIDTH,
        "expansion": 16,
        "sparsity": {"kind": "batchtopk", "k": 4},
        "normaliser": "scale",
        "unit_norm_decoder": True,
        "b_dec_init": "zero",
    }
    path.write_text(json.dumps(found))
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(again(_vectors()).x_hat, sae(_vectors()).x_hat)


def test_jumprelu_thresholds_get_the_papers_estimate_of_a_gradient() -> None:
    threshold = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([[0.52, 0.9, 0.47]], dtype=torch.float64, requires_grad=True)
    sae = SparseAutoencoder(2, SAEConfig(3, sparsity=JumpReLU(bandwidth=0.1))).double()
    weights = dataclasses.replace(sae.weights(), extra={"threshold": threshold})
    code = sae.config.sparsity.activate(weights, scores)
    assert code.tolist() == [[0.52, 0.9, 0.0]]
    code.sum().backward()
    # −θ / ε for scores within half a bandwidth of θ, otherwise 0; scores above θ get 1.
    assert threshold.grad.tolist() == pytest.approx([-5.0, 0.0, -5.0])
    assert scores.grad.tolist() == [[1.0, 1.0, 0.0]]


def test_matching_pursuit_reconstructs_a_sum_of_orthogonal_rows_exactly() -> None:
    sae = SparseAutoencoder(4, SAEConfig(4, sparsity=MatchingPursuit(2), normaliser="none"))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(4))
    x = torch.tensor([[0.0, 3.0, 0.0, 2.0]])
    found = sae(x)
    assert found.code.dense().tolist() == x.tolist()
    assert found.x_hat.tolist() == x.tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dense_kernels_give_the_same_code(name: str) -> None:
    sae = _fitted(ARCHITECTURES[name], dtype=torch.float64)
    x = _vectors().double()
    with using("dense"):
        expected = sae.encode(x).dense()
    torch.testing.assert_close(sae.encode(x).dense(), expected, rtol=1e-9, atol=1e-9)


def test_a_gate_learns_from_its_error_while_the_price_has_yet_to_rise() -> None:
    sae = _fitted(SAEConfig(WIDTH, sparsity=Gated(l1=0.5))).requires_grad_(True)
    z, weights = sae.normaliser(_vectors(64)), sae.weights()
    found = sae.config.sparsity.dense(weights, z)
    free, whole = (sae.config.sparsity.penalty(weights, found, z, share) for share in (0.0, 1.0))
    gate = found.scores.relu()
    error = (gate @ sae.W_dec + sae.b_dec - z).square().sum(dim=1).mean()
    torch.testing.assert_close(free, error)
    torch.testing.assert_close(whole, error + 0.5 * gate.sum(dim=1).mean())
    free.backward()
    assert sae.b_enc.grad.abs().max() > 0 and sae.W_dec.grad is None


def test_a_target_that_the_penalty_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match="target_l0 has no effect with penalty_kind 'tanh'"):
        JumpReLU(penalty_kind="tanh", target_l0=8)


@pytest.mark.parametrize(
    "sparsity", [TopK(8), ReLU(), JumpReLU(initial_threshold=0.1), Gated(), AbsTopK(8)]
)
def test_initial_reconstructions_are_as_long_as_their_vectors(sparsity) -> None:
    z = torch.randn(500, D, generator=torch.Generator().manual_seed(2))
    sae = SparseAutoencoder(D, SAEConfig(256, sparsity=sparsity, normaliser="none"), sample=z)
    ratio = sae(z).x_hat.detach().square().sum() / z.square().sum()
    assert float(ratio) == pytest.approx(1, rel=0.1)


def test_the_prefixes_of_a_step_follow_from_seed_and_step_alone() -> None:
    plan = Plan(TopK(8), random_widths=6)
    drawn = {
        (seed, step): tuple(stage.width for stage in plan.at(step, 4096, seed).stages)
        for seed in (0, 1, 2**64 - 1)
        for step in (0, 1, 10**6)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert all(widths[-1] == 4096 and widths[0] >= 1 for widths in drawn.values())
    assert drawn[0, 1] == (1, 4, 6, 7, 102, 4096)  # here as on any other machine


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_empty_batch_has_an_empty_code(name: str, training: bool) -> None:
    sae = _fitted(ARCHITECTURES[name]).train(training)
    found = sae(torch.zeros(0, D))
    assert found.x_hat.shape == (0, D) and found.code.dense().shape == (0, WIDTH)


def test_settings_of_training_can_be_left_out_of_a_description() -> None:
    assert JumpReLU(price=2.0).describe().startswith("JumpReLU, price = 2.0")
    for sparsity in (JumpReLU(), ReLU(), Gated()):
        assert sparsity.describe(training=False) == type(sparsity).__name__
    assert TopK(3).describe(training=False) == "TopK, k = 3, rectify = True"
