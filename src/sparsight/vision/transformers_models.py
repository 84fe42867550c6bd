"""Models of Hugging Face transformers, from the Hub or a local folder."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from sparsight.errors import SparsightError, UserError
from sparsight.vision.hooks import Place, touching
from sparsight.vision.model import VisionModel, used_parameters
from sparsight.vision.settings import (
    CONFIG,
    PROCESSORS,
    check_config,
    check_processor,
    own_code,
    plain_config,
    read_settings,
    reason,
    refusal_of_code,
    settings_path,
)
from sparsight.vision.thin_images import check_resized, shorter_side
from sparsight.vision.tower import Tower, find_tower

# SigLIP's text towers were trained on texts padded to the full length, without a mask.
_PADDED_WITHOUT_MASK = ("siglip",)


@dataclass(frozen=True)
class ProcessorTransform:
    """A transformers image processor as a picklable function of one picture."""

    processor: Any

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """Preprocess one RGB image.

        Raises:
            ImageError: it is so thin that resizing would blow it up; see `thin_images`.
        """
        if getattr(self.processor, "do_resize", True):
            check_resized(image, shorter_side(getattr(self.processor, "size", None)))
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels.float()


class TransformersModel(VisionModel):
    """A vision tower of transformers, with its text tower if it came with one."""

    module: transformers.PreTrainedModel

    def __init__(self, *, load_tokenizer: Callable[[], Any], has_text: bool, **rest: Any) -> None:
        self.has_text = has_text
        self._load_tokenizer = load_tokenizer  # pictures alone need none
        self._head = _projection(rest["module"])
        forward = inspect.signature(rest["tower"].module.forward)
        self._shuffles = "noise" in forward.parameters
        super().__init__(**rest)

    def _embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "rows d"]:
        tower = self._tower.module
        last: list[Tensor] = []
        with touching(Place(self._tower.blocks[-1]), last.append):
            output = tower(pixel_values=pixels, **self._in_reading_order(pixels))
        pooled = getattr(output, "pooler_output", None)
        if self._head is not None:
            return self._head(pooled)  # type: ignore[no-any-return]
        # CLIP without its projection: only its pooled CLS went through the final norm.
        one_vector = _pooling_head(self._tower) is not None or hasattr(tower, "pre_layrnorm")
        if one_vector and pooled is not None:
            return pooled  # type: ignore[no-any-return]
        states = getattr(output, "last_hidden_state", None)
        if states is None:  # a backbone gives maps of several blocks
            norm = self._tower.final_norm
            states = last[-1] if norm is None else norm(last[-1])
        return states[:, 0] if self.has_cls else states.mean(dim=1)

    def _in_reading_order(self, pixels: Tensor) -> dict[str, Tensor]:
        """What keeps the patches of a masked autoencoder in their order, for the tower."""
        if not self._shuffles:
            return {}
        rows, columns = self._tower.patches.stride
        n = (pixels.shape[-2] // int(rows)) * (pixels.shape[-1] // int(columns))
        # It keeps those of the least noise, sorted by it.
        noise = torch.arange(n, device=pixels.device, dtype=torch.float32)
        return {"noise": noise.expand(len(pixels), -1)}

    def _position_hint(self) -> str:
        ratio = getattr(self._tower.module.config, "mask_ratio", 0)
        if not ratio:
            return ""
        return f" (mask_ratio in config.json is {ratio}; set it to 0.0 to keep every patch)"

    def _tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        padded = self.family.startswith(_PADDED_WITHOUT_MASK)
        inputs = self.tokenizer(
            list(texts),
            padding="max_length" if padded else True,
            truncation=True,
            max_length=self._context_length(),
            return_tensors="pt",
        )
        keep = ("input_ids",) if padded else ("input_ids", "attention_mask")
        return {key: inputs[key] for key in keep}

    def _count_tokens(self, texts: Sequence[str]) -> list[int]:
        # A tokenizer file may bring its own cut and padding; each call says all of them.
        found = self.tokenizer(list(texts), padding=False, truncation=False, verbose=False)
        return [len(ids) for ids in found["input_ids"]]

    def _embed_tokens(self, tokens: Mapping[str, Tensor]) -> Float[Tensor, "n d_embed"]:
        encode: Any = self.module.get_text_features
        try:
            features: Any = encode(**tokens)
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"{self.id}: transformers gets no embedding of a text from its text tower "
                f"({reason(error)})."
            ) from error
        # transformers 5 gives an output object whose pooler_output is projected already.
        return features if isinstance(features, Tensor) else features.pooler_output

    def _context_length(self) -> int:
        config = getattr(self.module.config, "text_config", None)
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None:  # relative positions: what the tokenizer was made for
            limit = self.tokenizer.model_max_length
        return int(limit) - self._padded_positions

    @cached_property
    def _padded_positions(self) -> int:
        """How many positions RoBERTa and its kin leave out: they count from the padding's on."""
        inside = f"{self._tower.name}."
        for name, part in self.module.named_modules():
            if name.endswith("position_embeddings") and not name.startswith(inside):
                padding = getattr(part, "padding_idx", None)
                if isinstance(part, nn.Embedding) and padding is not None:
                    return int(padding) + 1
        return 0

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, of transformers; loaded at the first text.

        Raises:
            UserError: it could not be loaded.
        """
        return self._load_tokenizer()


def load_transformers(
    source: str,
    *,
    id: str,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None = None,
    tokenizer: str | None = None,
) -> TransformersModel:
    """Load a Hub id or local folder; see `load_model`.

    Args:
        source: the Hub id or folder to load from.
        id: the name that the model goes by.
        device: where to put it.
        dtype: of its weights.
        revision: branch, tag or commit on the Hub.
        tokenizer: folder or Hub id of another tokenizer than the model's own.
    """
    config, commit = _load_config(source, id, revision)
    revision = commit or revision
    processor = load_processor(source, id, revision)
    module, missing = _load_module(source, id, config, revision)
    spelling = (source, id, revision) if tokenizer is None else (tokenizer, id)
    return model_of(
        module,
        id=id,
        revision=revision,
        processor=processor,
        load_tokenizer=partial(load_tokenizer, *spelling),
        device=device,
        dtype=dtype,
        missing=missing,
    )


def model_of(
    module: transformers.PreTrainedModel,
    *,
    id: str,
    processor: Any,
    load_tokenizer: Callable[[], Any],
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None = None,
    missing: Collection[str] = (),
) -> TransformersModel:
    """The `VisionModel` of a module of transformers.

    Args:
        module: with a vision tower.
        id: the name that the model goes by.
        processor: its image processor, of transformers.
        load_tokenizer: gives its tokenizer; called at the first text.
        device: where to put it.
        dtype: of its weights.
        revision: commit on the Hub.
        missing: names of weights that its files lacked.
    """
    transform = ProcessorTransform(processor)
    input_shape = _input_shape(transform, id)
    tower = find_tower(module, id)
    _check_weights(module, tower, set(missing), id)
    projection = _projection(module)
    joint = [projection, *_poolers(projection, tower)]
    head = projection or _pooling_head(tower)
    return TransformersModel(
        load_tokenizer=load_tokenizer,
        id=id,
        revision=revision,
        family=_family(module.config),
        module=module,
        tower=tower,
        embedding=None if head is None else Place(head),
        projection=[weight for part in joint if part for weight in part.parameters()],
        transform=transform,
        preprocessing=_describe(processor, input_shape),
        input_shape=input_shape,
        has_text=head is not None and _has_text(module, set(missing)),
        device=device,
        dtype=dtype,
    )


def load_tokenizer(source: str, id: str, revision: str | None = None) -> Any:
    """A tokenizer of transformers; code that comes with it is not run.

    Args:
        source: folder or Hub id.
        id: the model's, for messages.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: there is none.
    """
    problem = f"{id}: it has a text tower, but its tokenizer could not be loaded"
    own_code_in = partial(_names_own_code, source, revision, ("tokenizer_config.json",))
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source, revision=revision, trust_remote_code=False
            )
    except Exception as error:  # its files may hold anything
        cause = refusal_of_code("tokenizer_config.json") if own_code_in() else reason(error)
        raise UserError(f"{problem} ({cause}).") from error
    # Without files, transformers 5 gives a tokenizer that turns every word into "unknown".
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise UserError(f"{problem} (no vocabulary found; tokenizer.json is missing).")
    return tokenizer


def _names_own_code(source: str, revision: str | None, names: Sequence[str]) -> bool:
    """Whether one of these files of a model points to code that comes with it."""
    try:
        return any(own_code(read_settings(source, name, revision)) for name in names)
    except (OSError, ValueError):
        return False


def _load_config(source: str, id: str, revision: str | None) -> tuple[Any, str | None]:
    """The model's configuration, by transformers, and the commit that it is of on the Hub."""
    values, where, commit = _read_config(source, id, revision)
    kind = _config_class(values, where)
    try:
        with quiet():
            config = kind.from_dict(plain_config(values))
    except Exception as error:  # transformers believes every field
        raise UserError(f"{where}: cannot be used ({reason(error)}).") from error
    if not any(_says_vision(part) for part in _parts(config)):
        raise UserError(
            f"{id}: not a vision model that Sparsight opens: its config.json (model_type "
            f"{config.model_type!r}) has neither vision_config nor patch_size."
        )
    return config, commit


