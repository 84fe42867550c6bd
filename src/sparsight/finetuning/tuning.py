"""`finetune`: train a copy of a CLIP on pairs and attacks, or continue a stopped run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from sparsight.config import load
from sparsight.errors import UserError
from sparsight.files import sha256_json
from sparsight.finetuning.batches import BatchLoader
from sparsight.finetuning.config import FinetuneConfig, FinetuneRecipe
from sparsight.finetuning.loop import FinetuneLoop
from sparsight.finetuning.pairs import CaptionedImages, captioned, check_lengths
from sparsight.finetuning.penalty import PenalisedLatents
from sparsight.finetuning.run import FinetuneRun, identity
from sparsight.images import ImageSource
from sparsight.interruption import kept, noted
from sparsight.pace import SECONDS, Pace
from sparsight.progress import logger
from sparsight.runs import checkpoint_files
from sparsight.runs.same_run import damaged_if, refuse_difference
from sparsight.training.run import CONFIG, goes_on
from sparsight.vision import VisionModel
from sparsight.vision.hashing import weights_hash
from sparsight.vision.saving import Layout


@runtime_checkable
class PairedAttacks(Protocol):
    """Images with words on them, and the same without; `sparsight.attacks` makes them."""

    @property
    def attacked(self) -> ImageSource:
        """Return the images with words, under their true labels."""

    @property
    def clean(self) -> ImageSource:
        """Return the same images in the same order, without words."""


def finetune(
    model: VisionModel,
    data: ImageSource | CaptionedImages,
    config: FinetuneConfig | None = None,
    out: str | Path = "runs/tuned",
    *,
    attack: ImageSource | CaptionedImages | PairedAttacks | None = None,
    latents: PenalisedLatents | None = None,
    neurons: Mapping[int, Sequence[int]] | None = None,
    layout: Layout = "huggingface",
    workers: int | None = None,
    max_failed: float = 0.01,
    resume: bool = True,
    checkpoint_seconds: float | None = SECONDS,
    quiet: bool = False,
) -> FinetuneRun:
    """Fine-tune a copy of a CLIP so that words in images fool it less.

    After Ctrl-C or SIGTERM, the current step finishes and a checkpoint is written before
    `KeyboardInterrupt` or `SystemExit` is raised; a second signal stops at once.

    Args:
        model: a model with a text tower; it stays unchanged, and is the target of distillation.
        data: clean images with captions or labels.
        config: how to train.
        out: folder of the run. A finished run of the same configuration is returned unchanged; a
            stopped one continues from its last checkpoint, bit for bit.
        attack: images that fool the model, with true captions or labels; None trains on the data
            alone.
        latents: latents of an SAE to penalise with `config.penalty`.
        neurons: neurons to scale, by block; default: chosen for each batch (`config.scaling`).
        layout: layout of the exported model, in the run's `model/`.
        workers: processes that decode images; see `load_batches`.
        max_failed: share of the images that may be broken; they are left out and counted.
        resume: False refuses a folder that holds a run.
        checkpoint_seconds: seconds between checkpoints, or more if writing takes over a fiftieth of
            that; in addition to `config.checkpoint_every`. None writes none by time. It is not part
            of a run's identity.
        quiet: show no progress line.

    Returns:
        The run.

    Raises:
        UserError: `out` holds another run, another process trains there, or the configuration does
            not fit model and images.
        SparsightError: a loss or gradient is not finite, or too many images are broken; the last
            checkpoint stays.
    """
    config = config or FinetuneConfig()
    run = FinetuneRun(Path(out))
    if not model.has_text:
        raise UserError(f"{model.id} has no text tower, so it cannot be trained on captions.")
    clean = attack.clean if isinstance(attack, PairedAttacks) and config.pull else None
    attacked = attack.attacked if isinstance(attack, PairedAttacks) else attack
    pairs = _with_captions(data, config.captions, config)
    attacks = None
    if attacked is not None:
        attacks = _with_captions(attacked, config.attack_captions, config)
    recipe = FinetuneRecipe(
        model=model.id,
        weights=weights_hash({"all": model.module.parameters()}),
        data=pairs.source.spec,
        data_fingerprint=pairs.fingerprint,
        attack=None if attacks is None else attacks.source.spec,
        attack_fingerprint=None if attacks is None else attacks.fingerprint,
        clean_fingerprint=None if clean is None else clean.fingerprint(),
        latents=None if latents is None else _identity(latents),
        neurons=None if neurons is None else _neurons_text(neurons),
        layout=layout,
        train=config,
    )
    pace = Pace(checkpoint_seconds)
    if _settled(run, recipe, resume):
        run.clear_leftovers()
        if run.recipe.layout != layout:
            raise UserError(
                f"{run.folder}: has finished, with the layout {run.recipe.layout}. `sparsight "
                f"export` "
                f"writes it with the layout {layout}."
            )
        return run
    texts = list(dict.fromkeys([*pairs.distinct(), *(attacks.distinct() if attacks else ())]))
    cut = check_lengths(model, texts, config.truncate_captions)
    if cut and not quiet:
        logger().info(
            f"{cut:,} of {len(texts):,} captions are cut to {model.context_length} tokens."
        )
    with run.claimed():
        loader = BatchLoader(
            model,
            pairs.source,
            None if attacks is None else attacks.source,
            clean,
            max_failed=max_failed,
            workers=workers,
        )
        run.clear()
        loop: FinetuneLoop | None = None
        with noted(lambda: _what_is_kept(run, loop)):
            loop = FinetuneLoop(
                model, pairs, attacks, loader, recipe, run, latents, neurons, pace, quiet
            )
            loop.run_to_end(layout)
    return run


def _with_captions(
    images: ImageSource | CaptionedImages, use: Any, config: FinetuneConfig
) -> CaptionedImages:
    if isinstance(images, CaptionedImages):
        return images
    return captioned(images, use, config.templates)


def _settled(run: FinetuneRun, recipe: FinetuneRecipe, resume: bool) -> bool:
    """Return whether the run has finished; check that existing files belong to the same run."""
    path, own = run.out / CONFIG, identity(recipe)
    if not goes_on(run.out, path.exists(), resume):
        return False
    with damaged_if(checkpoint_files.newest_state(run.checkpoints).get("run") == own):
        refuse_difference(path, identity(load(FinetuneRecipe, path)), own)
    return run.is_finished


def _what_is_kept(run: FinetuneRun, loop: FinetuneLoop | None) -> str:
    """Return the closing message of a stopped run."""
    if run.is_finished:
        return f"Fine-tuning had already finished: {run.folder} is complete."
    if loop is None:
        return "Run the same command again."
    return kept(loop.kept_step, loop.n_steps, "steps")


def _identity(latents: PenalisedLatents) -> str:
    weights = {name: list(value.shape) for name, value in latents.sae.state_dict().items()}
    digest = hashlib.sha256(json.dumps([weights, list(latents.latents), latents.site]).encode())
    for value in latents.sae.state_dict().values():
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _neurons_text(neurons: Mapping[int, Sequence[int]]) -> str:
    return sha256_json({str(block): list(chosen) for block, chosen in neurons.items()})
