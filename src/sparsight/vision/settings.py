"""Check what a model's folder says about itself before a library trusts it.

`config.json` and `preprocessor_config.json` come from strangers: a field may have the wrong type,
hold NaN, or nest lists without end, and libraries report whatever fails first. The messages here
name the file and the field. Code that such a file points to (`auto_map`) is never run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import dynamic_module_utils
from transformers.activations import ACT2FN
from transformers.utils.hub import cached_file

from sparsight.errors import SparsightError, UserError
from sparsight.reading import read_config

CONFIG = "config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")

DEEPEST = 32
"""Levels of nested lists and objects that a file may have; no library writes ten."""

_SWITCHES = (
    *("return_dict", "use_return_dict", "output_hidden_states", "output_attentions", "torchscript"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    *("gradient_checkpointing", "dtype", "torch_dtype", "auto_map", "_name_or_path"),
)
"""Settings of how a model runs and what it returns, not what it computes: Sparsight decides."""

_VISION_PARTS = ("vision_config", "backbone_config", "encoder")

LARGEST_SIDE = 8192
"""Pixels; no vision transformer takes larger images."""


def read_settings(source: str, name: str, revision: str | None = None) -> dict[str, Any] | None:
    """Read a JSON file of a model; None if the model lacks it.

    Args:
        source: local folder or Hub id.
        name: the file's name.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: it is not a JSON object, or nested too deeply.
        OSError: the Hub cannot be reached.
    """
    path = settings_path(source, name, revision)
    if path is None:
        return None
    try:
        found = read_config(path)
    except SparsightError as error:
        raise UserError(str(error)) from error
    deep = _deep_field(found)
    if deep is not None:
        raise UserError(
            f"{path}: {deep} has more than {DEEPEST} nested levels, so the file must be damaged."
        )
    return found


def settings_path(source: str, name: str, revision: str | None = None) -> Path | None:
    """Return the path of a model's file, downloaded if necessary; None if the model lacks it.

    Raises:
        OSError: the Hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    found = cached_file(
        source, name, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return None if found is None else Path(found)


def plain_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the switches that only say how a model runs, at any level."""
    return {
        key: plain_config(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _SWITCHES
    }


def check_config(values: Mapping[str, Any], where: str) -> None:
    """Check the fields of `config.json` that define a vision tower.

    Args:
        values: the contents of the file.
        where: the file, for messages.

    Raises:
        UserError: a field has the wrong type or an impossible value.
    """
    for path, part in (("", values), *_vision_parts(values)):
        for field, (holds, expected) in _CONFIG_FIELDS.items():
            if part.get(field) is not None and not holds(part[field]):
                raise _wrong(where, f"{path}{field}", part[field], expected)
    if values.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config says that the weights are quantised. Sparsight reads "
            "float32, float16 and bfloat16; load the model's unquantised weights."
        )


def check_processor(values: Mapping[str, Any], where: str) -> None:
    """Check the fields of an image processor that resizing and normalising depend on.

    Args:
        values: the contents of the file.
        where: the file, for messages.

    Raises:
        UserError: a field has the wrong type or an impossible value.
    """
    inner = values.get("image_processor")
    for path, part in (("", values), ("image_processor.", inner)):
        if not isinstance(part, dict):
            continue
        for field, (holds, expected) in _PROCESSOR_FIELDS.items():
            if part.get(field) is not None and not holds(part[field]):
                raise _wrong(where, f"{path}{field}", part[field], expected)
        for field, value in part.items():
            if field.startswith("do_") and not isinstance(value, bool | None):
                raise _wrong(where, f"{path}{field}", value, "true or false")


def own_code(values: Mapping[str, Any] | None) -> bool:
    """Return whether a file names classes in code that comes with the model."""
    return bool(values) and bool((values or {}).get("auto_map"))


def refusal_of_code(name: str) -> str:
    """Say why a model that needs its own code is not loaded."""
    return (
        f"{name} needs code that comes with the model (auto_map), and Sparsight never runs such "
        "code"
    )


@contextmanager
def no_code_of_models() -> Iterator[None]:
    """Keep transformers from running code that comes with a model, or asking whether to.

    For libraries that call transformers without forbidding it; Sparsight itself passes
    `trust_remote_code=False`.
    """

    def refuse(*_: Any, **__: Any) -> None:
        raise UserError(refusal_of_code("The model"))

    asked, fetch = dynamic_module_utils.TIME_OUT_REMOTE_CODE, "get_cached_module_file"
    fetched = getattr(dynamic_module_utils, fetch)
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # no time to answer: the user is not asked
    setattr(dynamic_module_utils, fetch, refuse)
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = asked
        setattr(dynamic_module_utils, fetch, fetched)


def reason(error: BaseException) -> str:
    """Return a library's error message in one line: of nested errors the last, with the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    nested = len(lines) > 1 and "alidation error" in lines[0]
    found = lines[-1] if nested else lines[0]
    # A missing key or attribute says nothing without the kind of error.
    bare = type(error) in (KeyError, IndexError, AttributeError, TypeError, ZeroDivisionError)
    return f"{type(error).__name__}: {found}" if bare else found


def _vision_parts(values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in _VISION_PARTS:
        if isinstance(values.get(name), dict):
            yield f"{name}.", values[name]


def _deep_field(values: Mapping[str, Any]) -> str | None:
    """Return the first field that is nested too deeply; no recursion, since it may be very deep."""
    for field, value in values.items():
        level = [value]
        for _ in range(DEEPEST):
            level = [inner for value in level for inner in _inside(value)]
            if not level:
                break
        else:
            return str(field)
    return None


def _inside(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [each for each in inner if isinstance(each, dict | list)]


def _wrong(where: str, field: str, value: Any, expected: str) -> UserError:
    text = repr(value)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return UserError(f"{where}: {field} is {shown}; expected {expected}.")


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _each(value: Any, holds: Callable[[Any], bool]) -> bool:
    """Return whether `holds` is true for a value, or for each in a list or an object of values."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return 0 < len(value) <= 64 and all(each is None or holds(each) for each in value)
    return holds(value)


def _sizes(most: int) -> tuple[Callable[[Any], bool], str]:
    def holds(value: Any) -> bool:
        return _each(value, lambda each: isinstance(each, int) and _is_whole(each) and each > 0)

    def small(value: Any) -> bool:
        return holds(value) and _each(value, lambda each: each <= most)

    return small, f"a whole number from 1 to {most:,}"


def _lengths(most: int) -> tuple[Callable[[Any], bool], str]:
    holds, expected = _sizes(most)

    def one_or_more(value: Any) -> bool:
        return holds(value) and not (isinstance(value, list) and len(value) not in (2, 3))

    return one_or_more, f"{expected}, or height and width"


def _are_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(re.fullmatch(r"-?\d+", str(key)) for key in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _numbers(value: Any) -> bool:
    return (_is_number(value) or isinstance(value, list)) and _each(value, _is_number)


def _positive(value: Any) -> bool:
    return _numbers(value) and _each(value, lambda each: each > 0)


def _share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _sides(value: Any) -> bool:
    # Qwen's processors give pixel counts where others give sides.
    counts = isinstance(value, dict) and {"longest_edge", "max_pixels"} & value.keys()
    most = math.inf if counts else LARGEST_SIDE
    return _each(value, lambda each: _is_whole(each) and 0 < each <= most)


_CONFIG_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": (_is_text, "a name such as 'clip'"),
    "architectures": (
        lambda value: isinstance(value, list) and all(map(_is_text, value)),
        "a list of names",
    ),
    "hidden_size": _sizes(2**17),
    "intermediate_size": _sizes(2**20),
    "num_hidden_layers": _sizes(1000),
    "num_attention_heads": _sizes(2**12),
    "num_channels": _sizes(2**10),
    "image_size": _lengths(LARGEST_SIDE),
    "patch_size": _lengths(LARGEST_SIDE),
    "layer_norm_eps": (_positive, "a number above 0"),
    "mlp_ratio": (_positive, "a number above 0"),
    "mask_ratio": (_share, "a number from 0 to below 1"),
    "hidden_act": (
        lambda value: _is_text(value) and value in ACT2FN,
        "the name of an activation function, such as 'gelu'",
    ),
    "id2label": (_are_labels, "an object with one label per number"),
}

_PROCESSOR_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image_processor_type": (_is_text, "a name such as 'CLIPImageProcessor'"),
    "size": (_sides, f"sides from 1 to {LARGEST_SIDE:,} pixels"),
    "crop_size": (_sides, f"sides from 1 to {LARGEST_SIDE:,} pixels"),
    "image_mean": (_numbers, "finite numbers, one per channel"),
    "image_std": (_positive, "finite numbers above 0, one per channel"),
    "rescale_factor": (_positive, "a number above 0"),
    "resample": (
        lambda value: _is_whole(value) and 0 <= value <= 5,
        "the number of one of Pillow's filters, from 0 to 5",
    ),
}
