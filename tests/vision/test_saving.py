from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

import tiny_models
from malicious_pickle import Opens
from sparsight.editing import parametrize
from sparsight.errors import SparsightError, UserError
from sparsight.vision import load_model
from sparsight.vision.layouts import RES
from sparsight.vision.openai_files import load_openai, read_clip
from sparsight.vision.saving import save_model, write_model
from sparsight.vision.tower import find_tower

TEXTS = ["a photo of the cat", "red sun . blue anchor"]


@pytest.fixture(scope="module")
def calibration():
    return load_model("calibration", device="cpu")


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    """A tiny CLIP that is like OpenAI's where weights say nothing: heads, ends, QuickGELU."""
    folder = tmp_path_factory.mktemp("standard")
    from transformers import CLIPConfig, CLIPImageProcessor

    last = len(tiny_models.WORDS) + 3
    text = {**tiny_models.text_tower(last), "hidden_size": 64, "num_attention_heads": 1}
    vision = {**tiny_models.TOWER, "hidden_size": 64, "num_attention_heads": 1}
    torch.manual_seed(0)
    module = CLIPModel(
        CLIPConfig(
            text_config={**text, "projection_dim": 20},
            vision_config={**vision, "intermediate_size": 96, "projection_dim": 20},
            projection_dim=20,
        )
    )
    tiny_models._shake(module)
    module.save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return load_model(str(folder), device="cpu")


@torch.no_grad()
def test_plain_transformers_load_what_was_saved(calibration, tmp_path):
    saved = write_model(calibration, tmp_path / "clip")
    assert saved.difference == 0
    module = CLIPModel.from_pretrained(saved.path)
    tools = CLIPProcessor.from_pretrained(saved.path)
    own = calibration.module.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in module.state_dict().items())
    tokens = tools(text=TEXTS, return_tensors="pt", padding=True)
    found = module.text_projection(module.text_model(**tokens).pooler_output)
    torch.testing.assert_close(found, calibration.embed_texts(TEXTS))
    assert tools.tokenizer.model_max_length == 32
    assert load_model(str(saved.path), device="cpu").weights_hash == calibration.weights_hash


@pytest.mark.parametrize("name", ["folder", "file.safetensors"])
@torch.no_grad()
def test_openai_layout_comes_back_whole(calibration, tmp_path, name, pixels):
    saved = write_model(calibration, tmp_path / name, "openai")
    assert saved.difference == 0
    assert any("4 heads in the text tower" in note for note in saved.notes)
    assert any("end with token 1" in note for note in saved.notes)
    tokenizer = None if name == "folder" else str(tmp_path / "tools")
    calibration.tokenizer.save_pretrained(tmp_path / "tools")
    again = load_model(saved.loads_as, device="cpu", tokenizer=tokenizer)
    assert again.weights_hash == calibration.weights_hash
    assert again.preprocessing == calibration.preprocessing
    assert torch.equal(again.embed_texts(TEXTS), calibration.embed_texts(TEXTS))


def test_a_pt_file_holds_only_tensors_and_only_of_standard_clips(standard, calibration, tmp_path):
    path = save_model(standard, tmp_path / "clip.pt", "openai")
    state = torch.load(path, weights_only=True)
    assert state["visual.conv1.weight"].shape == (64, 3, 8, 8)
    standard.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(path), device="cpu")
    assert again.weights_hash == standard.weights_hash
    assert torch.equal(again.embed_texts(TEXTS), standard.embed_texts(TEXTS))
    with pytest.raises(UserError, match=r"cannot record.*4 heads.*Write \.safetensors"):
        save_model(calibration, tmp_path / "other.pt", "openai")
    assert not (tmp_path / "other.pt").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_written_in_the_dtype_that_is_asked_for(calibration, tmp_path, dtype):
    saved = write_model(calibration, tmp_path / "clip", dtype=dtype)
    assert {value.dtype for value in load_file(saved.path / "model.safetensors").values()} == {
        dtype
    }
    assert CLIPModel.from_pretrained(saved.path).dtype in (dtype, torch.float32)


@torch.no_grad()
def test_files_of_the_geometric_parametrisation_load(standard, tmp_path, pixels):
    saved = write_model(standard, tmp_path / "gmp.safetensors", "openai", gmp=True)
    keys = load_file(saved.path).keys()
    assert "visual.transformer.resblocks.0.mlp.c_fc.r" in keys
    assert "transformer.resblocks.1.mlp.c_proj.theta" in keys
    assert "transformer.resblocks.1.mlp.c_proj.weight" not in keys
    again = load_model(str(saved.path), device="cpu")
    torch.testing.assert_close(again.embed_images(pixels), standard.embed_images(pixels))
    with pytest.raises(UserError, match="only the openai layout"):
        write_model(standard, tmp_path / "x", "huggingface", gmp=True)


