"""CLIPs in one file: OpenAI's layout, plain or split for training (`layouts`).

Such a file holds only weights. Everything else comes from files next to it or, if Sparsight wrote
it, from its metadata; otherwise it is as in OpenAI's own CLIPs.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.pickles import CLASS, tensors_of
from sparsight.reading import read_torch
from sparsight.tensor_files import read_safetensors, safetensors_metadata
from sparsight.vision.byte_pairs import standard_tokenizer
from sparsight.vision.clip_shape import (
    STANDARD_VOCABULARY,
    ClipShape,
    shape_of_weights,
    transformers_config,
)
from sparsight.vision.layouts import (
    KEPT_POSITIONS,
    is_huggingface,
    is_openai,
    plain,
    to_huggingface,
    to_openai,
)
from sparsight.vision.transformers_files import load_tokenizer
from sparsight.vision.transformers_models import TransformersModel, model_of

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
METADATA = "sparsight"
"""The key under which Sparsight writes into a safetensors file's metadata."""

_WRAPPERS = ("state_dict", "model_state_dict", "model", "ema")
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)*(?:text\.(?=\w))?")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def load_openai(
    path: Path,
    *,
    id: str,
    device: torch.device,
    dtype: torch.dtype,
    tokenizer: str | Callable[[], Any] | None = None,
    heads: tuple[int, int] | None = None,
) -> TransformersModel:
    """Load a CLIP from one file; see `load_model`.

    Args:
        path: safetensors, or what `torch.save` wrote: a state dict, or a whole module, of which
            only the tensors are read. Pickled code is never run.
        id: the model's name.
        device: where to put the model.
        dtype: dtype of its weights.
        tokenizer: folder or Hub id, or a function that returns it; default: the tokenizer next to
            the file, or OpenAI's if the vocabulary has its size.
        heads: heads of the vision and of the text tower; default: as the file says, or width / 64.

    Raises:
        UserError: the file does not hold such a CLIP.
        SparsightError: the file is damaged.
    """
    state, said = read_clip(path)
    with _damage(path):
        stated = dict(said.get("clip") or {})
        for part, count in zip(("vision", "text"), heads or (), strict=False):
            stated[part] = {**(stated.get(part) or {}), "heads": count}
        shape = shape_of_weights(state, stated, str(path))
        return clip_model(
            state,
            shape,
            id=id,
            processor=_processor(path, shape, said.get("processor")),
            load_tokenizer=_tokenizer(path, shape, tokenizer),
            device=device,
            dtype=dtype,
        )


def clip_model(
    state: Mapping[str, Tensor],
    shape: ClipShape,
    *,
    id: str,
    processor: Any,
    load_tokenizer: Callable[[], Any],
    device: torch.device,
    dtype: torch.dtype,
) -> TransformersModel:
    """Build a `transformers.CLIPModel` from weights in OpenAI's layout, with its tools.

    Raises:
        SparsightError: the weights do not fit the shape.
    """
    from transformers import CLIPModel

    with torch.device("meta"):  # drawing random weights, soon replaced, would take longest
        module = CLIPModel(transformers_config(shape))
    try:
        module.load_state_dict(to_huggingface(state), assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise SparsightError(f"{id}: its weights do not fit together ({lines[0]}).") from error
    for part in (module.text_model.embeddings, module.vision_model.embeddings):
        part.position_ids = torch.arange(part.position_ids.shape[-1]).expand((1, -1))
    return model_of(
        module,
        id=id,
        processor=processor,
        load_tokenizer=load_tokenizer,
        device=device,
        dtype=dtype,
    )


def read_clip(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the plain weights in a file, in OpenAI's layout, and Sparsight's metadata.

    Raises:
        UserError: the file holds no CLIP with a vision transformer, or a TorchScript program.
        SparsightError: the file is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: this file does not exist.")
    said: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        found: Any = read_safetensors(path)
        said = _said(path)
    else:
        _refuse_program(path)
        found = read_torch(path)
    state = _state(found)
    try:
        with _damage(path):
            if is_huggingface(state):
                state = to_openai(state)
            if is_openai(state):
                return plain(state, int(said.get("kept_positions", KEPT_POSITIONS))), said
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    raise UserError(f"{path}: {_what(state)} {_EXPECTED}")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Blame the file for errors: it may hold tensors and settings of any shape and kind."""
    try:
        yield
    except SparsightError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no reason given'}"
        raise SparsightError(
            f"{path}: its weights, or what it says about them, do not fit together ({reason})."
        ) from e


_EXPECTED = (
    "From single files, Sparsight reads CLIPs with a vision transformer, in OpenAI's or Hugging "
    "Face's layout; load any other model from its folder or Hub id."
)


def _state(found: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict or a pickled module, even if something wraps it."""
    for _ in range(3):
        if not isinstance(found, dict):
            return {}
        if CLASS in found:
            found = tensors_of(found)
        inner = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), dict)), None)
        if inner is None:
            break
        found = inner
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    return {_PREFIXES.sub("", key): value for key, value in tensors.items()}


