"""Checkpoints of projects that read them nowhere else: our outputs are those of their formulas."""

from __future__ import annotations

import json

import pytest
import torch

from foreign_files import (
    CASES,
    PATCHSAE,
    D,
    K,
    N,
    llamascopium_folder,
    llamascopium_state,
    msae_file,
    msae_state,
    numbers,
    openai_file,
    parts,
    prisma_folder,
    prisma_state,
    saev_activation,
    saev_file,
    save_with,
)
from sparsight.errors import SparsightError, UserError
from sparsight.formats import read


def vectors(massive: bool) -> torch.Tensor:
    """Activations; with a few dimensions a hundred times as large, as in the residual stream."""
    x = numbers(64, D, seed=20)
    x[:, 2] *= 100 if massive else 1
    return x + (5 if massive else 0.3)


@torch.no_grad()
@pytest.mark.parametrize("massive", [False, True], ids=["normal", "massive"])
@pytest.mark.parametrize("name", CASES)
def test_codes_and_outputs_are_those_of_the_projects_own_formulas(name, massive, tmp_path):
    path, function = CASES[name](tmp_path)
    foreign = read(path)
    assert foreign.unknown == ()
    x = vectors(massive)
    codes, expected = function(x)
    code = foreign.build().encode(x)
    found = code.dense()
    if "times the norms" in " ".join(foreign.notes):
        codes = codes * parts()[2].norm(dim=1)
    scale = codes.abs().max()
    torch.testing.assert_close(found / scale, codes / scale, rtol=1e-5, atol=2e-6)
    out = foreign.build()(x).x_hat
    scale = expected.abs().max()
    torch.testing.assert_close(out / scale, expected / scale, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "saev_schema_5": {"site": "blocks.10.resid_post", "tokens": "patches"},
        "prisma_as_published": {
            "model": {"id": "open_clip:hf-hub:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K"},
            "site": "blocks.10.resid_post",
            "tokens": "all",
        },
        "prisma_layer_norm_topk": {"tokens": "cls"},
        "prisma_pickled_configuration": {"tokens": "patches"},
        "prisma_in_the_way_of_saelens_2": {"site": "blocks.9.mlp_out"},
        "prisma_transcoder": {"target": "blocks.10.mlp_out"},
        "clipscope": {"site": "blocks.22.resid_post", "tokens": "all"},
        "patchsae": {
            "model": {"id": "openai/clip-vit-base-patch16"},
            "site": "blocks.10.resid_post",
            "tokens": "all",
        },
        "fry": {"site": "blocks.22.resid_post", "tokens": "cls"},
        "msae_relu": {"site": "embedding"},
        "dncbm": {"site": "embedding"},
        "llamascopium_transcoder": {
            "site": "blocks.10.resid_post",
            "target": "blocks.10.mlp_out",
        },
    }.items(),
)
def test_where_an_sae_belongs_is_given_in_our_terms(name, expected, tmp_path):
    metadata = read(CASES[name](tmp_path)[0]).build().metadata
    assert {key: metadata.get(key) for key in expected} == expected
    assert metadata["source"]["format"] == name.split("_")[0].replace("fry", "patchsae")


def test_what_a_user_must_know_is_in_the_notes(tmp_path):
    def notes(name):
        folder = tmp_path / name
        folder.mkdir()
        return " ".join(read(CASES[name](folder)[0]).notes)

    assert "encoder subtracts b_dec" in notes("saev_without_schema")
    assert notes("saev_schema_5") == ""
    assert "holds neither mean nor deviation" in notes("clipscope")
    assert "1200013184.calibration.json (257 vectors)" in notes("clipscope_calibrated")
    assert "are read from the name of the file" in notes("msae_topk_capped")
    assert f"begin with k = {K}, the last is used" in notes("msae_matryoshka_tied")
    assert notes("msae_of_newer_files") == ""