def test_files_in_half_precision_merge_in_full(standard, tmp_path):
    """r · θ of float16 parts, rounded to float16 again, would lose what they still hold."""
    path = save_model(standard, tmp_path / "gmp.pt", "openai", gmp=True, dtype=torch.float16)
    key = "visual.transformer.resblocks.0.mlp.c_fc"
    parts = torch.load(path, weights_only=True)
    # Published: lengths and directions are halved, the biases beside them not.
    assert {value.dtype for value in parts.values()} == {torch.float16}
    r, theta = parts[f"{key}.r"].double(), parts[f"{key}.theta"].double()
    exact = r * theta / theta.norm(dim=1, keepdim=True)
    assert torch.equal(read_clip(path)[0][f"{key}.weight"], exact.float())


def test_files_of_long_clip_load_with_their_positions(standard, tmp_path):
    path = save_model(standard, tmp_path / "clip.pt", "openai")
    state = torch.load(path, weights_only=True)
    long = torch.randn(248, 64)
    state["positional_embedding"], state[RES] = long, long + 1
    torch.save(state, path)
    standard.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(path), device="cpu")
    assert again.context_length == 248
    table = again.module.text_model.embeddings.position_embedding.weight
    assert torch.equal(table, torch.cat([long[:20], long[20:] + 1]))


def test_wrappers_and_prefixes_of_training_programs_are_removed(standard, tmp_path):
    state = torch.load(save_model(standard, tmp_path / "a.pt", "openai"), weights_only=True)
    wrapped = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(wrapped, tmp_path / "b.pt")
    assert read_clip(tmp_path / "b.pt")[0].keys() == state.keys()


class Whole(torch.nn.Module):
    """Stands for the class of a program that pickles its modules whole."""

    def __init__(self, standard_state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for key, value in standard_state.items():
            holder: torch.nn.Module = self
            *path, last = key.split(".")
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, torch.nn.Module())
                holder = holder._modules[part]
            holder.register_parameter(last, torch.nn.Parameter(value))


def test_a_pickled_module_gives_its_tensors_and_is_not_run(standard, tmp_path):
    """Published: checkpoints are whole pickled modules, which run whatever they bring."""
    state = torch.load(save_model(standard, tmp_path / "a.pt", "openai"), weights_only=True)
    module = Whole(state)
    made = tmp_path / "made"
    module.surprise = Opens(made)
    torch.save(module, tmp_path / "b.pt")
    found = read_clip(tmp_path / "b.pt")[0]
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert not made.exists()


def test_programs_are_refused_with_what_to_do(tmp_path):
    module = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    torch.jit.save(module, tmp_path / "ViT-B-32.pt")
    with pytest.raises(UserError, match=r"TorchScript program.*openai/clip-vit-base-patch32"):
        load_model(str(tmp_path / "ViT-B-32.pt"))


def test_other_files_are_refused_by_what_they_are(tmp_path):
    save_file({"visual.layer1.0.conv1.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match="ResNet"):
        load_model(str(tmp_path / "resnet.safetensors"))
    save_file({"W_enc": torch.zeros(2)}, tmp_path / "sae.safetensors")
    with pytest.raises(UserError, match=r"\(W_enc, …\) are not those of a CLIP"):
        load_model(str(tmp_path / "sae.safetensors"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="no named tensors"):
        load_model(str(tmp_path / "list.pt"))
    with pytest.raises(UserError, match="does not exist"):
        load_model(str(tmp_path / "missing.pt"))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "sae.safetensors").read_bytes()[:20])
    with pytest.raises(SparsightError, match="damaged"):
        load_model(str(tmp_path / "cut.safetensors"))


def test_weights_that_do_not_fit_are_refused(standard, tmp_path):
    path = save_model(standard, tmp_path / "a.pt", "openai")
    state = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "visual.ln_pre.bias"}, tmp_path / "b.pt")
    with pytest.raises(SparsightError, match="do not fit together"):
        load_model(str(tmp_path / "b.pt"))
    torch.save({k: v for k, v in state.items() if k != "text_projection"}, tmp_path / "c.pt")
    with pytest.raises(SparsightError, match="text_projection is missing"):
        load_model(str(tmp_path / "c.pt"))


@pytest.mark.unchecked
def test_damage_of_any_kind_is_one_message_that_names_the_file(calibration, tmp_path):
    path = save_model(calibration, tmp_path / "clip.safetensors", "openai")
    state = load_file(path)
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["sparsight"])
    block = "visual.transformer.resblocks.0"
    parts = dict(state)
    parts[f"{block}.mlp.c_fc.theta"] = parts.pop(f"{block}.mlp.c_fc.weight")
    for tensors, metadata in (
        ({**state, "text_projection": torch.zeros(())}, said),
        ({**state, "token_embedding.weight": torch.zeros(5)}, said),
        ({**state, "visual.positional_embedding": torch.zeros(())}, said),
        ({**state, "visual.conv1.weight": torch.zeros(2)}, said),
        ({**state, f"{block}.attn.in_proj_weight": torch.zeros(2)}, said),
        ({**state, f"{block}.mlp.c_fc.weight": torch.zeros(())}, said),
        ({**parts, f"{block}.mlp.c_fc.r": torch.ones(5, 1)}, said),
        (state, {**said, "clip": "x"}),
        (state, {**said, "clip": {"vision": 5}}),
        (state, {**said, "clip": {"vision": {"heads": 0}}}),
        (state, {**said, "clip": {"vision": {"heads": 7}}}),
        (state, {**said, "clip": {"vision": {"activation": "none"}}}),
    ):
        save_file(
            tensors, tmp_path / "bad.safetensors", metadata={"sparsight": json.dumps(metadata)}
        )
        with pytest.raises(SparsightError, match=r"bad\.safetensors") as caught:
            load_model(str(tmp_path / "bad.safetensors"), device="cpu")
        assert caught.value.exit_code == 1


