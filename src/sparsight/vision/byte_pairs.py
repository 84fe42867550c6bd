"""OpenAI's byte-pair encoding as a tokenizer of `transformers`: from the Hub, or from open_clip."""

from __future__ import annotations

import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

from sparsight.errors import UserError
from sparsight.vision.transformers_files import load_tokenizer, quiet

HUB_ID = "openai/clip-vit-base-patch32"
"""All of OpenAI's CLIPs have the same tokenizer; this is the smallest of them."""

START, END = "<|startoftext|>", "<|endoftext|>"

_PROBE = {
    "!": 0,
    "a</w>": 320,
    "photo</w>": 1125,
    "cat</w>": 2368,
    START: 49406,
    END: 49407,
}
"""Some tokens and their numbers."""


def is_standard(tokenizer: Any) -> bool:
    """Return whether a tokenizer of `transformers` is OpenAI's."""
    vocabulary = tokenizer.get_vocab()
    return len(vocabulary) == 49408 and all(vocabulary.get(k) == v for k, v in _PROBE.items())


def standard_tokenizer(id: str, length: int) -> Any:
    """Return OpenAI's tokenizer.

    Args:
        id: the model that needs it, for messages.
        length: how many tokens the model takes.

    Raises:
        UserError: it is neither on the Hub nor in its cache, and open_clip is not installed.
    """
    try:
        tokenizer = load_tokenizer(HUB_ID, id)
    except UserError as error:
        try:
            open_clip = importlib.import_module("open_clip")
        except (ImportError, RuntimeError):
            raise UserError(
                f"{id}: CLIP's tokenizer is needed, but could not be loaded from the Hub "
                f"({HUB_ID}) or its cache. Put its tokenizer.json next to the file, give "
                "tokenizer=, or install open_clip, which includes it: "
                "pip install 'sparsight[open-clip]'."
            ) from error
        return from_open_clip(open_clip.SimpleTokenizer(), length)
    tokenizer.model_max_length = length
    return tokenizer


def from_open_clip(tokenizer: Any, length: int) -> Any:
    """Convert open_clip's tokenizer to one of `transformers`: the same tokens for the same text.

    Args:
        tokenizer: open_clip's own for OpenAI's encoding, or its wrapper around another.
        length: how many tokens the model takes.

    Raises:
        UserError: the tokenizer is neither.
    """
    if hasattr(tokenizer, "tokenizer"):
        wrapped = tokenizer.tokenizer
        wrapped.model_max_length = length
        return wrapped
    if not hasattr(tokenizer, "bpe_ranks"):
        raise UserError(
            f"open_clip's {type(tokenizer).__name__} cannot be converted for transformers' CLIP."
        )
    vocabulary = {**tokenizer.encoder}
    for name, place in ((START, tokenizer.sot_token_id), (END, tokenizer.eot_token_id)):
        vocabulary = {key: at for key, at in vocabulary.items() if at != place} | {name: place}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), END),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        with quiet():
            return load_tokenizer(str(folder), "open_clip's tokenizer")