def _read_config(
    source: str, id: str, revision: str | None
) -> tuple[dict[str, Any], str, str | None]:
    """What `config.json` holds, checked; its path; and the commit on the Hub, where it is known."""
    folder = Path(source).expanduser()
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not folder.is_dir():
        raise UserError(f"{id}: no such folder ({folder.absolute()}).")
    if folder.is_dir() and not (folder / CONFIG).is_file():
        raise UserError(
            f"{id}: the folder {folder.absolute()} holds no config.json; expected a model saved "
            "with save_pretrained."
        )
    try:
        with quiet():
            values = read_settings(source, CONFIG, revision)
            path = settings_path(source, CONFIG, revision)
        if values is None or path is None:
            raise OSError(f"{source} has no config.json")
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{id}: no model could be loaded. Tried a local folder ({folder.absolute()}) and the "
            f"Hugging Face Hub, which said: {reason(error)}"
        ) from error
    where = str(path) if folder.is_dir() else f"{id}: config.json"
    check_config(values, where)
    above = path.parent
    commit = above.name if above.parent.name == "snapshots" else None
    return values, where, commit


def _config_class(values: Mapping[str, Any], where: str) -> Any:
    """The class of transformers for a configuration: by its model_type, else its architecture."""
    model_type: str | None = values.get("model_type")
    if model_type is not None and model_type in transformers.CONFIG_MAPPING:
        return transformers.CONFIG_MAPPING[model_type]
    named = _named_class(values.get("architectures"))
    if model_type is None and named is not None:
        return named.config_class
    if model_type is None:
        raise UserError(f"{where}: has no model_type, so it is no model's of transformers.")
    version = f"transformers {transformers.__version__} does not know its model_type {model_type!r}"
    if own_code(values):
        raise UserError(f"{where}: {version}. {refusal_of_code('It')}.")
    raise UserError(f"{where}: {version}. A newer transformers may.")


