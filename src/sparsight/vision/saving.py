"""`save_model`: write a model as other programs read it, and check the files by reading them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsight.errors import SparsightError, UserError
from sparsight.files import read_json, write_json
from sparsight.folders import new_file, new_folder
from sparsight.redaction import without_folders
from sparsight.vision.byte_pairs import from_open_clip, is_standard
from sparsight.vision.clip_shape import (
    ClipShape,
    open_clip_config,
    shape_of_open_clip,
    shape_of_transformers,
    transformers_config,
)
from sparsight.vision.layouts import (
    KEPT_POSITIONS,
    RES,
    gmp_parts,
    is_gmp,
    is_huggingface,
    is_openai,
    plain,
    to_huggingface,
    to_openai,
)
from sparsight.vision.load import load_model
from sparsight.vision.model import VisionModel
from sparsight.vision.open_clip_models import OpenClipModel, import_open_clip
from sparsight.vision.openai_files import METADATA, image_processor, load_openai
from sparsight.vision.transformers_files import quiet
from sparsight.vision.transformers_models import ProcessorTransform, TransformersModel

Layout = Literal["huggingface", "openai", "open_clip"]

WEIGHTS = "model.safetensors"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
OPEN_CLIP_CONFIG = "open_clip_config.json"

TEXTS = (
    "a photo of a cat",
    "an anchor",
    "the words on the sign say umbrella, and below it stands a small red house with 2 windows",
)
"""Texts on which a model is compared with its saved copy, besides noise images and a long text."""

FILES = (".safetensors", ".pt")
"""How the names of single files end."""

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_PLACES = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
"""Fields in which libraries record where a model, processor or tokenizer was loaded from."""

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative difference of embeddings, by the narrower dtype of the two."""


@dataclass(frozen=True)
class SavedModel:
    """A model on disk.

    Attributes:
        path: the folder or file.
        loads_as: the id by which `load_model` loads it.
        difference: ‖e − e'‖ / ‖e‖ between the embeddings of the model and those of its saved copy;
            the larger of the values for images and texts.
        notes: settings that other programs need and the layout cannot say.
    """

    path: Path
    loads_as: str
    difference: float
    notes: tuple[str, ...] = ()


def save_model(
    model: VisionModel,
    out: str | Path,
    layout: Layout = "huggingface",
    *,
    dtype: torch.dtype | None = None,
    gmp: bool = False,
) -> Path:
    """Write a model; see `write_model`.

    Returns:
        The folder or file.
    """
    return write_model(model, out, layout, dtype=dtype, gmp=gmp).path


