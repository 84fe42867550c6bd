"""What `load_model` accepts, what it refuses, and with which messages."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import time

import pytest
import torch
from PIL import Image
from transformers import (
    BeitConfig,
    BeitModel,
    BertConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTImageProcessor,
    DeiTModel,
    SiglipImageProcessorPil,
    SwinConfig,
    SwinModel,
)

import tiny_models
from malicious_pickle import Opens
from sparsight.errors import MissingExtra, SparsightError, UserError
from sparsight.images import ImageError
from sparsight.vision import load_model
from sparsight.vision.transformers_models import ProcessorTransform


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_model_knows_what_it_is(folder, model):
    ours = model("clip")
    assert (ours.id, ours.family, ours.n_blocks) == (str(folder("clip")), "clip", 3)
    assert (ours.device.type, ours.dtype) == ("cpu", torch.float32)
    attention = ours._anatomy.sites["blocks.0.attn_out"].place.module
    told = getattr(attention.config, "_attn_implementation", None)
    assert told == "sdpa" or "Sdpa" in type(attention).__name__  # transformers 5, or 4.51
    assert json.loads(json.dumps(ours.preprocessing)) == ours.preprocessing
    assert ours.preprocessing["image_mean"] == [0.48145466, 0.4578275, 0.40821073]


def test_the_calibration_clip_loads_like_any_folder(folder, monkeypatch):
    import sparsight.calibration

    monkeypatch.setattr(sparsight.calibration, "CLIP_FOLDER", folder("clip"))
    ours = load_model("calibration", device="cpu")
    assert (ours.id, ours.family, ours.revision) == ("calibration", "clip", None)
    assert ours.embed_texts(["the sun"]).shape == (1, 20)
    with pytest.raises(UserError, match="no revisions"):
        load_model("calibration", revision="main")


def test_models_move_between_devices_and_stay_themselves(model):
    assert model("clip").to("cpu") is model("clip")


def test_loading_prints_nothing(folder, capfd):
    saved = str(folder("vit"))
    capfd.readouterr()
    load_model(saved, device="cpu")
    assert capfd.readouterr() == ("", "")


def test_a_vision_tower_saved_alone_keeps_its_projection_and_its_hash(folder, model, tmp_path):
    tower = CLIPVisionModelWithProjection.from_pretrained(folder("clip"))
    tower.save_pretrained(tmp_path)
    shutil.copy(folder("clip") / "preprocessor_config.json", tmp_path)
    alone = load_model(str(tmp_path), device="cpu")
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(alone.embed_images(pixels), model("clip").embed_images(pixels))
    assert alone.weights_hash == model("clip").weights_hash
    assert (alone.family, alone.has_text) == ("clip", False)


def test_a_clip_tower_without_projection_embeds_with_its_normalised_cls(folder, model, tmp_path):
    CLIPVisionModel.from_pretrained(folder("clip")).save_pretrained(tmp_path)
    shutil.copy(folder("clip") / "preprocessor_config.json", tmp_path)
    alone = load_model(str(tmp_path), device="cpu")
    assert alone.sites == model("clip").sites[:-1]
    pixels = torch.randn(2, 3, 32, 32)
    normalised = model("clip").read(pixels, "final_norm")["final_norm"]
    assert torch.equal(alone.embed_images(pixels), normalised[:, 0])


def test_a_family_that_no_table_names_is_opened_too(tmp_path):
    """DeiT: two prefix positions, one of them a distillation token."""
    torch.manual_seed(0)
    config = DeiTConfig(**tiny_models.TOWER, intermediate_size=64)
    DeiTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    DeiTImageProcessor(size=size, do_center_crop=False).save_pretrained(tmp_path)
    ours = load_model(str(tmp_path), device="cpu")
    assert (ours.family, ours.n_prefix, ours.has_cls, ours.patch_grid) == ("deit", 2, True, (4, 4))
    assert "blocks.2.mlp_out" in ours.sites


def test_parts_that_do_not_add_up_to_the_stream_are_no_sites(tmp_path):
    """BEiT scales attention and MLP by bare parameters: no module outputs what is added."""
    torch.manual_seed(0)
    config = BeitConfig(**tiny_models.TOWER, intermediate_size=64, layer_scale_init_value=0.3)
    BeitModel(config).save_pretrained(tmp_path)
    tiny_models.vit_processor().save_pretrained(tmp_path)
    ours = load_model(str(tmp_path), device="cpu")
    kinds = {site.rpartition(".")[2] for site in ours.sites}
    assert kinds == {"resid_pre", "resid_post"}
    with pytest.raises(UserError, match="has no site"):
        ours.canonical_site("blocks.0.mlp_out")


def test_a_wide_image_has_a_wide_patch_grid(folder, tmp_path):
    shutil.copytree(folder("dinov2"), tmp_path / "wide")
    path = tmp_path / "wide" / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "crop_size": {"height": 24, "width": 40}}))
    ours = load_model(str(tmp_path / "wide"), device="cpu")
    assert ours.input_shape == (3, 24, 40)
    assert ours.patch_grid == (3, 5)
    assert ours.token_count("blocks.0.resid_post", "patches") == 15
    read = ours.read(torch.randn(2, 3, 24, 40), "final_norm", tokens="patches")
    assert read["final_norm"].shape == (2, 15, 32)


@pytest.mark.alone
def test_a_vit_b_32_reads_early_sites_for_less_than_late_ones(tmp_path):
    config = CLIPConfig(
        vision_config={"patch_size": 32}, text_config={"num_hidden_layers": 1, "vocab_size": 99}
    )
    with torch.device("meta"):
        big = CLIPModel(config)
    big.to_empty(device="cpu")
    noise = torch.randn(4_000_000) * 0.02  # every weight a slice of it: drawing them all is slow
    with torch.no_grad():
        for weight in big.parameters():
            weight.copy_(noise[: weight.numel()].view(weight.shape))
    big.save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    ours = load_model(str(tmp_path), device="cpu")
    assert (ours.n_blocks, ours.n_tokens, ours.patch_grid) == (12, 50, (7, 7))
    assert (ours.d_in("blocks.11.resid_post"), ours.d_in("embedding")) == (768, 512)
    pixels = torch.randn(4, 3, 224, 224)

    def seconds(site: str) -> float:
        start = time.perf_counter()
        ours.read(pixels, site)
        return time.perf_counter() - start

    early, late = (min(seconds(f"blocks.{i}.resid_post") for _ in range(3)) for i in (0, 11))
    assert early < late / 2


@pytest.mark.parametrize("id", ["./nowhere", "/no/such/folder", "some-owner/no-such-model"])
def test_the_message_for_a_missing_model_names_it(id):
    with pytest.raises(UserError, match=id.strip("./")):
        load_model(id)


def test_a_hub_id_that_cannot_be_reached_names_folder_and_hub():
    with pytest.raises(UserError, match=r"Tried a local folder .* and the Hugging Face Hub"):
        load_model("some-owner/no-such-model")


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_model(str(tmp_path))


def test_a_config_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: is missing, damaged or cut off"):
        load_model(str(tmp_path))


def test_a_language_model_is_refused_before_its_weights_are_read(tmp_path):
    BertConfig(num_hidden_layers=1, hidden_size=12).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"not a vision model.*bert"):
        load_model(str(tmp_path))


def test_a_hierarchical_model_is_refused(tmp_path):
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4
    )
    SwinModel(config).save_pretrained(tmp_path)
    tiny_models.vit_processor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"plain vision transformer|no vision transformer"):
        load_model(str(tmp_path))


def test_a_model_without_its_image_processor_is_refused(folder, tmp_path):
    shutil.copytree(folder("clip"), tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"image processor.*preprocessor_config\.json"):
        load_model(str(tmp_path / "m"))


def test_a_processor_that_keeps_the_aspect_ratio_is_refused(folder, tmp_path):
    shutil.copytree(folder("dinov2"), tmp_path / "m")
    path = tmp_path / "m" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_center_crop": False}))
    with pytest.raises(UserError, match="the same for every image"):
        load_model(str(tmp_path / "m"))


def test_a_processor_of_another_size_than_the_model_is_refused(folder, tmp_path):
    shutil.copytree(folder("clip"), tmp_path / "m")
    path = tmp_path / "m" / "preprocessor_config.json"
    size = {"height": 16, "width": 16}
    path.write_text(json.dumps({**json.loads(path.read_text()), "crop_size": size}))
    with pytest.raises(UserError, match="does not run on the 16 × 16 images"):
        load_model(str(tmp_path / "m"))


def test_truncated_weights_are_a_fault(folder, tmp_path):
    shutil.copytree(folder("clip"), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SparsightError, match="damaged"):
        load_model(str(tmp_path / "m"))


def plain_pickle(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [torch.save, plain_pickle])
def test_weights_with_code_are_refused_and_the_code_is_not_run(write, folder, tmp_path, capfd):
    shutil.copytree(folder("clip"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    made = tmp_path / "made"
    write({"logit_scale": Opens(made)}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(
        SparsightError, match=r"does not run code in weights; use safetensors"
    ) as told:
        load_model(str(tmp_path / "m"))
    assert not made.exists()
    assert "weights_only" not in str(told.value) and "\n" not in str(told.value)
    assert capfd.readouterr().err == ""
    pickle.loads(pickle.dumps(Opens(made))).close()
    assert made.exists()  # without care it would have been


def test_pickled_weights_of_only_tensors_are_read(folder, model, tmp_path):
    from safetensors.torch import load_file

    shutil.copytree(folder("clip"), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    torch.save(load_file(path), tmp_path / "m" / "pytorch_model.bin")
    path.unlink()
    assert load_model(str(tmp_path / "m")).weights_hash == model("clip").weights_hash


def test_missing_weights_of_the_tower_are_refused_by_name(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder("clip"), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    lost = "vision_model.encoder.layers.1.mlp.fc1.bias"
    save_file({k: v for k, v in weights.items() if k != lost}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"are missing from its files.*layers\.1\.mlp\.fc1\.bias"):
        load_model(str(tmp_path / "m"))


def test_weights_of_another_shape_are_refused_by_name(folder, tmp_path):
    shutil.copytree(folder("vit"), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 128}))
    with pytest.raises(UserError, match=r"shape differs.*mlp|shape differs.*dense"):
        load_model(str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "is not a device"),
        ({"dtype": "float8"}, "float32, bfloat16, float16"),
        ({"dtype": torch.int8}, "float32, bfloat16, float16"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, folder):
    with pytest.raises(UserError, match=message):
        load_model(str(folder("clip")), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_refused(folder):
    with pytest.raises(UserError, match="finds no CUDA device"):
        load_model(str(folder("clip")), device="cuda")


def test_a_revision_of_something_that_has_none_is_refused():
    with pytest.raises(UserError, match="no revisions"):
        load_model("open_clip:ViT-B-32/openai", revision="main")


def test_open_clip_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingExtra, match=r"sparsight\[open-clip\]"):
        load_model("open_clip:ViT-B-32/openai")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"avx512_f": True}, torch.float32)],
)
def test_auto_is_bfloat16_if_the_processor_multiplies_in_it(
    capabilities: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    model = load_model("calibration", device="cpu", dtype="auto")
    assert model.dtype == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert load_model("calibration", device="cpu", dtype="auto").dtype == torch.float32


def test_jpegs_may_be_scaled_to_twice_the_size_that_preprocessing_resizes_to() -> None:
    assert load_model("calibration", device="cpu").min_side is None
    model = load_model("calibration", device="cpu", scale_jpegs=True)
    assert model.min_side == model.preprocessing["jpeg_min_side"] == 128
    model.preprocessing = {"size": {"shortest_edge": 256}}
    assert model.scale_jpegs().min_side == 512
    model.preprocessing = {"size": 80}
    assert model.scale_jpegs().min_side == 160


def test_an_image_too_thin_to_be_resized_is_refused_and_a_thin_one_is_not() -> None:
    transform = ProcessorTransform(CLIPImageProcessorPil())
    with pytest.raises(
        ImageError, match=r"20000 × 1 pixels are too thin.*become 1,003,520,000 pix"
    ):
        transform(Image.new("RGB", (20_000, 1)))
    assert transform(Image.new("RGB", (1, 30), (9, 9, 9))).shape == (3, 224, 224)
    squashed = ProcessorTransform(SiglipImageProcessorPil())
    assert squashed(Image.new("RGB", (20_000, 1))).shape == (3, 224, 224)