def _named_class(architectures: Sequence[str] | None) -> Any:
    """The class of transformers that a configuration names; None if there is none."""
    name = (architectures or [""])[0]
    found = getattr(transformers, name, None) if name.isidentifier() else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model and getattr(found, "config_class", None) else None


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PretrainedConfig):
            yield from _parts(value)


def _says_vision(config: Any) -> bool:
    return any(hasattr(config, key) for key in ("vision_config", "patch_size", "image_size"))


def load_processor(source: str, id: str, revision: str | None = None) -> Any:
    """A model's image processor, on Pillow where transformers has it; its own code is not run.

    Pillow's resampling is what most models were trained with, and it gives the same pixels
    whether or not torchvision is installed.

    Args:
        source: folder or Hub id.
        id: the model's, for messages.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: there is none, or a field of its file has another type or cannot be true.
    """
    _check_processor_files(source, id, revision)
    last: Exception | None = None
    for options in ({"use_fast": False}, {}):
        try:
            with quiet():
                return transformers.AutoImageProcessor.from_pretrained(
                    source, revision=revision, trust_remote_code=False, **options
                )
        except Exception as error:  # its file may hold anything
            last = last or error
    assert last is not None
    own = _names_own_code(source, revision, PROCESSORS)
    cause = refusal_of_code("it") if own else reason(last)
    raise UserError(
        f"{id}: its image processor could not be loaded (preprocessor_config.json): {cause}"
    ) from last


