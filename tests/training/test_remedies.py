"""Remedies for dead latents follow their formulas."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from test_learning import mixtures

from memory_activations import sparse_mixtures
from sparsight.errors import UserError
from sparsight.kernels import dense_step
from sparsight.sae import (
    Archetypal,
    AuxK,
    BatchTopK,
    Gated,
    GhostGradients,
    JumpReLU,
    ReLU,
    Resampling,
    SAEConfig,
    SparseAutoencoder,
    TopK,
)
from sparsight.sae.objectives import Plan, Stage, dense_loss, whole_batch
from sparsight.sae.remedies.resampling import resample
from sparsight.training import TrainConfig, train

D_IN, N = 32, 40
DEAD = torch.tensor([3, 7, 8, 21, 39])


def _sae(sae: SAEConfig | None = None) -> SparseAutoencoder:
    made = SparseAutoencoder(D_IN, sae or SAEConfig(N, sparsity=TopK(4)), seed=2)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made.double()


def _vectors(n: int = 64) -> torch.Tensor:
    x, _ = mixtures(n, 5)
    return (x - x.mean(dim=0)).double() / 3


def test_the_gradient_of_ghosts_matches_the_formula() -> None:
    """Compute by hand, per vector: half the residual's norm, and the reconstruction's loss."""
    sae, z, variance = _sae(), _vectors(), 7.0
    weights = sae.weights()
    plans = [Plan(TopK(4), remedy=remedy) for remedy in (GhostGradients(), None)]
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    parameters = [sae.get_parameter(name) for name in names]
    with_ghosts, without = (dense_loss(weights, z, plan, variance, DEAD) for plan in plans)
    assert with_ghosts.loss.item() == pytest.approx(2 * without.loss.item())
    found = [
        one - other
        for one, other in zip(
            torch.autograd.grad(with_ghosts.loss, parameters, retain_graph=True),
            torch.autograd.grad(without.loss, parameters, retain_graph=True),
            strict=True,
        )
    ]
    e = (z - sae.decode(sae.encode(z))).detach()
    errors = []
    for row, residual in zip(z, e, strict=True):
        g = sum(
            (sae.W_enc[i] @ (row - sae.b_dec) + sae.b_enc[i]).exp() * sae.W_dec[i] for i in DEAD
        )
        scale = (residual.norm() / (2 * g.norm())).detach()
        errors.append((scale * g - residual).square().sum())
    error = torch.stack(errors).sum()
    loss = error * (e.square().sum() / error).detach() / (len(z) * variance)
    expected = torch.autograd.grad(loss, parameters)
    for name, mine, other in zip(names, found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12, msg=name)
    living = torch.ones(N, dtype=torch.bool)
    living[DEAD] = False
    assert found[0][living].abs().max() < 1e-12 and found[2][living].abs().max() < 1e-12


@pytest.mark.parametrize(
    "sparsity", [TopK(4), ReLU(), JumpReLU(0.04), Gated()], ids=lambda each: type(each).__name__
)
def test_resampled_latents_get_directions_of_vectors_and_are_reset(sparsity) -> None:
    sae, z = _sae(SAEConfig(N, sparsity=sparsity)), _vectors()
    moments = {
        name: (torch.ones_like(each), torch.full_like(each, 2.0))
        for name, each in sae.named_parameters()
    }
    before = {name: each.detach().clone() for name, each in sae.named_parameters()}
    renewed = resample(sae, z, z, DEAD, moments, scale=0.2, seed=(0, 1))
    assert renewed.tolist() == DEAD.tolist()
    living = torch.ones(N, dtype=torch.bool)
    living[DEAD] = False
    inward = torch.nn.functional.normalize(z - before["b_dec"], dim=1)
    cosines = sae.W_dec[DEAD] @ inward.T
    torch.testing.assert_close(cosines.amax(dim=1), torch.ones(len(DEAD)).double())
    assert len(set(cosines.argmax(dim=1).tolist())) == len(DEAD)  # each vector once
    norm = 0.2 * before["W_enc"][living].norm(dim=1).mean()
    torch.testing.assert_close(sae.W_enc[DEAD], norm * sae.W_dec[DEAD])
    assert not sae.b_enc[DEAD].any()
    for name, start in sparsity.start(N).items():
        torch.testing.assert_close(sae.get_parameter(name)[DEAD], start.double()[DEAD])
    for name, parameter in sae.named_parameters():
        first, second = moments[name]
        if name == "b_dec":
            assert torch.equal(parameter, before[name]) and first.all() and second.all()
            continue
        assert torch.equal(parameter[living], before[name][living])
        assert not first[DEAD].any() and not second[DEAD].any()
        assert first[living].all() and second[living].all()


def test_resampled_rows_of_an_archetypal_dictionary_are_anchors() -> None:
    config = SAEConfig(N, sparsity=TopK(4), dictionary=Archetypal(n_anchors=6))
    sae, z = _sae(config), _vectors()
    sae.constrain()
    before = sae.mixture.detach().clone()
    moments = {
        name: (torch.ones_like(each), torch.ones_like(each))
        for name, each in sae.named_parameters()
    }
    resample(sae, z, z, DEAD, moments, scale=0.2, seed=(0, 1))
    living = torch.ones(N, dtype=torch.bool)
    living[DEAD] = False
    assert torch.equal(sae.mixture[DEAD].amax(dim=1), torch.ones(len(DEAD)).double())
    assert not sae.relaxation[DEAD].any()
    torch.testing.assert_close(sae.mixture[living], before[living])
    rows = (sae.mixture @ sae.anchors + sae.relaxation) * sae.log_multiplier.exp()
    torch.testing.assert_close(sae.W_dec, rows)
    for name in ("mixture", "relaxation"):
        assert not any(moment[DEAD].any() for moment in moments[name])


@pytest.mark.parametrize("k", [4, 64])
@pytest.mark.parametrize("batch_topk", [True, False])
@pytest.mark.parametrize("dead", [DEAD, torch.tensor([], dtype=torch.int64)])
@pytest.mark.parametrize("remedy", [AuxK(alpha=0.5, k=3), GhostGradients()], ids=["auxk", "ghost"])
def test_a_batch_in_parts_has_the_same_loss_and_gradients_as_the_whole(
    remedy, batch_topk, k, dead
) -> None:
    """Scores below 0 are not activations: with a large k, BatchTopK has fewer active latents."""
    kind = BatchTopK(min(k, N)) if batch_topk else TopK(min(k, N))
    sae, z = _sae(SAEConfig(N, sparsity=kind)), _vectors(60)
    stages = (Stage(0.5, width=16), Stage(0.5, width=N))
    plan = Plan(kind, stages, main=1, remedy=remedy)
    parameters = [sae.get_parameter(name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
    whole = dense_loss(sae.weights(), z, plan, 7.0, dead)
    parts = [(part, part) for part in z.split(17)]
    seen = whole_batch(sae.weights(), parts, plan, 7.0, dead)
    found = [dense_loss(sae.weights(), part, plan, 7.0, dead, whole=seen) for part, _ in parts]
    shares = [len(part) / len(z) for part, _ in parts]
    loss = sum(share * each.loss for share, each in zip(shares, found, strict=True))
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(
        sum(s * each.aux_loss for s, each in zip(shares, found, strict=True)), whole.aux_loss
    )
    torch.testing.assert_close(torch.cat([each.code for each in found]), whole.code)
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(whole.loss, parameters)
    )


@pytest.mark.parametrize("remedy", ["auxk", "ghost"])
def test_training_on_large_batches_in_parts_gives_the_same_result(
    remedy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remedies = {
        "auxk": {"remedy": AuxK(dead_after=200), "sae": SAEConfig(64, sparsity=BatchTopK(4))},
        "ghost": {"remedy": GhostGradients(200), "sae": SAEConfig(256, sparsity=TopK(2))},
    }
    shape = {"n_vectors": 64 * 40, "batch_size": 64, "lr": 3e-3, "kernels": "dense"}
    config = TrainConfig(**shape, **remedies[remedy])
    fvus = []
    for name, entries in (("whole", 2**27), ("parts", 64 * 40)):
        monkeypatch.setattr(dense_step, "DENSE_ENTRIES", entries)
        run = train(sparse_mixtures(), config, out=tmp_path / name, quiet=True)
        last = run.metrics()[-1]
        assert last["aux_loss"] > 0
        fvus.append([last["fvu"], last["aux_loss"], last["l0"]])
    assert fvus[1] == pytest.approx(fvus[0], rel=1e-3)


def test_resampling_with_tied_weights_and_a_biased_transcoder_are_refused() -> None:
    with pytest.raises(UserError, match="tied"):
        TrainConfig(sae=SAEConfig(N, tied=True), remedy=Resampling())
    with pytest.raises(UserError, match="b_dec_init"):
        TrainConfig(sae=SAEConfig(N, subtract_b_dec=False, b_dec_init="mean"), target_site="there")


def test_vectors_are_drawn_by_the_square_of_their_loss() -> None:
    z = _vectors(256)
    sae = _sae()
    x_hat = sae.decode(sae.encode(z))
    loss = (z - x_hat).square().sum(dim=1)
    expected = loss.square() / loss.square().sum()
    drawn = torch.zeros(len(z)).double()
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    inward = torch.nn.functional.normalize(z - sae.b_dec.detach(), dim=1)
    state = {name: each.clone() for name, each in sae.state_dict().items()}
    for number in range(500):
        sae.load_state_dict(state)
        resample(sae, z, z, DEAD[:1], moments, scale=0.2, seed=(0, number))
        drawn[(inward @ sae.W_dec[DEAD[0]]).argmax()] += 1 / 500
    above = expected > expected.median()
    assert drawn[above].sum().item() == pytest.approx(expected[above].sum().item(), abs=0.06)
    assert (drawn * loss).sum().item() == pytest.approx((expected * loss).sum().item(), rel=0.15)


def test_the_same_seed_resamples_the_same_way_and_another_one_differently() -> None:
    rows = []
    for seed in ((0, 5), (0, 5), (1, 5), (0, 6)):
        sae, z = _sae(), _vectors()
        resample(sae, z, z, DEAD, {}, scale=0.2, seed=seed)
        rows.append(sae.W_dec[DEAD])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[3])


PRICED = TrainConfig(
    SAEConfig(128, sparsity=ReLU(6.0)), n_vectors=32 * 600, batch_size=32, lr=1e-2, remedy=None
)


def _share_of_dead(config: TrainConfig, out: Path) -> float:
    data = sparse_mixtures(n_images=256)
    code = train(data, config, out, quiet=True).sae().encode(data.activations["here"].flatten(0, 1))
    return 1 - len(code.indices.unique()) / 128


@pytest.fixture(scope="module")
def dead_without_remedy(tmp_path_factory: pytest.TempPathFactory) -> float:
    return _share_of_dead(PRICED, tmp_path_factory.mktemp("without") / "run")


@pytest.mark.parametrize(
    "remedy",
    [
        {"remedy": GhostGradients(dead_after=640)},
        {"remedy": Resampling(every=3200, dead_after=640)},
        {"sae": SAEConfig(128, sparsity=ReLU(6.0), decoder_init="data")},
    ],
    ids=["ghosts", "resampling", "rows from data"],
)
def test_remedies_leave_fewer_dead_latents_under_a_penalty(
    remedy: dict, tmp_path: Path, dead_without_remedy: float
) -> None:
    dead = _share_of_dead(dataclasses.replace(PRICED, **remedy), tmp_path / "with")
    assert dead_without_remedy > 0.3
    assert dead < 0.8 * dead_without_remedy
