"""What is written for saev, ViT-Prisma and CLIP-Scope is read by them, and by us, as it was."""

from __future__ import annotations

import json

import pytest
import torch

from foreign_files import CASES, D, N, numbers, parts, peer
from sparsight.compat.clipscope import TopKSAE
from sparsight.errors import UserError
from sparsight.formats import find, read
from sparsight.sae import (
    AbsTopK,
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    SAEConfig,
    SparseAutoencoder,
    TopK,
)
from sparsight.sae.normaliser import Normaliser


def sae(sparsity, normaliser="scale", **settings) -> SparseAutoencoder:
    """An SAE with weights as after training, all parts of it at work."""
    settings = {"unit_norm_decoder": False, **settings}
    config = SAEConfig(n_latents=N, sparsity=sparsity, normaliser=normaliser, **settings)
    d_out = D if settings.get("skip") else None
    made = SparseAutoencoder(D, config, d_out=d_out)
    if normaliser in ("scale", "standardise"):
        scale = numbers(D if normaliser == "standardise" else 1, seed=30).abs() + 2
        made.normaliser = Normaliser(numbers(D, seed=31), scale, normaliser)
    W_enc, b_enc, W_dec, b_dec = parts()
    with torch.no_grad():
        for name, each in (("W_enc", W_enc.T), ("b_enc", b_enc), ("b_dec", b_dec)):
            getattr(made, name).copy_(each)
        if not config.tied:
            made.W_dec.copy_(W_dec)
        for seed, (name, each) in enumerate(made.weights().extra.items()):
            new = numbers(*each.shape, seed=40 + seed) / 4
            each.copy_(new.abs() if name == "threshold" else new)
        if config.skip:
            made.W_skip.copy_(numbers(D, D, seed=50))
    return made.eval()


@torch.no_grad()
def same_function(a: SparseAutoencoder, b: SparseAutoencoder) -> None:
    x = numbers(64, D, seed=60) * 3
    x[:, 2] *= 100
    ours, theirs = a(x), b(x)
    codes = ours.code.dense(), theirs.code.dense()
    for one, two in (codes, (ours.x_hat, theirs.x_hat)):
        scale = one.abs().max()
        torch.testing.assert_close(one / scale, two / scale, rtol=2e-5, atol=3e-6)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(
    ("name", "sparsity", "normaliser"),
    [
        ("saev", ReLU(), "standardise"),
        ("saev", TopK(k=4, rectify=False), "scale"),
        ("saev", BatchTopK(k=4), "scale"),
        ("prisma", ReLU(), "none"),
        ("prisma", ReLU(), "standardise"),
        ("prisma", TopK(k=4), "layer_norm"),
        ("prisma", ReLU(), "constant_norm"),
        ("prisma", Gated(), "scale"),
    ],
)
def test_an_sae_written_and_read_again_is_the_same_function(
    name, sparsity, normaliser, subtract, tmp_path
):
    made = sae(sparsity, normaliser, subtract_b_dec=subtract)
    assert find(name).save(made, tmp_path) == tmp_path
    again = read(tmp_path)
    assert again.format == name and again.unknown == ()
    same_function(made, again.build())


@pytest.mark.parametrize("skip", [True, False])
def test_a_transcoder_goes_through_prismas_format(skip, tmp_path):
    made = sae(ReLU(), "none", subtract_b_dec=False, skip=True)
    if not skip:
        made = sae(ReLU(), "scale", subtract_b_dec=False, skip=True).fold()
    find("prisma").save(made, tmp_path)
    same_function(made, read(tmp_path).build())


@pytest.mark.parametrize("normaliser", ["layer_norm", "constant_norm"])
def test_a_transcoder_in_the_units_of_each_input_goes_through_prismas_format(normaliser, tmp_path):
    config = SAEConfig(N, sparsity=TopK(k=4), normaliser=normaliser, subtract_b_dec=False)
    made = SparseAutoencoder(D, config, d_out=D)
    find("prisma").save(made, tmp_path)
    same_function(made, read(tmp_path).build())
    with pytest.raises(UserError, match="skip connections read the input before"):
        skipping = sae(ReLU(), normaliser, subtract_b_dec=False, skip=True)
        find("prisma").save(skipping, tmp_path / "other")
    with pytest.raises(UserError, match="no normaliser"):
        find("saelens").save(made, tmp_path / "other")


def test_tied_weights_are_written_as_two_matrices(tmp_path):
    made = sae(ReLU(), "none", tied=True)
    find("prisma").save(made, tmp_path)
    assert {"W_enc", "W_dec"} <= set(torch.load(tmp_path / "weights.pt", weights_only=True))
    same_function(made, read(tmp_path).build())


