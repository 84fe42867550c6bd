"""`sparsight finetune`: train a CLIP against typographic attacks; measure it before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console

from sparsight.attacks import AttackPairs, SalienceTable, find_text_salient, make_pairs
from sparsight.cli.help import Help
from sparsight.cli.opening import open_model
from sparsight.cli.options import ModelOptions, parse
from sparsight.cli.printing import plain_table, print_notes
from sparsight.errors import UserError
from sparsight.finetuning import (
    CaptionedImages,
    FinetuneConfig,
    PenalisedLatents,
    captioned,
    finetune,
    open_pairs,
)
from sparsight.finetuning.report import PAGE, lead, report_finetuning
from sparsight.finetuning.subjects import Subjects
from sparsight.finetuning.tables import table_rows
from sparsight.images import CalibrationImages, ImageSource, open_images
from sparsight.interruption import STOPS
from sparsight.pace import SECONDS
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK
from sparsight.training import TrainConfig, train
from sparsight.vision import VisionModel
from sparsight.vision.saving import Layout

WRITTEN = "written"
NONE = "none"

# Nothing else uses these seeds, so that no training has seen the scenes to measure on.
CALIBRATION = {
    "data": "calibration:1200:41",
    "attack_on": "calibration:1000:42:single",
    "test": "calibration:600:43:single",
    "images": "calibration:1000:44",
}

HELD_OUT = 0.1
LARGEST_TEST = 1000
SAE_VECTORS = 100_000
SALIENCE_PAIRS = 256


HELP = Help(
    examples=(
        "openai/clip-vit-base-patch32 --data photos/ --out runs/tuned",
        "calibration --out runs/tuned --epochs 3",
    ),
    needed=("model", "data", "out"),
    common=(
        "attack",
        "attack-on",
        "test",
        "images",
        "sae",
        "salience",
        "layout",
        "max-images",
        "epochs",
        "batch-size",
        "lr",
        "seed",
        "report",
    ),
)


@dataclass(frozen=True)
class FinetuneOptions(ModelOptions):
    """Fine-tune a CLIP so that words in images fool it less; measure it before and after."""

    model: tyro.conf.Positional[str | None] = None
    """The CLIP: Hub id, local folder or file, "open_clip:…", or "calibration"."""

    out: Path = Path("runs/tuned")
    """Folder for model/, report.html, before-after.json and metrics.jsonl; an interrupted run is
    continued."""

    data: str | None = None
    """Clean images with captions or labels: any source of images, or a pair file (.json, .jsonl,
    .csv). Default: rendered scenes for the calibration CLIP; otherwise required."""

    pictures: Path | None = None
    """Folder to which a pair file's paths are relative; default: the folder of the file."""

    attack: str = WRITTEN
    """Images that fool the model, with true captions or labels, e.g. the output of `attack curate`;
    or "written": write the names of other classes on labelled images; or "none"."""

    attack_on: str | None = None
    """Labelled images on which to write words; default: those of --data."""

    test: str | None = None
    """Labelled images to measure on, which are kept out of training; default: a tenth of the images
    on which words are written."""

    images: str | None = None
    """Other labelled images, for zero-shot accuracy without an attack, and for retrieval if they
    have captions."""

    train: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)
    """How to train; [train] in a config file."""

    sae: Path | None = None
    """Run of an SAE of the original model, for --penalty and to report how its latents change;
    default: first train a small SAE."""

    latents: bool = True
    """Report how latents change."""

    salience: Path | None = None
    """Folder of a table that `attack find` wrote, with the neurons to scale or the latents to
    penalise."""

    layout: Layout = "huggingface"
    """Format of the resulting model."""

    report: bool = True
    """Measure before and after, and write the page."""

    max_images: int = 1000
    """Largest number of images for each measurement; if there are more, a random sample is used."""

    checkpoint_seconds: float | None = SECONDS
    """Seconds between additional checkpoints; longer if writing takes more than a fiftieth of this
    time. A continued run may use another value."""

    fresh: tyro.conf.FlagCreatePairsOff[bool] = False
    """Refuse to continue an existing run."""


