from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from malicious_pickle import Opens
from sparsight.errors import SparsightError, UserError
from sparsight.sae import BatchTopK, Normaliser, SAEConfig, SparseAutoencoder, TopK
from sparsight.sae.config import BiasInit, NormaliserKind
from sparsight.sae.initialisation import geometric_median
from sparsight.sae.remedies.auxk import auxk_loss, default_auxk

D_IN = 16


def _data(n: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    spread = torch.linspace(0.1, 5, D_IN)
    return torch.randn(n, D_IN, generator=generator) * spread + torch.arange(D_IN)


def _sae(kind: NormaliserKind = "scale", **changes: object) -> SparseAutoencoder:
    x = _data().double()
    normaliser = Normaliser.fit(kind, x.mean(0), x.square().mean(0))
    config = SAEConfig(n_latents=64, sparsity=TopK(k=4), normaliser=kind)
    sae = SparseAutoencoder(D_IN, config, normaliser=normaliser, metadata={"site": "here"})
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        sae.b_enc += 0.1 * torch.randn(64, generator=generator)
        sae.b_dec += 0.3 * torch.randn(D_IN, generator=generator)
    return sae


def test_encode_and_decode_follow_the_formula() -> None:
    sae, x = _sae(), _data()
    z = (x - sae.normaliser.mean) / sae.normaliser.scale
    top = ((z - sae.b_dec) @ sae.W_enc.T + sae.b_enc).topk(4)
    dense = torch.zeros(len(x), 64).scatter(1, top.indices, top.values.relu())
    x_hat = (dense @ sae.W_dec + sae.b_dec) * sae.normaliser.scale + sae.normaliser.mean
    out = sae(x)
    torch.testing.assert_close(out.code.dense(), dense)
    torch.testing.assert_close(out.x_hat, x_hat)
    assert (out.code.values > 0).all()


def test_a_selected_latent_with_the_value_0_is_not_active() -> None:
    sae = _sae()
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    code = sae.encode(_data(7))
    assert len(code) == 7 and code.l0.tolist() == [0] * 7
    torch.testing.assert_close(sae.decode(code), sae.normaliser.invert(sae.b_dec.expand(7, -1)))


def test_the_scale_normaliser_gives_squared_norm_d_in_and_standardise_unit_variances() -> None:
    x = _data().double()
    scaled = Normaliser.fit("scale", x.mean(0), x.square().mean(0))(x)
    assert scaled.square().sum(1).mean().item() == pytest.approx(D_IN, rel=1e-5)
    standard = Normaliser.fit("standardise", x.mean(0), x.square().mean(0))(x)
    torch.testing.assert_close(standard.var(0, correction=0), torch.ones(D_IN).double())


def test_a_dimension_that_never_varies_is_left_alone() -> None:
    x = _data().double()
    x[:, 3] = 7.0
    standard = Normaliser.fit("standardise", x.mean(0), x.square().mean(0))(x)
    assert torch.isfinite(standard).all() and standard[:, 3].abs().max() < 1e-4


def test_activations_that_do_not_vary_are_refused() -> None:
    with pytest.raises(SparsightError, match="do not vary"):
        Normaliser.fit("scale", torch.ones(4), torch.ones(4))


@pytest.mark.parametrize("kind", ["scale", "standardise", "none"])
def test_folding_the_normaliser_keeps_code_and_reconstruction(kind: NormaliserKind) -> None:
    sae, x = _sae(kind).double(), _data().double()
    folded = sae.fold()
    assert folded.config.normaliser == "none"
    torch.testing.assert_close(folded.encode(x).dense(), sae.encode(x).dense())
    torch.testing.assert_close(folded(x).x_hat, sae(x).x_hat)


def test_batchtopk_uses_its_threshold_and_keeps_it_when_folded_and_saved(tmp_path: Path) -> None:
    config = SAEConfig(n_latents=64, sparsity=BatchTopK(k=4))
    x = _data()
    sae = SparseAutoencoder(D_IN, config)
    assert sae.encode(x).l0.sum() == 4 * len(x)
    assert sae.encode(x).l0.unique().numel() > 1
    assert sae.threshold is not None
    sae.threshold.fill_(0.7)
    code = sae.eval().encode(x)
    dense = ((sae.normaliser(x) - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    torch.testing.assert_close(code.dense(), torch.where(dense >= 0.7, dense, 0))
    loaded = SparseAutoencoder.from_pretrained(sae.save_pretrained(tmp_path))
    for other in (sae.fold(), loaded, loaded.fold()):
        torch.testing.assert_close(other.encode(x).dense(), code.dense())


def test_the_first_reconstruction_has_the_norm_of_its_input() -> None:
    z = torch.randn(512, D_IN, generator=torch.Generator().manual_seed(5))
    sae = SparseAutoencoder(D_IN, SAEConfig(n_latents=64, sparsity=TopK(k=4)), sample=z)
    ratio = sae(z).x_hat.square().sum() / z.square().sum()
    assert ratio.item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_the_geometric_median_has_no_better_neighbour() -> None:
    x = _data(101)
    median = geometric_median(x)

    def cost(point: torch.Tensor) -> float:
        return float((x.double() - point.double()).norm(dim=1).sum())

    for step in 0.01 * torch.eye(D_IN):
        assert cost(median) <= min(cost(median + step), cost(median - step)) + 1e-6


@pytest.mark.parametrize("start", ["mean", "geometric_median"])
def test_the_decoder_bias_starts_in_the_middle_of_the_sample(start: BiasInit) -> None:
    x = _data()
    config = SAEConfig(n_latents=64, sparsity=TopK(k=4), normaliser="none", b_dec_init=start)
    middle = x.mean(dim=0) if start == "mean" else geometric_median(x)
    torch.testing.assert_close(SparseAutoencoder(D_IN, config, sample=x).b_dec.detach(), middle)


def test_gradients_flow_through_the_public_module() -> None:
    sae, x = _sae().double(), _data().double().requires_grad_()
    sae(x).x_hat.square().sum().backward()
    for parameter in (*sae.parameters(), x):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_auxk_is_zero_without_a_residual_and_one_if_nothing_is_modelled() -> None:
    scores, W_dec = torch.randn(9, 20), torch.randn(20, 4)
    dead = torch.arange(5, 15)
    assert auxk_loss(scores, torch.ones(9, 4), W_dec, dead, 3) == 0
    e = torch.randn(9, 4)
    e -= e.mean(dim=0)
    assert auxk_loss(-scores.abs(), e, W_dec, dead, 3).item() == pytest.approx(1)


@pytest.mark.parametrize(("d_in", "k"), [(768, 512), (1024, 512), (192, 128), (80, 32), (2, 1)])
def test_the_default_number_of_auxiliary_latents_is_a_power_of_two_near_half_the_width(
    d_in: int, k: int
) -> None:
    assert default_auxk(d_in) == k


def test_a_saved_sae_loads_bit_for_bit(tmp_path: Path) -> None:
    sae = _sae("standardise")
    sae.save_pretrained(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert loaded.config == sae.config and loaded.metadata == sae.metadata
    assert all(
        torch.equal(each, loaded.state_dict()[name]) for name, each in sae.state_dict().items()
    )
    assert "blocks" not in (tmp_path / "README.md").read_text()


def test_a_damaged_sae_is_named(tmp_path: Path) -> None:
    _sae().save_pretrained(tmp_path)
    weights = tmp_path / "sae.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(SparsightError, match=r"sae\.safetensors.*damaged"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_tensors_of_another_shape_are_named(tmp_path: Path) -> None:
    _sae().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    tensors["W_dec"] = tensors["W_dec"][:-1].contiguous()
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / "sae.safetensors")
    with pytest.raises(SparsightError, match=r"W_dec is \(63, 16\), expected \(64, 16\); extra"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 9}, "format_version is 9"),
        ({"strange": 1}, "unknown keys \\['strange'\\]"),
        ({"config": {"sparsity": {"kind": "topk", "kk": 3}}}, "sparsity.kk.*Did you mean 'k'"),
        ({"format": "other"}, "not the configuration"),
        ({"metadata": 3}, "metadata is 3; expected an object"),
    ],
)
def test_an_invalid_configuration_is_named(tmp_path: Path, change: dict, message: str) -> None:
    _sae().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_a_folder_without_an_sae_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no SAE"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["sae.pt", "sae.safetensors"])