def _check_processor_files(source: str, id: str, revision: str | None) -> None:
    local = Path(source).expanduser()
    for name in PROCESSORS:
        try:
            values = read_settings(source, name, revision)
        except UserError:
            raise
        except (OSError, ValueError):
            continue  # the library says it better, with what it tried
        if values is not None:
            where = str(local / name) if local.is_dir() else f"{id}: {name}"
            check_processor(values, where)


def _load_module(
    source: str, id: str, config: Any, revision: str | None
) -> tuple[transformers.PreTrainedModel, set[str]]:
    """The model in float32, and the names of weights that the files lack."""
    named = _named_class(getattr(config, "architectures", None))
    if named is not None and not isinstance(config, named.config_class):
        named = None
    known = type(config) in transformers.MODEL_MAPPING
    if not known and named is None:
        raise UserError(
            f"{id}: transformers has no model for its config.json (model_type "
            f"{config.model_type!r}, architectures {getattr(config, 'architectures', None)})."
        )
    # AutoModel drops the projection of a vision tower that was saved alone.
    alone = named is not None and named.__name__.endswith("WithProjection")
    loader = named if alone or not known else transformers.AutoModel
    module, missing = _from_pretrained(loader, source, id, config, revision)
    if named not in (None, loader, type(module)) and any(map(_is_projection, missing)):
        # A classifier or captioner has no joint space: its own class has no head for one.
        return _from_pretrained(named, source, id, config, revision)
    return module, missing


def _from_pretrained(
    loader: Any, source: str, id: str, config: Any, revision: str | None
) -> tuple[transformers.PreTrainedModel, set[str]]:
    try:
        with quiet():
            module, report = loader.from_pretrained(
                source,
                config=copy.deepcopy(config),
                revision=revision,
                torch_dtype=torch.float32,  # whatever the config says: no weight is rounded
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused by name in _check_weights
            )
    except UnpicklingError as error:  # torch's own text advises to run what the file brings
        raise SparsightError(
            f"{id}: its pickled weights are damaged or hold more than tensors. Code in them is not "
            "run; use weights in safetensors."
        ) from error
    except (SafetensorError, EOFError) as error:
        raise SparsightError(f"{id}: its weights are damaged ({reason(error)}).") from error
    except OSError as error:
        raise UserError(f"{id}: its weights could not be loaded ({reason(error)}).") from error
    except Exception as error:  # a config of any values goes into the constructors
        raise UserError(
            f"{id}: its config.json makes no model, or none that its weights fit ({reason(error)})."
        ) from error
    # Names with both shapes, or names alone: versions differ.
    wrong = report.get("mismatched_keys", ())
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in wrong}
    return module, set(report["missing_keys"]) | mismatched


def _is_projection(name: str) -> bool:
    return name.startswith("visual_projection")


