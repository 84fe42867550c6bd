"""Models of open_clip (the extra `open-clip`)."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from sparsight.errors import MissingExtra, SparsightError, UserError
from sparsight.vision.hooks import Place
from sparsight.vision.model import VisionModel
from sparsight.vision.settings import no_code_of_models, reason
from sparsight.vision.thin_images import check_resized
from sparsight.vision.tower import find_tower

PREFIX = "open_clip:"
# open_clip resolves names with these prefixes itself, including the weights.
_SCHEMAS = ("hf-hub:", "local-dir:")


class OpenClipModel(VisionModel):
    """A CLIP from open_clip; its vision tower may be open_clip's own or timm's."""

    def __init__(self, *, name: str, **rest: Any) -> None:
        self.has_text = True
        self._name = name
        super().__init__(**rest)

    def _embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "rows d"]:
        return self.module.encode_image(pixels)  # type: ignore[operator, no-any-return]

    def _tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"input_ids": self.tokenizer(list(texts), context_length=self._context_length())}

    def _count_tokens(self, texts: Sequence[str]) -> list[int]:
        tokenizer = self.tokenizer
        if hasattr(tokenizer, "tokenizer"):  # one of transformers, in open_clip's wrapper
            cleaned = [tokenizer.clean_fn(text) for text in texts]
            return [len(ids) for ids in tokenizer.tokenizer(cleaned, verbose=False)["input_ids"]]
        return [len(tokenizer.encode(text)) + 2 for text in texts]

    def _embed_tokens(self, tokens: Mapping[str, Tensor]) -> Float[Tensor, "n d_embed"]:
        return self.module.encode_text(tokens["input_ids"])  # type: ignore[operator, no-any-return]

    def _context_length(self) -> int:
        return int(self.module.context_length)  # type: ignore[arg-type]

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer for the model's name.

        Raises:
            UserError: it could not be loaded.
        """
        try:
            with no_code_of_models():
                return import_open_clip().get_tokenizer(self._name)
        except MissingExtra:
            raise
        except Exception as error:  # its files may hold anything
            raise UserError(
                f"{self.id}: open_clip could not load its tokenizer ({reason(error)})."
            ) from error


def load_open_clip(id: str, *, device: torch.device, dtype: torch.dtype) -> OpenClipModel:
    """Load `open_clip:NAME/PRETRAINED`; see `load_model`.

    Raises:
        MissingExtra: open_clip is not installed.
        UserError: open_clip does not know the model or the weights.
        SparsightError: the weights are damaged or belong to another model.
    """
    open_clip = import_open_clip()
    name, pretrained = _parse(id, open_clip)
    try:
        with no_code_of_models():
            module = open_clip.create_model(
                name, pretrained=pretrained, device="cpu", require_pretrained=True
            )
    except UserError as error:
        raise UserError(f"{id}: {error}.") from error
    except (SafetensorError, EOFError) as error:
        raise SparsightError(f"{id}: its weights are damaged ({error}).") from error
    except UnpicklingError as error:  # torch's own message advises running the file's code
        raise SparsightError(
            f"{id}: its pickled weights are damaged or hold more than tensors. Sparsight does not "
            "run code in weights."
        ) from error
    except Exception as error:
        raise UserError(f"{id}: open_clip could not load it ({error}).") from error
    tower = find_tower(module, id)
    settings = open_clip.get_model_preprocess_cfg(module)
    transform = _transform(settings)
    inside = set(map(_identity, tower.module.parameters()))
    return OpenClipModel(
        id=id,
        name=name,
        revision=None,
        family="open_clip",
        module=module,
        tower=tower,
        embedding=Place(module.visual),
        projection=[p for p in module.visual.parameters() if _identity(p) not in inside],
        transform=transform,
        preprocessing={
            "library": "open_clip",
            **{key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()},
        },
        input_shape=_shape(transform),
        device=device,
        dtype=dtype,
    )


def import_open_clip() -> Any:
    """Import open_clip.

    Raises:
        MissingExtra: it is not installed.
        UserError: it cannot be imported.
    """
    try:
        return importlib.import_module("open_clip")
    except ModuleNotFoundError as error:
        if error.name == "open_clip":
            raise MissingExtra("open_clip", "open-clip") from None
        raise UserError(f"open_clip is installed, but cannot be imported ({error}).") from error
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"open_clip is installed, but cannot be imported ({error}). torch and torchvision must "
            "be builds that belong together."
        ) from error


def _parse(id: str, open_clip: Any) -> tuple[str, str | None]:
    """Split an id into name and pretrained tag (or checkpoint path)."""
    rest = id.removeprefix(PREFIX)
    if rest.startswith(_SCHEMAS):
        return rest, None
    name, _, pretrained = rest.partition("/")
    known = open_clip.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"{id}: open_clip has no model {name!r}.{hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags or (pretrained and Path(pretrained).is_file()):
        return name, pretrained
    raise UserError(
        f"{id}: {pretrained!r} is neither a tag of weights that open_clip has for {name} nor a "
        f"file. Tags: {', '.join(tags) or 'none'}."
    )


@dataclass(frozen=True)
class OpenClipTransform:
    """open_clip's own preprocessing for inference, as a picklable function of one image."""

    compose: Any
    side: int | None

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """Preprocess one RGB image.

        Raises:
            ImageError: it is so thin that resizing would make it huge; see `thin_images`.
        """
        check_resized(image, self.side)
        return self.compose(image)  # type: ignore[no-any-return]


def _transform(settings: dict[str, Any]) -> OpenClipTransform:
    transform = importlib.import_module("open_clip.transform")
    compose = transform.image_transform_v2(transform.PreprocessCfg(**settings), is_train=False)
    size = settings["size"]
    squashed = settings.get("resize_mode", "shortest") != "shortest"
    return OpenClipTransform(
        compose, None if squashed else size if isinstance(size, int) else max(size)
    )


def _shape(transform: Any) -> tuple[int, int, int]:
    channels, height, width = transform(Image.new("RGB", (640, 480))).shape
    return (channels, height, width)


def _identity(tensor: Tensor) -> int:
    return id(tensor)