def write_model(
    model: VisionModel,
    out: str | Path,
    layout: Layout = "huggingface",
    *,
    dtype: torch.dtype | None = None,
    gmp: bool = False,
    long: bool = False,
) -> SavedModel:
    """Write a model, read it back and compare the two; the result gets its name only then.

    - `huggingface`: a folder that `transformers.CLIPModel.from_pretrained` and
      `transformers.CLIPProcessor.from_pretrained` load by themselves. Models of `transformers`
      other than CLIP only have this layout.
    - `openai`: a state dict with the names of OpenAI's code: a folder with `model.safetensors`,
      tokenizer and image processor; or one file, if `out` ends with `.safetensors` or `.pt`.
    - `open_clip`: a folder that `open_clip.create_model("local-dir:FOLDER")` loads by itself.

    Weights that were split for training (geometric parametrisation, Long-CLIP's tables) are
    merged, unless `gmp` or `long` is set.

    Args:
        model: any model of `transformers`, or a CLIP with open_clip's own towers.
        out: folder, new or empty; or a new file.
        layout: the library whose layout is written.
        dtype: dtype of the weights on disk; default: that of the model.
        gmp: write the MLPs in the geometric parametrisation; `openai` only.
        long: write Long-CLIP's two tables of positions; `openai` only.

    Raises:
        UserError: the layout cannot express the model, or `out` exists.
        MissingExtra: the layout is `open_clip`, which is not installed.
        SparsightError: it could not be written, or the saved copy differs.
    """
    out = Path(out)
    if layout not in get_args(Layout):
        raise UserError(f"Unknown layout={layout!r}. Choose one of: {', '.join(get_args(Layout))}.")
    if (gmp or long) and layout != "openai":
        asked = "gmp" if gmp else "long"
        raise UserError(
            f"{asked}: only the openai layout can store this form; {layout} stores plain weights."
        )
    if out.suffix in FILES and layout != "openai":
        raise UserError(
            f"{out}: the {layout} layout is a folder; only the openai layout can be a single file."
        )
    if layout == "open_clip":
        import_open_clip()
    kind = dtype or model.dtype
    notes: tuple[str, ...] = ()
    parts = None if layout == "huggingface" and _other_architecture(model) else _parts(model)
    with _place(out) as place, quiet():
        if parts is None:
            assert isinstance(model, TransformersModel)
            _save_pretrained(model, place, kind)
        elif layout == "huggingface":
            _write_huggingface(parts, place, kind)
        elif layout == "open_clip":
            _write_open_clip(parts, place, kind)
        else:
            notes = _write_openai(parts, place, kind, gmp=gmp, long=long)
        _forget_places(place)
        difference = _difference(model, _read_back(parts, model, place, layout))
        if not difference <= max(_TOLERANCE[kind], _TOLERANCE[model.dtype]):
            raise SparsightError(
                f"{out}: not written. The embeddings of the saved copy differ by "
                f"{difference:.1e} from those of {model.id}. Please report this."
            )
    loads_as = f"open_clip:local-dir:{out}" if layout == "open_clip" else str(out)
    return SavedModel(out, loads_as, difference, notes)


@dataclass(frozen=True)
class _Parts:
    """A CLIP, independent of any library."""

    id: str
    state: dict[str, Tensor]
    """Plain weights in OpenAI's layout."""
    shape: ClipShape
    processor: Any
    tokenizer: Any
    config: Any
    """The configuration in `transformers`, if the model has one."""
    kept: int
    """How many positions Long-CLIP keeps, if there are two tables."""


