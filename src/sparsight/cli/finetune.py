"""`sparsight finetune`: train a CLIP against words in pictures; measure it before and after."""

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
from sparsight.finetuning.report import PAGE, lead, report_finetuning, table_rows
from sparsight.finetuning.subjects import Subjects
from sparsight.images import CalibrationImages, ImageSource, open_images
from sparsight.interruption import STOPS
from sparsight.pace import SECONDS
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK
from sparsight.training import TrainConfig, train
from sparsight.vision import VisionModel
from sparsight.vision.saving import Layout

WRITTEN = "written"
NONE = "none"

# Seeds that nothing else uses: no scene that is measured on was seen in any training.
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
    """Fine-tune a CLIP so that words in pictures fool it less; measure it before and after."""

    model: tyro.conf.Positional[str | None] = None
    """The CLIP: Hub id, local folder or file, "open_clip:…", or "calibration"."""

    out: Path = Path("runs/tuned")
    """Gets model/, report.html, before-after.json and metrics.jsonl; one that was interrupted is
    continued."""

    data: str | None = None
    """Clean pictures with captions or labels: any source of images, or a pair file (.json, .jsonl,
    .csv). The calibration CLIP has scenes by default."""

    pictures: Path | None = None
    """Folder that a pair file's paths are relative to; default the file's own."""

    attack: str = WRITTEN
    """Pictures that fool the model, with true captions or labels, e.g. what `attack curate` wrote;
    "written": names of other classes are written on labelled pictures; "none"."""

    attack_on: str | None = None
    """Labelled pictures that words are written on; default the data."""

    test: str | None = None
    """Labelled pictures to measure on, that the model is not trained on; default a tenth of those
    that words are written on is kept back."""

    images: str | None = None
    """Other labelled pictures, for zero-shot accuracy without attack; captions serve retrieval."""

    train: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)
    """How to train; [train] in a config file."""

    sae: Path | None = None
    """Run of an SAE of the model as it is, to tell what became of its latents, and for --penalty;
    default a small one is trained on the way."""

    latents: bool = True
    """Tell what became of latents."""

    salience: Path | None = None
    """Folder of a table that `attack find` wrote: neurons to be scaled, or latents to be
    penalised."""

    layout: Layout = "huggingface"
    """Whose programs are to load the result."""

    report: bool = True
    """Measure before and after, and write the page."""

    max_images: int = 1000
    """Images that a figure is taken on, at most; of more, a random sample."""

    checkpoint_seconds: float | None = SECONDS
    """Write a checkpoint at least so often, beside those of --checkpoint-every; less often where
    writing one takes more than a fiftieth of that. No part of what a run is."""

    fresh: tyro.conf.FlagCreatePairsOff[bool] = False
    """Refuse to continue a run that is there."""


def main(arguments: Sequence[str]) -> None:
    """Parse, train, measure, print the table."""
    options = parse(FinetuneOptions, "finetune", arguments, helped=HELP)
    if options.model is None:
        raise UserError("Name the CLIP to fine-tune: sparsight finetune calibration, for example.")
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
    """What is trained and measured on."""

    data: ImageSource
    attack: ImageSource | AttackPairs | None
    test: AttackPairs | None
    images: ImageSource | None


def _pictures(options: FinetuneOptions) -> _Pictures:
    """Open everything; what is measured on is nowhere trained on."""
    own = CALIBRATION if options.model == "calibration" and options.data is None else {}
    named = {name: getattr(options, name) or own.get(name) for name in CALIBRATION}
    if named["data"] is None:
        raise UserError(
            "Nothing to train on: give --data, pictures with captions or labels. Only the "
            "calibration CLIP has some of its own."
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
            raise UserError(f"--{flag} {source.spec}: has no labels; labelled pictures are needed.")
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
                f"{data.spec}: has no labels, so there are no names to write on its pictures. Give "
                "--attack-on with labelled ones, --attack with pictures that have words on them, "
                "or --attack none."
            )
        attack = _written(on, seed)
    elif options.attack != NONE:
        attack = _open(options.attack, options)
    pairs = None
    if options.report and test is not None:
        pairs = _written(test, seed + 1, min(options.max_images, len(test)))
    elif options.report:
        print_notes(["no report: there are no labelled pictures to measure on; give --test."])
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
    """Of the calibration world, scenes on which nothing is written: to keep what the model makes of
    words is not what it is trained for."""
    if not isinstance(source, CalibrationImages):
        return source
    return source.select([i for i in range(len(source)) if source.scene(i).writing is None])


def _apart(source: ImageSource, seen: set[str]) -> ImageSource:
    """The pictures that are not among those that are measured on."""
    kept = [i for i in range(len(source)) if source.known(i).uri not in seen]
    if len(kept) == len(source):
        return source
    if not kept:
        raise UserError(
            f"{source.spec}: all of its pictures are among those that are measured on (--test, "
            "--images); there is nothing left to train on."
        )
    print_notes(
        [
            f"{source.spec}: {len(source) - len(kept):,} of {len(source):,} pictures are among "
            "those that are measured on; they are not trained on."
        ]
    )
    return source.select(kept)


def _keep_back(source: ImageSource, seed: int) -> tuple[ImageSource, ImageSource]:
    """Most of the pictures to train on, and some, drawn by lot, to measure on."""
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    n = min(LARGEST_TEST, max(1, round(HELD_OUT * len(source))))
    if n == len(source):
        raise UserError(f"{source.spec}: one picture is too few; some are kept back to measure on.")
    return source.select(sorted(order[n:])), source.select(sorted(order[:n]))


def _sae(
    options: FinetuneOptions, model: VisionModel, data: ImageSource
) -> SparseAutoencoder | None:
    """The SAE that was named, or a small one, trained now; none where latents do not matter."""
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
    """Latents to be penalised and neurons to be scaled: from a table, or found now."""
    if options.salience is not None:
        table = SalienceTable.load(options.salience)
        if table.about["unit"] == "neuron":
            return None, {_block(table.site): table.select(options.train.scaling.top)}
        if sae is None:
            raise UserError(f"{options.salience}: is of latents; give their SAE with --sae.")
        return PenalisedLatents(sae, table.found, table.site), None
    if not options.train.penalty or sae is None:
        return None, None
    if not isinstance(attack, AttackPairs):
        raise UserError(
            "--penalty: which latents read words is found on pictures with and without them. Give "
            "--salience with a table, or let words be written (--attack written)."
        )
    pairs = attack.select(range(min(SALIENCE_PAIRS, len(attack))))
    found = find_text_salient(model, pairs, sae, contrast="attack", workers=options.workers)
    if not found.found:
        raise UserError("--penalty: no latent of the SAE responds to words.")
    return PenalisedLatents(sae, found.found, found.site), None


def _block(site: str) -> int:
    """The block whose MLP's neurons a table is of."""
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