@pytest.mark.parametrize("normaliser", ["none", "scale", "standardise"])
def test_clipscopes_format_holds_what_has_no_bias_of_latents(normaliser, tmp_path):
    made = sae(TopK(k=4, rectify=False), normaliser)
    with pytest.raises(UserError, match="b_enc must be 0"):
        find("clipscope").save(made, tmp_path)
    with torch.no_grad():
        made.b_enc.zero_()
    find("clipscope").save(made, tmp_path)
    same_function(made, read(tmp_path).build())


def test_where_an_sae_belongs_goes_along_into_prismas_format(tmp_path):
    made = sae(ReLU(), "none")
    made.metadata = {"model": {"id": "open_clip:hf-hub:laion/x"}, "tokens": "patches"}
    made.metadata["site"] = "blocks.4.mlp_out"
    find("prisma").save(made, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_name"] == "open-clip:laion/x"
    assert (config["hook_point_layer"], config["layer_subtype"]) == (4, "hook_mlp_out")
    metadata = read(tmp_path).build().metadata
    assert {key: metadata[key] for key in made.metadata} == made.metadata


@pytest.mark.parametrize(
    ("name", "made", "message"),
    [
        ("saev", lambda: sae(JumpReLU()), "not JumpReLU"),
        ("saev", lambda: sae(TopK(k=4)), "keeps negative values among the 4 largest"),
        ("clipscope", lambda: sae(TopK(k=4)), "keeps negative values"),
        ("saev", lambda: sae(ReLU(), "layer_norm"), "layer_norm"),
        ("prisma", lambda: sae(AbsTopK(k=3)), "AbsTopK"),
        ("prisma", lambda: sae(TopK(k=3, rectify=False)), "rectify"),
        ("clipscope", lambda: sae(ReLU()), "holds TopK, not ReLU"),
        ("clipscope", lambda: sae(TopK(k=3, rectify=False), soft_cap=2.0), "soft cap"),
        ("openai", lambda: sae(ReLU()), "does not write it"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(name, made, message, tmp_path):
    with pytest.raises(UserError, match=message):
        find(name).save(made(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def vectors(massive: bool) -> torch.Tensor:
    x = numbers(64, D, seed=70)
    x[:, :2] *= 100 if massive else 1
    return x + 0.5


@pytest.mark.parametrize("massive", [False, True], ids=["normal", "massive"])
def test_saev_reads_its_own_checkpoint_as_we_do(massive, tmp_path):
    W_enc, b_enc, W_dec, b_dec = parts()
    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    given = {"path": str(tmp_path / "theirs" / "sae.pt"), "d": D, "state": state}
    theirs = peer("saev", "saev_writes", {**given, "x": vectors(massive)}, tmp_path)
    ours = read(tmp_path / "theirs").build()(vectors(massive))
    for one, two in ((theirs["codes"], ours.code.dense()), (theirs["x_hat"], ours.x_hat)):
        scale = one.abs().max()
        torch.testing.assert_close(one / scale, two / scale, rtol=1e-5, atol=1e-6)


def test_clipscope_gives_for_a_checkpoint_what_we_give_bit_for_bit(tmp_path):
    torch.set_num_threads(1)
    path, _ = CASES["clipscope"](tmp_path)
    made = sae(TopK(k=4, rectify=False), "standardise")
    with torch.no_grad():
        made.b_enc.zero_()
    find("clipscope").save(made, tmp_path / "written")
    given = {"path": str(path), "written": str(tmp_path / "written" / "sae.pt")}
    given |= {"normal": vectors(massive=False), "massive": vectors(massive=True)}
    theirs = peer("clipscope", "clipscope_encodes", given, tmp_path)
    ported = TopKSAE.from_pretrained(path, device="cpu")
    loaded = read(path).build()
    for kind in ("normal", "massive"):
        x, expected = given[kind], theirs[kind]
        with torch.no_grad():
            found = ported.forward_verbose(x)
        assert list(found) == list(expected)
        for key, each in expected.items():
            assert found[key] is None if each is None else torch.equal(found[key], each), key
        scale = expected["latent"].abs().max()
        codes = loaded.encode(x).dense()
        torch.testing.assert_close(codes / scale, expected["latent"] / scale, rtol=1e-5, atol=1e-6)
        scale = expected["reconstruction"].abs().max()
        for one, two in ((loaded, expected), (made, theirs[f"{kind} written"])):
            x_hat = two["reconstruction"]
            torch.testing.assert_close(one(x).x_hat / scale, x_hat / scale, rtol=1e-5, atol=1e-5)