@pytest.mark.parametrize("with_config", [False, True])
def test_pickles_are_never_opened(name: str, with_config: bool, tmp_path: Path) -> None:
    made = tmp_path / "made"
    if with_config:
        _sae().save_pretrained(tmp_path)
        (tmp_path / "sae.safetensors").unlink()
    torch.save(_sae().state_dict() | {"extra": Opens(made)}, tmp_path / name)
    damaged = name == "sae.safetensors"
    with pytest.raises(SparsightError, match="damaged" if damaged else "holds no SAE") as told:
        SparseAutoencoder.from_pretrained(tmp_path)
    assert "\n" not in str(told.value)
    assert not made.exists()


def test_a_k_above_the_number_of_latents_is_refused() -> None:
    with pytest.raises(UserError, match="only 8 latents"):
        SAEConfig(n_latents=8, sparsity=TopK(k=9))
    with pytest.raises(UserError, match="only 32 latents"):
        SparseAutoencoder(2, SAEConfig(sparsity=TopK(k=33)))


def test_vectors_of_another_width_are_refused() -> None:
    with pytest.raises(UserError, match="width 16"):
        _sae().encode(torch.zeros(3, 17))


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SAEConfig().expansion = 3  # type: ignore[misc]


def test_an_sae_and_a_code_describe_themselves_in_one_line() -> None:
    sae = _sae()
    assert repr(sae) == (
        "SparseAutoencoder(width: 16, latents: 64, sparsity: TopK, k = 4, rectify = True, "
        "normaliser: scale, site: here)"
    )
    assert "<tr><th>latents</th><td>64</td></tr>" in sae._repr_html_()
    assert repr(sae.encode(_data(3))).startswith("SparseCode(3 vectors, ")


