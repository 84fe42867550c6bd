"""`sparsight name`: find what latents stand for, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from sparsight.activations import ActivationSource
from sparsight.cli.help import Help
from sparsight.cli.opening import open_model, open_saes
from sparsight.cli.options import parse
from sparsight.cli.subject import SubjectOptions, Subjects
from sparsight.errors import UserError
from sparsight.files import read_json
from sparsight.latents import LatentIndex
from sparsight.naming.labels import MIN_PRECISION
from sparsight.naming.methods import NEED_TEXT
from sparsight.naming.naming import (
    FALSE_NAMES,
    NamingResult,
    forget_names,
    name_latents,
)
from sparsight.naming.vlm_client import VlmSettings
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel
from sparsight.vision.passes import PassSettings

HELP = Help(
    examples=(
        "runs/b32-l9",
        "runs/b32-l9 --by labels text --text-model openai/clip-vit-base-patch32",
        "runs/b32-l9 --vocabulary words.txt --false-names 0.01",
        "runs/b32-l9 --by vlm --vlm-url http://localhost:8000/v1 --vlm-model NAME",
    ),
    needed=("runs",),
    common=(
        *("by", "vocabulary", "text-model", "false-names", "store", "images", "forget"),
        *("vlm-url", "vlm-model"),
    ),
)


@dataclass(frozen=True)
class NameOptions(SubjectOptions):
    """Name latents by labels or text; a name must beat those that an untrained SAE gets."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = tyro.MISSING
    """Run folders, or folders that contain runs."""

    by: tuple[str, ...] = ()
    """Methods: labels, text, centroid, splice, causal, vlm, truth. Default: labels if the images
    have labels, and text if the model, or --text-model, has a text tower."""

    vocabulary: str | None = None
    """Words for names by text: calibration, visual (10,000 words and phrases for photos), or a
    .txt, .csv or .tsv file. Default: the one that suits the model."""

    text_model: str | None = None
    """Second model with a text tower, if the SAE's own has none; it embeds the images once."""

    vlm_url: str | None = None
    """For names by a vision-language model (vlm): its OpenAI-compatible address, such as
    http://localhost:8000/v1. A key is read from the environment variable SPARSIGHT_VLM_KEY."""

    vlm_model: str | None = None
    """Name of the vision-language model at --vlm-url."""

    vlm_latents: int = 200
    """Latents that the vision-language model is asked about, drawn at random; answers are kept."""

    vlm_timeout: float = 60.0
    """Seconds until an answer of the vision-language model is late."""

    false_names: float = FALSE_NAMES
    """Largest share of an untrained SAE's latents that may get a name, all methods together."""

    min_precision: float = MIN_PRECISION
    """For names by label: lowest share of the held-out images above a latent's threshold that have
    the label."""

    seed: int = 0
    """Seed of the halves of the images and of the untrained SAEs."""

    forget: bool = False
    """Drop names instead: those given by the methods of --by, or all."""


def main(arguments: Sequence[str]) -> None:
    """Parse, name, print how many names there are and how often they would be false."""
    options = parse(NameOptions, "name", arguments, helped=HELP)
    vlm = None if options.forget else _vlm(options)
    saes = open_saes(options.runs, options.device)
    subjects = Subjects(options)
    text_model = None
    if options.text_model is not None and not options.forget:
        text_model = open_model(options.text_model, options)
    for folder, sae in saes.items():
        index = LatentIndex.open(folder / "index", sae)
        if options.forget:
            index = forget_names(index, options.by)
            named = index.n_latents - index.table["name"].null_count
            print(f"{index.folder} · {named:,} of {index.n_latents:,} latents have a name")
            continue
        _print(_named(options, subjects, folder, sae, index, text_model, vlm))


def _vlm(options: NameOptions) -> VlmSettings | None:
    """Return the vision-language model to ask, after checking its options."""
    given = [name for name in ("vlm_url", "vlm_model") if getattr(options, name) is not None]
    if "vlm" not in options.by:
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} is for names `--by vlm`; add that.")
        return None
    if options.vlm_url is None or options.vlm_model is None:
        raise UserError(
            "Names `--by vlm` need --vlm-url, such as http://localhost:8000/v1, and --vlm-model."
        )
    return VlmSettings(options.vlm_url, options.vlm_model, options.vlm_latents, options.vlm_timeout)


def _named(
    options: NameOptions,
    subjects: Subjects,
    folder: Path,
    sae: SparseAutoencoder,
    index: LatentIndex,
    text_model: VisionModel | None,
    vlm: VlmSettings | None,
) -> NamingResult:
    only_truth = set(options.by) == {"truth"}
    activations: ActivationSource | None = None
    model = None
    if not only_truth:
        activations = subjects.activations(folder, sae)
        by_text = not options.by or bool(set(options.by) & set(NEED_TEXT))
        if "causal" in options.by or (by_text and text_model is None):
            model = subjects.model(folder, sae)
    path = folder / "metrics.json"
    return name_latents(
        index,
        sae,
        activations,
        by=options.by,
        model=model,
        text_model=text_model,
        vocabulary=options.vocabulary,
        vlm=vlm,
        false_names=options.false_names,
        min_precision=options.min_precision,
        metrics=read_json(path) if path.exists() else None,
        seed=options.seed,
        settings=PassSettings(64, options.workers, quiet=False),
    )


def _print(result: NamingResult) -> None:
    index = result.index
    for note in result.answers.notes() if result.answers else ():
        print(note)
    for method in result.methods:
        print(f"{method}: {result.named[method]:,} of {result.judged:,} latents named")
    null = result.null
    if null is not None:
        low, high = null.interval
        print(
            f"false names: {null.asked:.1%} asked, {null.measured:.1%} [{low:.1%}, {high:.1%}] "
            f"measured on {null.n_check:,} untrained latents that set no threshold"
        )
    named = index.n_latents - index.table["name"].null_count
    print(f"{index.folder} · {named:,} of {index.n_latents:,} latents have a name")
