"""Models of Hugging Face transformers; `transformers_files` loads them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from sparsight.errors import UserError
from sparsight.vision.hooks import Place, touching
from sparsight.vision.model import VisionModel, used_parameters
from sparsight.vision.settings import reason
from sparsight.vision.thin_images import check_resized, shorter_side
from sparsight.vision.tower import Tower, find_tower

# SigLIP's text towers were trained without a mask, on texts padded to the full length.
_PADDED_WITHOUT_MASK = ("siglip",)


@dataclass(frozen=True)
class ProcessorTransform:
    """An image processor of transformers as a picklable function of one image."""

    processor: Any

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """Preprocess one RGB image.

        Raises:
            ImageError: it is so thin that resizing would make it huge; see `thin_images`.
        """
        if getattr(self.processor, "do_resize", True):
            check_resized(image, shorter_side(getattr(self.processor, "size", None)))
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels.float()


class TransformersModel(VisionModel):
    """A vision tower of transformers, with its text tower if it has one."""

    module: transformers.PreTrainedModel

    def __init__(self, *, load_tokenizer: Callable[[], Any], has_text: bool, **rest: Any) -> None:
        self.has_text = has_text
        self._load_tokenizer = load_tokenizer  # images need none
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
        # A CLIP without its projection: only its pooled CLS went through the final norm.
        one_vector = _pooling_head(self._tower) is not None or hasattr(tower, "pre_layrnorm")
        if one_vector and pooled is not None:
            return pooled  # type: ignore[no-any-return]
        states = getattr(output, "last_hidden_state", None)
        if states is None:  # a backbone returns maps of several blocks
            norm = self._tower.final_norm
            states = last[-1] if norm is None else norm(last[-1])
        return states[:, 0] if self.has_cls else states.mean(dim=1)

    def _in_reading_order(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return arguments for the tower that keep a masked autoencoder's patches in order."""
        if not self._shuffles:
            return {}
        rows, columns = self._tower.patches.stride
        n = (pixels.shape[-2] // int(rows)) * (pixels.shape[-1] // int(columns))
        # The autoencoder keeps the patches with the least noise, sorted by it.
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
        # A tokenizer file may set its own truncation and padding: each call sets all of them.
        found = self.tokenizer(list(texts), padding=False, truncation=False, verbose=False)
        return [len(ids) for ids in found["input_ids"]]

    def _embed_tokens(self, tokens: Mapping[str, Tensor]) -> Float[Tensor, "n d_embed"]:
        encode: Any = self.module.get_text_features
        try:
            features: Any = encode(**tokens)
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"{self.id}: transformers cannot get text embeddings from its text tower "
                f"({reason(error)})."
            ) from error
        # transformers 5 returns an output object whose pooler_output is already projected.
        return features if isinstance(features, Tensor) else features.pooler_output

    def _context_length(self) -> int:
        config = getattr(self.module.config, "text_config", None)
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None:  # relative positions: the length that the tokenizer was made for
            limit = self.tokenizer.model_max_length
        return int(limit) - self._padded_positions

    @cached_property
    def _padded_positions(self) -> int:
        """The number of positions that RoBERTa and its relatives skip: they count from padding."""
        inside = f"{self._tower.name}."
        for name, part in self.module.named_modules():
            if name.endswith("position_embeddings") and not name.startswith(inside):
                padding = getattr(part, "padding_idx", None)
                if isinstance(part, nn.Embedding) and padding is not None:
                    return int(padding) + 1
        return 0

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, from transformers; loaded at the first text.

        Raises:
            UserError: it could not be loaded.
        """
        return self._load_tokenizer()


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
    """Build the `VisionModel` for a module of transformers.

    Args:
        module: a module with a vision tower.
        id: the model's name.
        processor: its image processor, from transformers.
        load_tokenizer: returns its tokenizer; called at the first text.
        device: where to put the model.
        dtype: dtype of its weights.
        revision: commit on the Hub.
        missing: names of weights that its files lack.
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


def _check_weights(module: nn.Module, tower: Tower, missing: set[str], id: str) -> None:
    """Refuse a model if a part that sites depend on was left at random values."""
    prefix = f"{tower.name}." if tower.name else ""
    used = {prefix + name for name, _ in used_parameters(tower)}
    projection = _projection(module)
    if projection is not None:
        used |= {name for name, _ in module.named_parameters() if is_projection(name)}
    for pooler in _poolers(projection, tower):
        used |= {f"{prefix}pooler.{name}" for name, _ in pooler.named_parameters()}
    lost = sorted(used & missing)
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise UserError(
            f"{id}: weights of the vision tower are missing from its files, or their shape differs "
            f"from that in config.json ({', '.join(lost[:3])}{more})."
        )


def _input_shape(transform: ProcessorTransform, id: str) -> tuple[int, int, int]:
    """Find the shape of a preprocessed image, which must not depend on that of the image.

    Raises:
        UserError: it does, or the image processor fails or gives NaN or infinity.
    """
    where = f"{id}: its image processor (preprocessor_config.json)"
    shapes = set()
    for size in ((640, 480), (480, 640)):
        try:
            pixels = transform(Image.new("RGB", size, (128, 128, 128)))
        except Exception as error:  # its settings may have any values
            raise UserError(f"{where} fails on an image ({reason(error)}).") from error
        if not bool(pixels.isfinite().all()):
            raise UserError(f"{where} turns a grey image into NaN or infinity.")
        shapes.add(tuple(pixels.shape))
    shape = shapes.pop()
    if shapes or len(shape) != 3 or shape[0] != 3:
        found = " and ".join(str(list(s)) for s in sorted({shape, *shapes}))
        raise UserError(
            f"{where} gives {found} for a wide and a tall image; Sparsight needs "
            "[3, height, width], the same for every image (no NaFlex, no free aspect ratio: set "
            "crop_size, or height and width, in that file)."
        )
    return (shape[0], shape[1], shape[2])


def is_projection(name: str) -> bool:
    """Return whether a weight belongs to the map from images into the joint space."""
    return name.startswith("visual_projection")


def _projection(module: nn.Module) -> nn.Module | None:
    """Return the head of the joint space; GIT uses its name for a map into its language model."""
    found = getattr(module, "visual_projection", None)
    joint = isinstance(found, nn.Linear) or hasattr(module, "text_projection")
    return found if joint else None


def _poolers(projection: nn.Module | None, tower: Tower) -> list[nn.Module]:
    """Return the modules between the tower's blocks and the projection."""
    pooler = getattr(tower.module, "pooler", None)
    return [pooler] if projection is not None and isinstance(pooler, nn.Module) else []


def _pooling_head(tower: Tower) -> nn.Module | None:
    """Return SigLIP's attention pooling, whose output is the joint embedding."""
    head = getattr(tower.module, "head", None)
    return head if isinstance(head, nn.Module) and hasattr(head, "probe") else None


def _has_text(module: nn.Module, missing: set[str]) -> bool:
    """Return whether texts share the space of images; BLIP-2's text features are not vectors."""
    whole = hasattr(module, "get_text_features") and hasattr(module, "logit_scale")
    return whole and not any(
        name.startswith(("text_model.", "text_projection.", "logit_scale")) for name in missing
    )


def _family(config: Any) -> str:
    return str(config.model_type).removesuffix("_model").removesuffix("_vision")


def _describe(processor: Any, input_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Describe the processor as JSON, the same for every version of transformers."""
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