def _checksummed(folder: Path) -> tuple[Path, bytes]:
    file = _sae().save_pretrained(folder) / "sae.safetensors"
    return file, file.read_bytes()


def test_a_byte_altered_anywhere_is_detected(tmp_path: Path) -> None:
    file, data = _checksummed(tmp_path)
    header = 8 + int.from_bytes(data[:8], "little")
    for place in (*range(0, header, 7), *range(header, len(data), 211), len(data) - 1):
        for flip in (0x01, 0xFF):
            file.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
            with pytest.raises(SparsightError, match=r"sae\.safetensors"):
                SparseAutoencoder.from_pretrained(tmp_path)
    file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    with pytest.raises(SparsightError, match=r"its checksum differs.*Fetch it again"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_a_file_without_a_checksum_loads(tmp_path: Path) -> None:
    file, _ = _checksummed(tmp_path)
    tensors = load_file(file)
    for about in ({"format": "pt"}, {"format": "pt", "note": "mine"}, None):
        save_file(tensors, file, metadata=about)
        assert SparseAutoencoder.from_pretrained(tmp_path).fingerprint() == _sae().fingerprint()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_sae_of_another_precision_is_the_same_once_loaded(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    sae, x = _sae().to(dtype).requires_grad_(False).eval(), _data()
    sae.save_pretrained(tmp_path)
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert again.fingerprint() == sae.fingerprint()
    assert torch.equal(again(x).x_hat, sae(x).x_hat)
    assert again.W_enc.dtype == torch.promote_types(dtype, torch.float32)


def test_weights_are_saved_with_the_same_bytes_each_time(tmp_path):
    sae = SparseAutoencoder(8, SAEConfig(n_latents=16, sparsity=TopK(k=2)))
    for number in range(8):  # an order drawn at random differs in one of them, almost surely
        sae.save_pretrained(tmp_path / str(number))
    kept = {(tmp_path / str(number) / "sae.safetensors").read_bytes() for number in range(8)}
    assert len(kept) == 1
