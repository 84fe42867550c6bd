"""Load models of Hugging Face transformers from the Hub or a folder, and check each file."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from sparsight.errors import SparsightError, UserError
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
from sparsight.vision.transformers_models import TransformersModel, is_projection, model_of


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
        id: the model's name.
        device: where to put the model.
        dtype: dtype of its weights.
        revision: branch, tag or commit on the Hub.
        tokenizer: folder or Hub id of a tokenizer to use instead of the model's own.
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


def load_tokenizer(source: str, id: str, revision: str | None = None) -> Any:
    """Load a tokenizer of transformers; code that comes with it is not run.

    Args:
        source: folder or Hub id.
        id: the model's id, for messages.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: it could not be loaded.
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
    # Without files, transformers 5 returns a tokenizer that turns every word into "unknown".
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise UserError(f"{problem} (no vocabulary found; tokenizer.json is missing).")
    return tokenizer


def load_processor(source: str, id: str, revision: str | None = None) -> Any:
    """Load a model's image processor, on Pillow if transformers has it; its code is not run.

    Most models were trained with Pillow's resampling, which gives the same pixels whether or not
    torchvision is installed.

    Args:
        source: folder or Hub id.
        id: the model's id, for messages.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: it could not be loaded, or a field of its file has the wrong type or an
            impossible value.
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


def _names_own_code(source: str, revision: str | None, names: Sequence[str]) -> bool:
    """Return whether one of these files of a model points to code that comes with it."""
    try:
        return any(own_code(read_settings(source, name, revision)) for name in names)
    except (OSError, ValueError):
        return False


def _load_config(source: str, id: str, revision: str | None) -> tuple[Any, str | None]:
    """Load the model's configuration with transformers; return it and its commit on the Hub."""
    values, where, commit = _read_config(source, id, revision)
    kind = _config_class(values, where)
    try:
        with quiet():
            config = kind.from_dict(plain_config(values))
    except Exception as error:  # transformers trusts every field
        raise UserError(f"{where}: cannot be used ({reason(error)}).") from error
    if not any(_says_vision(part) for part in _parts(config)):
        raise UserError(
            f"{id}: not a vision model that Sparsight can open: its config.json (model_type "
            f"{config.model_type!r}) has neither vision_config nor patch_size."
        )
    return config, commit


def _read_config(
    source: str, id: str, revision: str | None
) -> tuple[dict[str, Any], str, str | None]:
    """Read and check `config.json`; return it, its path, and its commit on the Hub if known."""
    folder = Path(source).expanduser()
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not folder.is_dir():
        raise UserError(f"{id}: this folder does not exist ({folder.absolute()}).")
    if folder.is_dir() and not (folder / CONFIG).is_file():
        raise UserError(
            f"{id}: the folder {folder.absolute()} holds no config.json; expected a model that was "
            "saved with save_pretrained."
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
    """Find the configuration's class in transformers by its model_type, or its architecture."""
    model_type: str | None = values.get("model_type")
    if model_type is not None and model_type in transformers.CONFIG_MAPPING:
        return transformers.CONFIG_MAPPING[model_type]
    named = _named_class(values.get("architectures"))
    if model_type is None and named is not None:
        return named.config_class
    if model_type is None:
        raise UserError(f"{where}: has no model_type, so it describes no model of transformers.")
    version = f"transformers {transformers.__version__} does not know the model_type {model_type!r}"
    if own_code(values):
        raise UserError(f"{where}: {version}. {refusal_of_code('It')}.")
    raise UserError(f"{where}: {version}. A newer version may.")


def _named_class(architectures: Sequence[str] | None) -> Any:
    """Return the class in transformers that a configuration names; None if it does not exist."""
    name = (architectures or [""])[0]
    found = getattr(transformers, name, None) if name.isidentifier() else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model and getattr(found, "config_class", None) else None


def _parts(config: Any) -> Iterator[Any]:
    """Yield a configuration and those inside it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PretrainedConfig):
            yield from _parts(value)


def _says_vision(config: Any) -> bool:
    return any(hasattr(config, key) for key in ("vision_config", "patch_size", "image_size"))


def _check_processor_files(source: str, id: str, revision: str | None) -> None:
    local = Path(source).expanduser()
    for name in PROCESSORS:
        try:
            values = read_settings(source, name, revision)
        except UserError:
            raise
        except (OSError, ValueError):
            continue  # the library's own message says more
        if values is not None:
            where = str(local / name) if local.is_dir() else f"{id}: {name}"
            check_processor(values, where)


def _load_module(
    source: str, id: str, config: Any, revision: str | None
) -> tuple[transformers.PreTrainedModel, set[str]]:
    """Load the model in float32; return it and the names of weights that the files lack."""
    named = _named_class(getattr(config, "architectures", None))
    if named is not None and not isinstance(config, named.config_class):
        named = None
    known = type(config) in transformers.MODEL_MAPPING
    if not known and named is None:
        raise UserError(
            f"{id}: transformers has no model for its config.json (model_type "
            f"{config.model_type!r}, architectures {getattr(config, 'architectures', None)})."
        )
    # AutoModel drops the projection of a vision tower that was saved by itself.
    alone = named is not None and named.__name__.endswith("WithProjection")
    loader = named if alone or not known else transformers.AutoModel
    module, missing = _from_pretrained(loader, source, id, config, revision)
    if named not in (None, loader, type(module)) and any(map(is_projection, missing)):
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
    except UnpicklingError as error:  # torch's own message advises running the file's code
        raise SparsightError(
            f"{id}: its pickled weights are damaged or hold more than tensors. Sparsight does not "
            "run code in weights; use safetensors."
        ) from error
    except (SafetensorError, EOFError) as error:
        raise SparsightError(f"{id}: its weights are damaged ({reason(error)}).") from error
    except OSError as error:
        raise UserError(f"{id}: its weights could not be loaded ({reason(error)}).") from error
    except Exception as error:  # the constructors get a config with any values
        raise UserError(
            f"{id}: its config.json does not describe a model that its weights fit "
            f"({reason(error)})."
        ) from error
    # Names with both shapes, or only names, depending on the version.
    wrong = report.get("mismatched_keys", ())
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in wrong}
    return module, set(report["missing_keys"]) | mismatched


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' notes on missing poolers and torchvision while loading.

    Sparsight itself checks and reports what matters in them. Download bars stay.
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