@torch.no_grad()
def test_missing_numbers_of_heads_are_inferred_as_openai_does_or_asked_for(calibration, tmp_path):
    said = save_model(calibration, tmp_path / "clip.safetensors", "openai")
    state = load_file(said)
    save_file(state, tmp_path / "bare.safetensors")  # without metadata
    bare = load_model(str(tmp_path / "bare.safetensors"), device="cpu")
    assert bare.module.config.vision_config.num_attention_heads == 3
    assert bare.module.config.text_config.num_attention_heads == 2
    given = load_openai(
        tmp_path / "bare.safetensors",
        id="bare",
        device=torch.device("cpu"),
        dtype=torch.float32,
        heads=(6, 4),
    )
    assert given.module.config.vision_config.num_attention_heads == 6
    assert given.module.config.text_config.num_attention_heads == 4
    state["visual.conv1.weight"] = state["visual.conv1.weight"][:100].contiguous()
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"100 wide.*how many heads"):
        load_model(str(tmp_path / "odd.safetensors"))


def test_a_missing_tokenizer_is_reported_at_the_first_text(calibration, tmp_path, pixels):
    path = save_model(calibration, tmp_path / "clip.safetensors", "openai")
    model = load_model(str(path), device="cpu")
    assert model.embed_images(torch.zeros(1, 3, 64, 64)).shape == (1, 128)
    with pytest.raises(UserError, match="no tokenizer next to it"):
        model.embed_texts(["a"])


def test_existing_files_are_not_overwritten(calibration, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        save_model(calibration, tmp_path / "out")
    (tmp_path / "clip.pt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        save_model(calibration, tmp_path / "clip.pt", "openai")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.pt", "out"]


@pytest.mark.unchecked
def test_an_unknown_layout_is_answered_with_the_known_ones(calibration, tmp_path):
    with pytest.raises(UserError, match=r"layout='keras'.*huggingface, openai, open_clip"):
        save_model(calibration, tmp_path / "x", "keras")
    with pytest.raises(UserError, match="only the openai layout can be a single file"):
        save_model(calibration, tmp_path / "x.pt")


def test_nothing_is_left_if_the_saved_copy_differs(calibration, tmp_path, monkeypatch):
    from sparsight.vision import saving

    monkeypatch.setattr(saving, "_difference", lambda *_: float("nan"))
    with pytest.raises(SparsightError, match="not written"):
        save_model(calibration, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize("part", ["last position", "scale"])
def test_the_saved_copy_is_compared_up_to_the_last_position_and_in_its_scale(
    calibration, tmp_path, monkeypatch, part
):
    from sparsight.vision import saving

    other = load_model("calibration", device="cpu")
    if part == "scale":
        other.module.logit_scale += 0.1
    else:
        other.module.text_model.embeddings.position_embedding.weight[-1] *= -3
    monkeypatch.setattr(saving, "_read_back", lambda *_: other)
    with pytest.raises(SparsightError, match="not written"):
        save_model(calibration, tmp_path / "out")


def test_other_architectures_are_saved_for_transformers_only(model, tmp_path):
    for family in ("dinov2", "siglip"):
        saved = write_model(model(family), tmp_path / family)
        assert saved.difference == 0
        with pytest.raises(UserError, match="is not a CLIP"):
            write_model(model(family), tmp_path / "other", "openai")
    split = copy.copy(model("siglip"))
    split.module = parametrize(copy.deepcopy(split.module))
    split._tower = find_tower(split.module, "split")
    assert write_model(split, tmp_path / "merged").difference < 1e-5


def test_long_texts_are_refused_without_truncation(calibration, model):
    long = "a photo of the sun " * 20
    with pytest.raises(UserError, match=r"Text 2 of 3 .* \d+ tokens, and 32 fit.* 2 texts are"):
        calibration.tokenize(["a sun", long, long], truncate=False)
    with pytest.raises(UserError, match="Text 1 of 1"):
        calibration.embed_texts([long], truncate=False)
    assert calibration.tokenize([long])["input_ids"].shape == (1, 32)
    with pytest.raises(UserError, match=r"and 16 fit"):
        model("siglip").tokenize(["cat " * 30], truncate=False)
    fits = calibration.tokenize(["a sun"], truncate=False)
    assert torch.equal(calibration.embed_tokens(fits), calibration.embed_texts(["a sun"]))
    assert calibration.context_length == 32