def _check_weights(module: nn.Module, tower: Tower, missing: set[str], id: str) -> None:
    """Refuse a model of which a part that sites depend on was left at random values."""
    prefix = f"{tower.name}." if tower.name else ""
    used = {prefix + name for name, _ in used_parameters(tower)}
    projection = _projection(module)
    if projection is not None:
        used |= {name for name, _ in module.named_parameters() if _is_projection(name)}
    for pooler in _poolers(projection, tower):
        used |= {f"{prefix}pooler.{name}" for name, _ in pooler.named_parameters()}
    lost = sorted(used & missing)
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise UserError(
            f"{id}: its files lack weights of the vision tower, or have them in another shape than "
            f"config.json says ({', '.join(lost[:3])}{more})."
        )


def _input_shape(transform: ProcessorTransform, id: str) -> tuple[int, int, int]:
    """The shape of a preprocessed image, which must not depend on the image's.

    Raises:
        UserError: it does, or the image processor fails, or gives no finite numbers.
    """
    where = f"{id}: its image processor (preprocessor_config.json)"
    shapes = set()
    for size in ((640, 480), (480, 640)):
        try:
            pixels = transform(Image.new("RGB", size, (128, 128, 128)))
        except Exception as error:  # settings of any values go into it
            raise UserError(f"{where} does not work on an image ({reason(error)}).") from error
        if not bool(pixels.isfinite().all()):
            raise UserError(f"{where} makes NaN or infinity of a grey image.")
        shapes.add(tuple(pixels.shape))
    shape = shapes.pop()
    if shapes or len(shape) != 3 or shape[0] != 3:
        found = " and ".join(str(list(s)) for s in sorted({shape, *shapes}))
        raise UserError(
            f"{where} gives {found} for a wide and a tall image; Sparsight needs "
            "[3, height, width], the same for every image (no NaFlex, no free aspect ratio: set a "
            "crop_size or a height and width in that file)."
        )
    return (shape[0], shape[1], shape[2])


def _projection(module: nn.Module) -> nn.Module | None:
    """The head of the joint space; GIT calls what feeds its language model the same."""
    found = getattr(module, "visual_projection", None)
    joint = isinstance(found, nn.Linear) or hasattr(module, "text_projection")
    return found if joint else None


def _poolers(projection: nn.Module | None, tower: Tower) -> list[nn.Module]:
    """What the joint embedding depends on between the tower's blocks and the projection."""
    pooler = getattr(tower.module, "pooler", None)
    return [pooler] if projection is not None and isinstance(pooler, nn.Module) else []


def _pooling_head(tower: Tower) -> nn.Module | None:
    """SigLIP's attention pooling, whose output is the joint embedding."""
    head = getattr(tower.module, "head", None)
    return head if isinstance(head, nn.Module) and hasattr(head, "probe") else None


def _has_text(module: nn.Module, missing: set[str]) -> bool:
    """Whether texts come into the space of images; BLIP-2's text features are no vectors."""
    whole = hasattr(module, "get_text_features") and hasattr(module, "logit_scale")
    return whole and not any(
        name.startswith(("text_model.", "text_projection.", "logit_scale")) for name in missing
    )


def _family(config: Any) -> str:
    return str(config.model_type).removesuffix("_model").removesuffix("_vision")


def _describe(processor: Any, input_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What the processor does, as JSON, the same from every version of transformers."""
    name = type(processor).__name__
    backend = getattr(processor, "backend", "torchvision" if name.endswith("Fast") else "pil")
    settings = {
        key: value
        for key, value in json.loads(processor.to_json_string()).items()
        if value is not None
        and not key.startswith("_")
        and key not in ("image_processor_type", "processor_class")
    }
    return {
        "library": "transformers",
        "processor": name.removesuffix("Fast").removesuffix("Pil"),
        "backend": backend,
        "input_shape": list(input_shape),
        **dict(sorted(settings.items())),
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' notes on missing poolers and torchvision while loading.

    What matters in them is checked and told by Sparsight itself. Bars of downloads stay.
    """
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    download_bars = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if download_bars:
        enable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if not download_bars:
            disable_progress_bars()
