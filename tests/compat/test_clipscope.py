"""Programs that were written for the package clipscope."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPModel

from foreign_files import peer
from malicious_pickle import Opens
from sparsight.compat.clipscope import ConfiguredViT, TopKSAE
from sparsight.errors import SparsightError, UserError
from sparsight.evaluation import ReconstructionMeter
from sparsight.formats.calibration import Calibration
from sparsight.sae import SparseAutoencoder

D, N, K = 32, 96, 5
LOCATIONS = [(0, "resid"), (2, "resid")]


@pytest.fixture
def checkpoint(tmp_path):
    """A file like the published ones, of an autoencoder for standardised activations."""
    generator = torch.Generator().manual_seed(3)
    enc = torch.randn(D, N, generator=generator) / D**0.5
    state = {"pre_b": torch.randn(D, generator=generator) * 0.1, "enc": enc, "dec": enc.T / 2}
    path = tmp_path / "22_resid" / "1200013184.pt"
    path.parent.mkdir()
    whole = {"model_state_dict": state, "n_features": N, "d_in": D, "k": K}
    torch.save({**whole, "token_count": 1, "dead_latents": torch.zeros(N), "n_iter": 1}, path)
    return path


@pytest.fixture(scope="module")
def vit(clip):
    return ConfiguredViT(LOCATIONS, model_name=str(clip), device="cpu")


@torch.no_grad()
def test_activations_are_those_of_every_image_of_a_batch(vit, clip, pictures):
    model = CLIPModel.from_pretrained(clip).eval()
    pixels = CLIPImageProcessor.from_pretrained(clip)(pictures, return_tensors="pt")
    states = model.vision_model(**pixels, output_hidden_states=True).hidden_states
    found = vit.all_activations(pictures)
    assert list(found) == LOCATIONS
    for layer, _ in LOCATIONS:
        torch.testing.assert_close(found[(layer, "resid")], states[layer + 1])
        assert not found[(layer, "resid")].requires_grad
    cls = vit.cls_activations(pictures)
    assert torch.equal(cls[(2, "resid")], found[(2, "resid")][:, 0])


def test_the_package_itself_sees_the_same_in_the_first_image_and_no_other(
    vit, clip, pictures, tmp_path
):
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path, picture in zip(paths, pictures, strict=False):
        picture.save(path)
    given = {"locations": LOCATIONS, "model": str(clip), "pictures": paths}
    theirs = peer("clipscope", "clipscope_sees", given, tmp_path)["activations"]
    ours = vit.all_activations(pictures[:2])
    for place in LOCATIONS:
        # Since transformers 5 it returns only the first image; before, all of them.
        first = theirs[place] if theirs[place].ndim == 2 else theirs[place][0]
        torch.testing.assert_close(ours[place][0], first, rtol=1e-4, atol=1e-4)


def test_the_calibration_serves_anyone_who_loads_the_checkpoint(activations, checkpoint):
    ported = TopKSAE.from_pretrained(str(checkpoint), device="cpu")
    ported.calibrate(activations)
    sae = SparseAutoencoder.from_pretrained(checkpoint)
    assert sae.config.normaliser == "standardise"
    x = activations[0].flatten(0, 1)
    expected = ported.forward_calibrated(x)["reconstruction"].detach()
    torch.testing.assert_close(sae(x).x_hat, expected, rtol=1e-4, atol=1e-3)


def test_one_image_alone_is_a_batch_of_one(vit, pictures):
    alone, together = vit.all_activations(pictures[0]), vit.all_activations(pictures)
    torch.testing.assert_close(alone[(0, "resid")], together[(0, "resid")][:1])


def test_both_generations_of_signatures_are_understood(clip, pictures, checkpoint):
    place = [(1, "resid")]
    old = ConfiguredViT(locations=place, transformer_name=str(clip), device="cpu")
    older = ConfiguredViT(place, str(clip), device="cpu")
    new = ConfiguredViT(hook_locations=place, model_name=str(clip), device="cpu")
    found = [each.cls_activations(pictures[:2])[place[0]] for each in (old, older, new)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    a = TopKSAE.from_pretrained(checkpoint=str(checkpoint), device="cpu")
    b = TopKSAE.from_pretrained(filename=str(checkpoint), repo_id="owner/name", device="cpu")
    assert all(torch.equal(a.state_dict()[key], b.state_dict()[key]) for key in a.state_dict())


def test_forward_verbose_follows_the_formulas_bit_for_bit(checkpoint):
    sae = TopKSAE.from_pretrained(str(checkpoint), device="cpu")
    state = torch.load(checkpoint, weights_only=True)["model_state_dict"]
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(4)) * 3
    found = sae.forward_verbose(x)
    assert list(found) == [
        "reconstruction",
        "latent",
        "experts_chosen",
        "expert_prop",
        "expert_weighting",
        "active_latents",
    ]
    pre = (x - state["pre_b"]) @ state["enc"]
    values, indices = pre.topk(K)
    latent = torch.zeros(7, N).scatter(1, indices, values)
    assert torch.equal(found["latent"], latent)
    assert torch.equal(found["reconstruction"], latent @ state["dec"] + state["pre_b"])
    assert torch.equal(found["active_latents"], (latent > 1e-3).any(dim=0))
    assert found["experts_chosen"] is found["expert_prop"] is found["expert_weighting"] is None
    assert torch.equal(sae(x)["latent"], latent)


def test_negative_values_among_the_k_largest_are_kept():
    sae = TopKSAE(k=N, n_features=N, d_in=D, device="cpu")
    latent = sae.forward_verbose(torch.randn(3, D))["latent"]
    assert (latent < 0).any() and (latent != 0).all()


def test_a_new_autoencoder_begins_with_the_decoder_as_the_encoders_transpose():
    sae = TopKSAE(K, N, D, "cpu")
    assert torch.equal(sae.dec, sae.enc.T) and sae.dec.data_ptr() != sae.enc.data_ptr()
    assert float(sae.enc.detach().std()) == pytest.approx(1 / (2 * D) ** 0.5, rel=0.1)


@pytest.fixture
def activations(vit, pictures):
    """Batches at one location, with dimensions of very different means and deviations."""
    stretch = torch.linspace(0.1, 40, D)
    return [x * stretch + 3 * stretch for x in vit.batches(pictures, (2, "resid"), 4)]


def test_calibration_is_the_mean_and_deviation_of_all_positions(activations, checkpoint):
    sae = TopKSAE.from_pretrained(str(checkpoint), device="cpu")
    found = sae.calibrate(activations)
    x = torch.cat(activations).flatten(0, 1)
    assert found.n_vectors == len(x) == 6 * 17
    torch.testing.assert_close(found.mean, x.mean(dim=0))
    torch.testing.assert_close(found.deviation, x.std(dim=0))


def test_a_calibration_lies_beside_the_checkpoint_and_is_found_there(activations, checkpoint):
    sae = TopKSAE.from_pretrained(str(checkpoint), device="cpu")
    assert sae.calibration is None
    made = sae.calibrate(activations, about={"site": "blocks.22.resid_post"})
    again = TopKSAE.from_pretrained(str(checkpoint), device="cpu").calibration
    assert torch.equal(again.mean, made.mean) and torch.equal(again.deviation, made.deviation)
    assert again.about == {"site": "blocks.22.resid_post"} and again.n_vectors == made.n_vectors


def test_the_calibrated_mode_standardises_and_gives_back_the_models_units(activations, checkpoint):
    sae = TopKSAE.from_pretrained(str(checkpoint), device="cpu")
    x = torch.cat(activations).flatten(0, 1)
    sae.calibrate(activations, save=False)
    assert not Calibration.beside(checkpoint).exists()
    mean, scale = x.mean(dim=0), x.std(dim=0) + 1e-6
    inner = sae.forward_verbose((x - mean) / scale)
    found = sae.forward_calibrated(x)
    torch.testing.assert_close(found["latent"], inner["latent"], rtol=1e-4, atol=1e-4)
    expected = inner["reconstruction"] * scale + mean
    torch.testing.assert_close(found["reconstruction"], expected, rtol=1e-4, atol=1e-3)


def test_the_report_has_raw_and_calibrated_figures_by_the_evaluations_own_meter(
    activations, checkpoint
):
    sae = TopKSAE.from_pretrained(str(checkpoint), device="cpu")
    assert list(sae.report(activations)) == ["raw"]
    sae.calibrate(activations)
    report = sae.report(iter(activations))
    assert list(report) == ["raw", "calibrated", "standardised"]
    meter = ReconstructionMeter(17, D)
    for x in activations:
        hat = sae.forward_verbose(x.flatten(0, 1))["reconstruction"].detach()
        meter.add(x, hat.view_as(x))
    assert report["raw"] == {
        key: pytest.approx(meter.result()[key]) for key in ("clipscope_mse", "clipscope_ev", "fvu")
    }
    assert report["calibrated"]["fvu"] < 1 < report["raw"]["fvu"]
    assert report["standardised"]["clipscope_mse"] < D < report["raw"]["clipscope_mse"]


@pytest.mark.unchecked
def test_mistakes_are_reported_in_one_sentence(vit, clip, checkpoint, tmp_path):
    sae = TopKSAE.from_pretrained(str(checkpoint), device="cpu")
    with pytest.raises(UserError, match="flatten"):
        sae.forward_verbose(torch.zeros(2, 17, D))
    with pytest.raises(UserError, match="no calibration"):
        sae.forward_calibrated(torch.zeros(2, D))
    with pytest.raises(UserError, match="two activation vectors"):
        sae.calibrate([])
    with pytest.raises(SparsightError, match="not finite"):
        sae.calibrate([torch.full((3, D), float("nan"))])
    with pytest.raises(UserError, match="no site"):
        ConfiguredViT([(9, "resid")], str(clip), device="cpu")
    with pytest.raises(UserError, match="'resid'"):
        ConfiguredViT([(1, "mlp")], str(clip), device="cpu")
    with pytest.raises(UserError, match="is not read here"):
        next(vit.batches([], (1, "resid")))
    with pytest.raises(UserError, match="no such"):
        TopKSAE.from_pretrained("22_resid/1.pt", device="cpu")
    torch.save({"state": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="is no checkpoint of CLIP-Scope"):
        TopKSAE.from_pretrained(str(tmp_path / "other.pt"))


def test_a_damaged_calibration_is_named(checkpoint, activations):
    sae = TopKSAE.from_pretrained(str(checkpoint), device="cpu")
    sae.calibrate(activations)
    path = Calibration.beside(checkpoint)
    whole = json.loads(path.read_text())
    for damage in (
        {"mean": whole["mean"][:-1]},
        {"deviation": ["wide"] * D},
        {"deviation": [-1.0] * D},
        {"mean": whole["mean"][:4], "deviation": whole["deviation"][:4]},
        {"n_vectors": None},
    ):
        path.write_text(json.dumps({**whole, **damage}))
        with pytest.raises(SparsightError, match="calibration"):
            TopKSAE.from_pretrained(str(checkpoint), device="cpu")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"model_state_dict": Opens(tmp_path / "ran"), "k": 1}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Opens(tmp_path / "ran")))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(SparsightError):
            TopKSAE.from_pretrained(str(tmp_path / name), device="cpu")
    assert not (tmp_path / "ran").exists()