def _what(state: Mapping[str, Tensor]) -> str:
    if not state:
        return "holds no named tensors."
    if any(key.startswith("visual.layer1.") for key in state):
        return "is a CLIP whose vision tower is a ResNet."
    names = ", ".join(list(state)[:3])
    return f"its {len(state)} tensors ({names}, …) are not those of a CLIP."


def _said(path: Path) -> dict[str, Any]:
    text = safetensors_metadata(path).get(METADATA, "{}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SparsightError(f"{path}: its metadata cannot be read ({error}).") from error
    return found if isinstance(found, dict) else {}


def _refuse_program(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            program = any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return
    if program:
        raise UserError(
            f"{path}: is a TorchScript program, the form in which OpenAI published its CLIPs. "
            "Sparsight does not run code in files. Load the same weights from the Hub "
            "(openai/clip-vit-base-patch32, openai/clip-vit-large-patch14, …), or save "
            "torch.jit.load(...).state_dict() to a file of its own."
        )


def _processor(path: Path, shape: ClipShape, said: Any) -> Any:
    from sparsight.vision.transformers_files import load_processor

    if (path.parent / "preprocessor_config.json").is_file():
        return load_processor(str(path.parent), str(path))
    return image_processor(shape.image_size, **(said if isinstance(said, dict) else {}))


def image_processor(image_size: int, **settings: Any) -> Any:
    """Return CLIP's image processor, on Pillow: it resizes the shorter side and crops the centre.

    Args:
        image_size: side of the model's input.
        settings: settings that differ from OpenAI's, by their names in `transformers`.
    """
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    size = {"shortest_edge": image_size}
    crop = {"height": image_size, "width": image_size}
    return kind(**{"size": size, "crop_size": crop, **settings})


def _tokenizer(
    path: Path, shape: ClipShape, given: str | Callable[[], Any] | None
) -> Callable[[], Any]:
    if callable(given):
        return given
    if given is not None:
        return partial(_fitting, given, shape, str(path))
    beside = path.parent
    if any((beside / name).is_file() for name in _TOKENIZER_FILES):
        return partial(_fitting, str(beside), shape, str(path))
    if shape.vocab_size == STANDARD_VOCABULARY:
        return partial(standard_tokenizer, str(path), shape.context_length)
    return partial(_no_tokenizer, str(path), shape.vocab_size)


def _fitting(source: str, shape: ClipShape, id: str) -> Any:
    tokenizer = load_tokenizer(source, id)
    if len(tokenizer) > shape.vocab_size:
        raise UserError(
            f"{id}: the tokenizer of {source} has {len(tokenizer):,} tokens, but the model only "
            f"{shape.vocab_size:,}. Give the model's own tokenizer with tokenizer=."
        )
    return tokenizer


def _no_tokenizer(id: str, vocabulary: int) -> Any:
    raise UserError(
        f"{id}: has a vocabulary of its own ({vocabulary:,} tokens), but no tokenizer next to it. "
        "Put its tokenizer.json into the same folder, or name a tokenizer (tokenizer=; in export, "
        "--tokenizer)."
    )