def test_a_prisma_configuration_without_a_normaliser_is_read_with_its_default(tmp_path):
    prisma_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["normalize_activations"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    foreign = read(tmp_path)
    assert foreign.config.normaliser == "layer_norm"
    assert "taken to be by layer_norm" in foreign.notes[0]


def test_unknown_tensors_and_keys_are_reported(tmp_path):
    def unknown(name, path):
        (tmp_path / name).mkdir()
        return read(path(tmp_path / name)).unknown

    extra = torch.zeros(3)
    assert unknown("a", lambda f: prisma_folder(f, prisma_state(W_new=extra))) == ("W_new",)
    cfg = {"d_model": D, "d_sae": N, "activation": saev_activation("Relu"), "new": 1}
    saev = unknown("b", lambda f: saev_file(f / "s.pt", {"schema": 5, "cfg": cfg}, W_new=extra))
    assert saev == ("new", "W_new")
    path = f"{N}_{D}_ReLU_003_False_False_0.0_x.pth"
    assert unknown("c", lambda f: msae_file(f / path, msae_state(W_new=extra))) == ("model.W_new",)
    state = llamascopium_state(W_new=extra)
    config = {"norm_activation": "inference"}
    assert unknown("d", lambda f: llamascopium_folder(f, state, **config)) == ("W_new",)


def test_unknown_fields_of_configurations_are_reported(tmp_path):
    def unknown(name, path):
        (tmp_path / name).mkdir()
        return read(path(tmp_path / name)).unknown

    state, new = llamascopium_state(W_new=torch.zeros(3)), {"act_twist": 2, "lr": 1e-3}
    config = {"norm_activation": "inference", "act_twist": 2, "k_aux": 512}
    found = unknown("a", lambda f: llamascopium_folder(f, state, **config))
    assert found == ("act_twist", "W_new")
    state = prisma_state(W_new=torch.zeros(3))
    assert unknown("b", lambda f: prisma_folder(f, state, **new)) == ("act_twist", "W_new")

    def pickled(folder):
        name = "sae_training.config.ViTSAERunnerConfig"
        save_with(folder / "s.pt", name, {**PATCHSAE, **new}, state_dict=state)
        return folder

    assert unknown("c", pickled) == ("act_twist", "W_new")

    activation = saev_activation("TopK", top_k=K, momentum=0.1, aux={}, rectify=True)
    cfg = {"d_model": D, "d_sae": N, "activation": {**activation, "scale": 2}}
    header = {"schema": 5, "cfg": cfg, "commit": "abc", "lib": "0.1.0", "units": "m"}
    found = unknown("d", lambda f: saev_file(f / "s.pt", header))
    assert found == ("activation.params.rectify", "activation.scale", "units")
    cfg["activation"] = {"cls": "TopK", "top_k": K, "rectify": True}
    header = {"schema": 5, "cfg": cfg}
    assert unknown("e", lambda f: saev_file(f / "s.pt", header)) == ("activation.rectify",)


@pytest.mark.parametrize("name", ["prisma", "patchsae"])
def test_what_a_training_leaves_in_a_configuration_is_not_called_unknown(name, tmp_path):
    """Fields of all the kinds there are: of the run, its data, its schedule, its logs."""
    config = dict.fromkeys(
        ("seed", "lr", "l1_coefficient", "lr_scheduler_name", "lr_warm_up_steps", "dataset_path")
    )
    config |= dict.fromkeys(("use_ghost_grads", "dead_feature_window", "feature_sampling_window"))
    config |= dict.fromkeys(("wandb_project", "n_checkpoints", "checkpoint_path", "d_sae"))
    if name == "prisma":
        config |= dict.fromkeys(("_device", "_dtype", "vit_model_cfg", "max_grad_norm"))
        path = prisma_folder(tmp_path, **config)
    else:
        config |= dict.fromkeys(("gated_sae", "store_size", "run_name", "image_width"))
        path = tmp_path / "s.pt"
        torch.save({"cfg": {**PATCHSAE, **config}, "state_dict": prisma_state()}, path)
    assert read(path).unknown == ()


@torch.no_grad()
def test_the_topk_of_llamascopium_ranks_by_the_norms_of_the_decoder(tmp_path):
    config = {"act_fn": "topk", "norm_activation": "inference"}
    foreign = read(llamascopium_folder(tmp_path, llamascopium_state(), **config))
    assert "times the norms of its decoder rows" in foreign.notes[0]
    W_E, b_E, W_D, b_D = parts()
    x = vectors(massive=False)
    h, norms = x @ W_E + b_E, W_D.norm(dim=1)
    kept = torch.zeros_like(h).scatter(1, (h * norms).topk(K).indices, 1) * (h > 0)
    out = foreign.build()(x)
    torch.testing.assert_close(out.code.dense(), h * kept * norms, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.x_hat, h * kept @ W_D + b_D, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_orientations_and_biases_hold_against_vectors_that_were_computed_by_hand(tmp_path):
    """Two numbers in, three latents: x = (3, 1).

    Encoder columns (1, 0), (0, 2), (1, −1); bias (0.5, −1, 0); decoder rows (1, 1), (0, 2),
    (3, 0); decoder bias (1, −1). Without the subtraction: (3.5, 1, 2), so x̂ = (10.5, 4.5). With
    it, x − b = (2, 2): (2.5, 3, 0), so x̂ = (3.5, 7.5).
    """
    x = torch.tensor([[3.0, 1.0]])
    W_enc = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, -1.0]])
    W_dec = torch.tensor([[1.0, 1.0], [0.0, 2.0], [3.0, 0.0]])
    b_enc, b_dec = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([1.0, -1.0])
    plain = ([[3.5, 1.0, 2.0]], [[10.5, 4.5]])
    centred = ([[2.5, 3.0, 0.0]], [[3.5, 7.5]])
    state = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}

    def saev(header):
        path = tmp_path / "sae.pt"
        with path.open("wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            torch.save(state, file)
        return path

    def torch_file(name, payload):
        torch.save(payload, tmp_path / name)
        return tmp_path / name

    def check(path, codes, x_hat):
        out = read(path).build()(x)
        assert out.code.dense().tolist() == codes
        assert out.x_hat.tolist() == x_hat

    check(saev({"d_vit": 2, "d_sae": 3}), *centred)
    cfg = {"d_model": 2, "d_sae": 3, "activation": saev_activation("Relu")}
    check(saev({"schema": 5, "cfg": cfg}), *plain)
    # pre (3.5, 1, 2): the two greatest are kept.
    cfg["activation"] = saev_activation("TopK", top_k=2)
    check(saev({"schema": 5, "cfg": cfg}), [[3.5, 0.0, 2.0]], [[10.5, 2.5]])
    config = {"block_layer": 3, "module_name": "resid"}
    check(torch_file("fry.pt", {"config": config, "state_dict": state}), *centred)
    config = {"layer_subtype": "hook_resid_post", "normalize_activations": "none"}
    check(torch_file("prisma.pt", {"cfg": config, "state_dict": state}), *centred)
    openai = {"pre_bias": b_dec, "encoder.weight": W_enc.T, "latent_bias": b_enc}
    check(torch_file("openai.pt", {**openai, "decoder.weight": W_dec.T}), *centred)
    dncbm = {"tied_bias": b_dec, "encoder._weight": W_enc.T, "encoder._bias": b_enc}
    check(torch_file("dncbm.pt", {**dncbm, "decoder._weight": W_dec.T}), *centred)
    # Scaled by 2 around (0, 0): the encoder sees (6, 2) − (1, −1) = (5, 3), pre (5.5, 5, 2);
    # (11.5, 15.5) + (1, −1), halved.
    msae = {"encoder": W_enc, "pre_bias": b_dec, "latent_bias": b_enc, "decoder": W_dec}
    scaled = {"model": msae, "mean_center": 0.0, "scaling_factor": 2.0, "target_norm": 1.0}
    path = torch_file("3_2_ReLU_003_False_False_0.0_x.pth", scaled)
    check(path, [[5.5, 5.0, 2.0]], [[6.25, 7.25]])
    # (2, 2) without biases of latents: pre (2, 4, 0); of two greatest, (2, 10) + (1, −1).
    scope = {"model_state_dict": {"pre_b": b_dec, "enc": W_enc, "dec": W_dec}}
    path = torch_file("scope.pt", {**scope, "n_features": 3, "d_in": 2, "k": 2})
    check(path, [[2.0, 4.0, 0.0]], [[3.0, 9.0]])
    folder = tmp_path / "llama"
    folder.mkdir()
    tensors = {"W_E": W_enc, "b_E": b_enc, "W_D": W_dec, "b_D": b_dec}
    check(llamascopium_folder(folder, tensors, norm_activation="inference", d_model=2), *plain)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: saev_file(f / "s.pt", {"schema": 9, "cfg": {}}), "schema is 9"),
        (
            lambda f: saev_file(
                f / "s.pt",
                {"schema": 5, "cfg": {"d_model": D, "activation": saev_activation("Sigmoid")}},
            ),
            "activation is 'Sigmoid'",
        ),
        (lambda f: prisma_folder(f, architecture="jumprelu"), "'jumprelu'"),
        (lambda f: prisma_folder(f, hook_point_head_index=2), "attention head"),
        (lambda f: prisma_folder(f, normalize_activations="new"), "'new'"),
        (
            lambda f: prisma_folder(
                f,
                prisma_state(b_dec_out=numbers(D), W_skip=numbers(D, D)),
                normalize_activations="layer_norm",
            ),
            "reads the input before 'layer_norm'",
        ),
        (lambda f: [openai_file(f / "o.pt", "Sine"), f / "o.pt"][1], "'Sine'"),
        (lambda f: msae_file(f / "renamed.pth", msae_state()), "Give the file the name back"),
        (
            lambda f: msae_file(f / f"{N}_{D}_BatchTopK_{K}_False_False_0.0_x.pth", msae_state()),
            "BatchTopK",
        ),
        (
            lambda f: llamascopium_folder(f, llamascopium_state(), sae_type="crosscoder"),
            "holds a crosscoder",
        ),
        (
            lambda f: llamascopium_folder(f, llamascopium_state(), norm_activation="batch-wise"),
            "batch-wise",
        ),
        (
            lambda f: llamascopium_folder(
                f,
                llamascopium_state(),
                norm_activation="token-wise",
                hook_point_out="blocks.10.hook_mlp_out",
            ),
            "for SAEs",
        ),
        (
            lambda f: llamascopium_folder(
                f, llamascopium_state(), act_fn="batchtopk", norm_activation="inference"
            ),
            "Convert it to jumprelu",
        ),
    ],
)
def test_an_unsupported_part_is_refused_by_name(write, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: saev_file(f / "s.pt", {"d_vit": D, "d_sae": N + 1}), "its header says"),
        (lambda f: saev_file(f / "s.pt", {"d_vit": "wide", "d_sae": N}), "d_model is 'wide'"),
        (lambda f: prisma_folder(f, d_in=D + 1), "d_in is 7"),
        (
            lambda f: msae_file(f / f"{N + 1}_{D}_ReLU_003_False_False_0.0_x.pth", msae_state()),
            "Was the file renamed",
        ),
        (
            lambda f: msae_file(f / f"{N}_{D}_ReLU_003_True_False_0.0_x.pth", msae_state()),
            "tied, but there is a decoder",
        ),
        (lambda f: llamascopium_folder(f, llamascopium_state()), "average norm"),
        (
            lambda f: llamascopium_folder(
                f, llamascopium_state(), act_fn="jumprelu", norm_activation="inference"
            ),
            "no thresholds",
        ),
    ],
)
def test_files_whose_parts_contradict_one_another_are_faults(write, message, tmp_path):
    with pytest.raises(SparsightError, match=message) as caught:
        read(write(tmp_path))
    assert caught.value.exit_code == 1


def test_an_unknown_file_is_refused_with_its_contents(tmp_path):
    torch.save({"gamma": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"CLIP-Scope.*MSAE.*other\.pt has gamma"):
        read(tmp_path)
