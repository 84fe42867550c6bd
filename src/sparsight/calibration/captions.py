"""Texts about scenes: captions for training, and the tokenizer that reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from sparsight.calibration.symbols import COLOURS, PATTERNS, SYMBOLS
from sparsight.calibration.world import CalibrationWorld, Scene

CONTEXT_LENGTH = 32
VOCABULARY_SIZE = 1024
SPECIAL_TOKENS = ("<|pad|>", "<|endoftext|>", "<|startoftext|>")

TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a photo of the {}.",
    "a drawing of a {}.",
    "a good photo of a {}.",
    "a bad photo of a {}.",
    "a photo of a large {}.",
    "a photo of a small {}.",
    "a close-up photo of a {}.",
    "a blurry photo of a {}.",
    "a painting of a {}.",
    "a {}.",
    "{}",
)
WORD_TEMPLATES: tuple[str, ...] = (
    'the word "{}"',
    'a picture with the word "{}".',
    'text that says "{}".',
    "the written word {}.",
)
BACKGROUND_TEMPLATES: tuple[str, ...] = ("a {} background.", "a picture on a {} background.")


def caption_of(scene: Scene, u: float) -> str:
    """Return a caption with everything (u < 0.4), the objects, their names, or only the background.

    Args:
        scene: the scene.
        u: a number in [0, 1) that chooses.
    """
    if u < 0.4:
        return scene.caption
    if u < 0.7:
        text = " and ".join(f"a {thing.colour} {thing.symbol}" for thing in scene.objects)
    elif u < 0.85:
        text = " and ".join(f"a {thing.symbol}" for thing in scene.objects)
    else:
        text = f"a {scene.label} on a {scene.background} background"
    if scene.writing is not None:
        text += f' with the word "{scene.writing.text}"'
    return text


def make_tokenizer() -> Any:
    """Train the byte-level BPE tokenizer on the world's own language; the result is always the
    same.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pad, end, start = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_language(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, SPECIAL_TOKENS.index(start)), (end, SPECIAL_TOKENS.index(end))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        model_max_length=CONTEXT_LENGTH,
    )


def _language() -> Iterator[str]:
    for template in (*TEMPLATES, *WORD_TEMPLATES):
        for symbol in SYMBOLS:
            yield template.format(symbol)
    for template in BACKGROUND_TEMPLATES:
        for ground in (*COLOURS, *PATTERNS):
            yield template.format(ground)
    world = CalibrationWorld(n_scenes=2_000, seed=1)
    choose = np.random.default_rng(1)
    for index in range(len(world)):
        yield caption_of(world.scene(index), choose.random())