def _parts(model: VisionModel) -> _Parts:
    found = {key: value.detach().cpu() for key, value in model.module.state_dict().items()}
    kept = kept_positions(model.module)
    if isinstance(model, TransformersModel) and not _other_architecture(model):
        state = to_openai(plain(found, kept))
        config = copy.deepcopy(model.module.config)
        shape = shape_of_transformers(config)
        tokenizer = model.tokenizer
    elif isinstance(model, OpenClipModel):
        renamed = {key.removeprefix("text."): value for key, value in found.items()}
        if not is_openai(renamed):
            raise UserError(
                f"{model.id}: its towers are not open_clip's own, so CLIP's layouts cannot express "
                "it."
            )
        # There and back: a weight that no CLIP has is refused by name.
        state, config = to_openai(to_huggingface(plain(renamed, kept))), None
        shape = shape_of_open_clip(model.module, state, model.id)
        tokenizer = from_open_clip(model.tokenizer, shape.context_length)
    else:
        raise UserError(
            f"{model.id} ({model.family}) is not a CLIP; only the huggingface layout can store it."
        )
    if shape.context_length != len(state["positional_embedding"]):
        raise SparsightError(
            f"{model.id}: claims {shape.context_length} positions for texts, but has "
            f"{len(state['positional_embedding'])}."
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = shape.context_length
    state["logit_scale"] = state["logit_scale"].reshape(())
    return _Parts(model.id, state, shape, _processor(model), tokenizer, config, kept)


def kept_positions(module: nn.Module) -> int:
    """Return how many positions of a text tower with Long-CLIP's two tables are kept."""
    found = (getattr(each, "kept_positions", None) for each in module.modules())
    return next((kept for kept in found if kept is not None), KEPT_POSITIONS)


def _other_architecture(model: VisionModel) -> bool:
    if not isinstance(model, TransformersModel):
        return False
    # Relatives of CLIP have its names, but work differently.
    return model.family != "clip" or not is_huggingface(model.module.state_dict())


def _processor(model: VisionModel) -> Any:
    if isinstance(model.transform, ProcessorTransform):
        return model.transform.processor
    given = model.preprocessing
    size = given["size"]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    mode = given.get("resize_mode", "shortest")
    if sides[0] != sides[1] or mode not in ("shortest", "squash"):
        raise UserError(
            f"{model.id}: its images are resized by {mode!r} to {sides}, which CLIP's image "
            "processor cannot do."
        )
    side = {"height": sides[0], "width": sides[1]}
    return image_processor(
        sides[0],
        image_mean=list(given["mean"]),
        image_std=list(given["std"]),
        resample=int(_RESAMPLING[given.get("interpolation", "bicubic")]),
        **({"size": side} if mode == "squash" else {}),
    )


def _open_clip_preprocessing(processor: Any, id: str) -> dict[str, Any]:
    """Translate an image processor into open_clip's settings.

    Raises:
        UserError: open_clip cannot do what it does.
    """
    said = processor.to_dict()
    size, crop = dict(said["size"]), dict(said.get("crop_size") or said["size"])
    sides = {crop.get("height"), crop.get("width")}
    squashed = size == crop
    names = {int(value): name for name, value in _RESAMPLING.items()}
    expressible = (
        len(sides) == 1
        and (squashed or {size.get("shortest_edge")} == sides)
        and int(said["resample"]) in names
        and all(said.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize"))
        and abs(said.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-6
    )
    if not expressible:
        raise UserError(
            f"{id}: open_clip's preprocessing cannot do what this image processor does (resize to "
            f"{size}, crop to {crop}, filter {said['resample']})."
        )
    return {
        "size": sides.pop(),
        "mode": "RGB",
        "mean": list(said["image_mean"]),
        "std": list(said["image_std"]),
        "interpolation": names[int(said["resample"])],
        "resize_mode": "squash" if squashed else "shortest",
    }


def _write_huggingface(parts: _Parts, folder: Path, dtype: torch.dtype) -> None:
    tokenizer = parts.tokenizer
    config = parts.config
    if config is None:
        ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = transformers_config(
            parts.shape,
            end=tokenizer.eos_token_id,
            **{name: value for name, value in ids.items() if value is not None},
        )
    config.architectures = ["CLIPModel"]
    config.dtype = dtype
    config.save_pretrained(folder)
    save_file(
        _cast(to_huggingface(parts.state), dtype), folder / WEIGHTS, metadata={"format": "pt"}
    )
    _write_tools(parts, folder)


def _write_openai(
    parts: _Parts, place: Path, dtype: torch.dtype, *, gmp: bool, long: bool
) -> tuple[str, ...]:
    state = dict(parts.state)
    notes = parts.shape.surprises()
    if long:
        state[RES] = state["positional_embedding"].clone()
    if gmp:
        state = _in_gmp(state)
    state = _cast(state, dtype)
    if place.is_dir():
        _write_tools(parts, place)
        place = place / WEIGHTS
    if place.suffix == ".safetensors":
        said = {
            "layout": "openai",
            "clip": parts.shape.to_json(),
            "kept_positions": parts.kept,
            "processor": _settings(parts.processor),
        }
        save_file(state, place, metadata={"format": "pt", METADATA: json.dumps(said)})
    else:
        if notes:
            raise UserError(
                f"{parts.id}: differs from OpenAI's CLIPs, which a .pt file cannot record: "
                f"{'; '.join(notes)}. Write .safetensors, whose metadata can, or another layout."
            )
        with place.open("wb") as file:
            torch.save(state, file)
    return tuple(notes)


def _write_open_clip(parts: _Parts, folder: Path, dtype: torch.dtype) -> None:
    config = open_clip_config(parts.shape, parts.id)
    if not is_standard(parts.tokenizer):
        # Any name makes open_clip use the tokenizer in the folder.
        config["text_cfg"]["hf_tokenizer_name"] = "tokenizer"
    found = {
        "model_cfg": config,
        "preprocess_cfg": _open_clip_preprocessing(parts.processor, parts.id),
    }
    write_json(folder / OPEN_CLIP_CONFIG, found)
    save_file(_cast(parts.state, dtype), folder / OPEN_CLIP_WEIGHTS, metadata={"format": "pt"})
    parts.tokenizer.save_pretrained(folder)


def _write_tools(parts: _Parts, folder: Path) -> None:
    parts.tokenizer.save_pretrained(folder)
    parts.processor.save_pretrained(folder)


def _save_pretrained(model: TransformersModel, folder: Path, dtype: torch.dtype) -> None:
    module: Any = model.module
    if dtype != model.dtype:
        module = copy.deepcopy(module).to(dtype=dtype)
    found = module.state_dict()
    module.save_pretrained(folder, state_dict=plain(found) if is_gmp(found) else None)
    _processor(model).save_pretrained(folder)
    if model.has_text:
        model.tokenizer.save_pretrained(folder)


def _settings(processor: Any) -> dict[str, Any]:
    """Return the image processor's settings as its constructor takes them."""
    kept = ("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor")
    said = json.loads(processor.to_json_string())
    flags = {key: value for key, value in said.items() if key.startswith("do_")}
    return {**flags, **{key: said[key] for key in kept if said.get(key) is not None}}


def _in_gmp(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        base = key.removesuffix(".weight")
        if base != key and base.endswith((".c_fc", ".c_proj")):
            found[f"{base}.r"], found[f"{base}.theta"] = gmp_parts(value)
        else:
            found[key] = value
    return found


def _forget_places(folder: Path) -> None:
    """Remove the folders of this machine in which the model lay from its configurations."""
    for path in folder.glob("*config.json"):
        said = read_json(path)
        known = _without_places(said)
        if known != said:
            write_json(path, known)


def _without_places(said: Any) -> Any:
    if isinstance(said, list):
        return [_without_places(each) for each in said]
    if not isinstance(said, dict):
        return said
    return {
        key: without_folders(value)
        if key in _PLACES and isinstance(value, str)
        else _without_places(value)
        for key, value in said.items()
    }


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype).contiguous() for key, value in state.items()}


@contextmanager
def _place(out: Path) -> Iterator[Path]:
    """Give a temporary folder or file next to `out`; it gets its name on success."""
    with new_file(out) if out.suffix in FILES else new_folder(out) as place:
        try:
            yield place
        except SafetensorError as error:
            raise SparsightError(f"{out}: could not be written ({error}).") from error


def _read_back(
    parts: _Parts | None, model: VisionModel, place: Path, layout: Layout
) -> VisionModel:
    if place.is_file() and parts is not None:
        return load_openai(
            place,
            id=str(place),
            device=model.device,
            dtype=model.dtype,
            tokenizer=lambda: parts.tokenizer,
        )
    prefix = "open_clip:local-dir:" if layout == "open_clip" else ""
    return load_model(f"{prefix}{place}", device=model.device, dtype=model.dtype)


@torch.no_grad()
def _difference(one: VisionModel, other: VisionModel) -> float:
    """Return the largest relative difference in embeddings of images and texts and in the scale.

    One of the texts fills every position.
    """
    training = one.module.training
    one.module.eval()
    try:
        pixels = torch.randn((4, *one.input_shape), generator=torch.Generator().manual_seed(0))
        pairs = [(one.embed_images(pixels), other.embed_images(pixels))]
        if one.has_text:
            texts = [*TEXTS, "a photo of a cat " * one.context_length]
            pairs.append((one.embed_texts(texts), other.embed_texts(texts)))
            pairs.append((torch.tensor(one.logit_scale), torch.tensor(other.logit_scale)))
    finally:
        one.module.train(training)
    return max(float((x - y).norm() / x.norm().clamp(min=1e-30)) for x, y in pairs)