def main(arguments: Sequence[str]) -> None:
    """Parse, train, measure, print the table."""
    options = parse(FinetuneOptions, "finetune", arguments, helped=HELP)
    if options.model is None:
        raise UserError("No model is given; name a CLIP, e.g. `sparsight finetune calibration`.")
    model = open_model(options.model, options)
    pictures = _pictures(options)
    sae = _sae(options, model, pictures.data)
    latents, neurons = _salient(options, model, sae, pictures.attack)
    run = finetune(
        model,
        pictures.data,
        options.train,
        options.out,
        attack=pictures.attack,
        latents=latents,
        neurons=neurons,
        layout=options.layout,
        workers=options.workers,
        max_failed=options.max_failed,
        resume=not options.fresh,
        checkpoint_seconds=options.checkpoint_seconds,
    )
    if options.report and pictures.test is not None:
        subjects = Subjects(
            pictures.test,
            images=pictures.images,
            captioned=_captioned(pictures.images),
            sae=sae,
            templates=options.train.templates,
            max_images=options.max_images,
            workers=options.workers,
            seed=options.train.seed,
        )
        try:
            found = report_finetuning(run, model, subjects)
        except STOPS as stop:
            stop.add_note("The model is finished; the same command measures it.")
            raise
        _print(found)
        print(f"\nThe report: {run.out / PAGE}")
    print(f"The model: {run.folder}")


@dataclass(frozen=True)
class _Pictures:
    """The images to train on and to measure on."""

    data: ImageSource
    attack: ImageSource | AttackPairs | None
    test: AttackPairs | None
    images: ImageSource | None


def _pictures(options: FinetuneOptions) -> _Pictures:
    """Open all images; those to measure on are kept out of training."""
    own = CALIBRATION if options.model == "calibration" and options.data is None else {}
    named = {name: getattr(options, name) or own.get(name) for name in CALIBRATION}
    if named["data"] is None:
        raise UserError(
            "Nothing to train on: give --data, images with captions or labels. Only the "
            "calibration CLIP comes with its own."
        )
    data = _without_words(_open(named["data"], options))
    images = None if named["images"] is None else _without_words(_open(named["images"], options))
    seed = options.train.seed
    on: ImageSource | None = data if data.labels() else None
    if named["attack_on"] is not None:
        on = _opened(named["attack_on"])
    test = None if named["test"] is None else _opened(named["test"])
    for flag, source in (("attack-on", on), ("test", test)):
        if source is not None and not source.labels():
            raise UserError(
                f"--{flag} {source.spec}: these images have no labels; give labelled ones."
            )
    if test is None and on is not None and options.report:
        on, test = _keep_back(on, seed)
        if named["attack_on"] is None:
            data = on
    if options.report:
        seen = {
            source.known(i).uri for source in (test, images) if source for i in range(len(source))
        }
        data = _apart(data, seen)
        on = None if on is None else _apart(on, seen)
    attack: ImageSource | AttackPairs | None = None
    if options.attack == WRITTEN:
        if on is None:
            raise UserError(
                f"{data.spec}: the images have no labels, so there are no names to write on them. "
                "Give --attack-on with labelled images, --attack with images that have words on "
                "them, or --attack none."
            )
        attack = _written(on, seed)
    elif options.attack != NONE:
        attack = _open(options.attack, options)
    pairs = None
    if options.report and test is not None:
        pairs = _written(test, seed + 1, min(options.max_images, len(test)))
    elif options.report:
        print_notes(["no report: there are no labelled images to measure on; give --test."])
    return _Pictures(data, attack, pairs, images)


def _open(spec: str, options: FinetuneOptions) -> ImageSource:
    if options.table is not None and spec == options.data:
        return _opened(spec, options.table)
    of_pairs = options.pictures if spec == options.data else None
    source = open_pairs(spec, of_pairs, options.max_failed)
    print_notes(source.notes)
    return source


def _opened(spec: str, table: Path | None = None) -> ImageSource:
    source = open_images(spec, table=table)
    print_notes(source.notes)
    return source


def _written(source: ImageSource, seed: int, n: int | None = None) -> AttackPairs:
    pairs = make_pairs(source, n=n, seed=seed)
    print_notes(note for note in pairs.notes if note not in source.notes)
    return pairs


def _without_words(source: ImageSource) -> ImageSource:
    """Return only the calibration scenes without words: training must not preserve how the model
    reads words. Other sources are returned unchanged."""
    if not isinstance(source, CalibrationImages):
        return source
    return source.select([i for i in range(len(source)) if source.scene(i).writing is None])


def _apart(source: ImageSource, seen: set[str]) -> ImageSource:
    """Return the images that are not among those to measure on."""
    kept = [i for i in range(len(source)) if source.known(i).uri not in seen]
    if len(kept) == len(source):
        return source
    if not kept:
        raise UserError(
            f"{source.spec}: all images are also in --test or --images, to measure on; none are "
            "left to train on."
        )
    print_notes(
        [
            f"{source.spec}: {len(source) - len(kept):,} of {len(source):,} images are also among "
            "those to measure on; they are left out of training."
        ]
    )
    return source.select(kept)


def _keep_back(source: ImageSource, seed: int) -> tuple[ImageSource, ImageSource]:
    """Split the images: most to train on, and a random share to measure on."""
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    n = min(LARGEST_TEST, max(1, round(HELD_OUT * len(source))))
    if n == len(source):
        raise UserError(f"{source.spec}: one image is too few to train on and to measure on.")
    return source.select(sorted(order[n:])), source.select(sorted(order[:n]))


def _sae(
    options: FinetuneOptions, model: VisionModel, data: ImageSource
) -> SparseAutoencoder | None:
    """Return the named SAE, or train a small one; None if latents do not matter."""
    if options.sae is not None:
        return SparseAutoencoder.from_pretrained(options.sae, device=str(model.device))
    wanted = options.latents and options.report and options.salience is None
    if not wanted and not options.train.penalty:
        return None
    site = model.canonical_site("blocks.-2.resid_post")
    config = TrainConfig(
        sae=SAEConfig(n_latents=4 * model.d_in(site), sparsity=TopK(k=16)),
        n_vectors=SAE_VECTORS,
        batch_size=1024,
        lr=1e-3,
    )
    run = train((model, data), config, options.out / "sae", sites=[site])
    return run.sae()


def _salient(
    options: FinetuneOptions,
    model: VisionModel,
    sae: SparseAutoencoder | None,
    attack: ImageSource | AttackPairs | None,
) -> tuple[PenalisedLatents | None, dict[int, list[int]] | None]:
    """Return latents to penalise and neurons to scale, from a table or by a search."""
    if options.salience is not None:
        table = SalienceTable.load(options.salience)
        if table.about["unit"] == "neuron":
            return None, {_block(table.site): table.select(options.train.scaling.top)}
        if sae is None:
            raise UserError(
                f"{options.salience}: the table lists latents; give their SAE with --sae."
            )
        return PenalisedLatents(sae, table.found, table.site), None
    if not options.train.penalty or sae is None:
        return None, None
    if not isinstance(attack, AttackPairs):
        raise UserError(
            "--penalty: finding the latents that read words takes images with and without words. "
            "Give --salience with a table, or --attack written."
        )
    pairs = attack.select(range(min(SALIENCE_PAIRS, len(attack))))
    found = find_text_salient(model, pairs, sae, contrast="attack", workers=options.workers)
    if not found.found:
        raise UserError("--penalty: no latent of the SAE responds to words.")
    return PenalisedLatents(sae, found.found, found.site), None


def _block(site: str) -> int:
    """Return the block whose MLP neurons a table lists."""
    parts = site.split(".")
    if len(parts) != 3 or not parts[2].startswith("mlp_p"):
        raise UserError(f"--salience: {site} is not the neurons of an MLP (blocks.N.mlp_pre).")
    return int(parts[1])


def _captioned(source: ImageSource | None) -> CaptionedImages | None:
    if source is None or not any(source.known(i).captions for i in range(len(source))):
        return None
    return captioned(source, "captions")


def _print(found: dict[str, Any]) -> None:
    table = plain_table()
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right")
    for row in table_rows(found):
        table.add_row(*row)
    console = Console(markup=False, emoji=False)
    console.print(table)
    console.print(f"\n{lead(found)}", highlight=False)
