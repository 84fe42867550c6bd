"""`sparsight attack measure | find | curate`: words that fool a model, and what reads them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from sparsight.cli.options import ModelOptions, parse
from sparsight.cli.printing import print_notes
from sparsight.cli.subject import open_saes
from sparsight.editing.actions import Off
from sparsight.editing.attacks import (
    AttackPairs,
    SalienceTable,
    Target,
    TextStyle,
    WorldBand,
    causal_check,
    curate,
    find_text_salient,
    make_pairs,
    measure_attack,
)
from sparsight.editing.attacks.curating import SENTENCE, Captions
from sparsight.editing.attacks.salience import (
    FDR,
    PERMUTATIONS,
    SELECTIVE,
    Alternative,
    Contrast,
    Read,
    Statistic,
)
from sparsight.errors import UserError
from sparsight.images import open_images
from sparsight.images.writing import Nonsense
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel, load_model

WIDTH = 120
VERBS = {
    "measure": "how far words on pictures mislead a model, as it is or with what was found off",
    "find": "which latents or neurons respond to words, and what switching them off wins back",
    "curate": "write the pictures that drive them most, with captions and scores",
}


@dataclass(frozen=True)
class PairOptions(ModelOptions):
    """Pictures and what is written on them."""

    images: str = tyro.MISSING
    """Pictures with labels, in any form that `extract` takes."""

    model: str | None = None
    """Vision model with a text tower; default the one that latents were found in."""

    n: int | None = None
    """So many pictures, chosen at random; default all."""

    seed: int = 0
    """Of words, places, choice of pictures and random latents."""

    classes: tuple[str, ...] = ()
    """Class names, if not those of the pictures' labels."""

    templates: str = "simple"
    """Sentences for zero-shot classification: simple, openai80, or one with {} in it."""

    writing: Literal["auto", "text", "world"] = "auto"
    """text: in the style below. world: on the calibration world's own band. auto: world on
    calibration scenes, text on other pictures."""

    style: TextStyle = field(default_factory=TextStyle)
    """How words look."""

    nonsense: Nonsense = "letters"
    """Of control pictures: letters as often as class names have them, or an anagram of the word."""

    batch_images: int = 64
    """Images at a time."""


@dataclass(frozen=True)
class MeasureOptions(PairOptions):
    """Measure a model on clean pictures, and with words of another class, of their own, of none."""

    off: tuple[Path, ...] = ()
    """Folders that `attack find` wrote: switch off what was found, beside random ones."""

    selectivity: float | None = None
    """Switch off those of at least so much; default what `attack find` was asked for."""

    draws: int = 10
    """Sets of random ones."""

    out: Path | None = None
    """File for the figures, as JSON."""


@dataclass(frozen=True)
class FindOptions(PairOptions):
    """Test each latent or neuron for a response to words, on one half of the pictures; switch off
    what was found on the other half."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders of SAEs; each is tested at its own site."""

    neurons: tuple[str, ...] = ()
    """Sites whose own coordinates are tested, e.g. blocks.7.mlp_post."""

    out: Path = Path("attack")
    """Gets a folder a site."""

    contrast: Contrast = "attack"
    """word: class name against nonsense. writing: nonsense against nothing. attack: class name
    against nothing."""

    statistic: Statistic = "mean"
    """Over a picture's positions."""

    alternative: Alternative = "greater"
    """More active, or otherwise active either way."""

    tokens: Read | None = None
    """Positions that are read and edited; default those that the SAE was trained on, else all."""

    fdr: float = FDR
    """False discovery rate."""

    selectivity: float = SELECTIVE
    """Of those found, switch off those of at least so much: 0.9 is 19 times as active with as
    without."""

    permutations: int = PERMUTATIONS
    """Sign flips of the test."""

    check: bool = True
    """Switch off what was found, beside random ones. Without, all pictures are for the search."""

    draws: int = 10
    """Sets of random ones."""


@dataclass(frozen=True)
class CurateOptions(ModelOptions):
    """Write the pictures that drive what was found most: a folder with captions, and a tar."""

    found: tyro.conf.Positional[tuple[Path, ...]] = tyro.MISSING
    """Folders that `attack find` wrote."""

    images: str = tyro.MISSING
    """Pictures to choose from, in any form that `extract` takes."""

    out: Path = Path("attack-set")
    """Folder to write; it must not be there yet."""

    model: str | None = None
    """Vision model; default the one that latents were found in."""

    n: int = 200
    """Pictures to keep."""

    captions: Captions = "labels"
    """own: those of the pictures. labels: labels in a sentence. zero-shot: the likeliest class in
    one. opinion: the words that come closest to the picture, by gradient ascent."""

    sentence: str = SENTENCE
    """What labels and classes stand in; {} is their place."""

    classes: tuple[str, ...] = ()
    """Of zero-shot captions; default the labels of the pictures."""

    words: int = 4
    """Of captions by opinion."""

    selectivity: float | None = None
    """Score by those of at least so much; default what `attack find` was asked for."""

    seed: int = 0
    """Of the search for opinions."""

    batch_images: int = 64
    """Images at a time."""


def main(arguments: Sequence[str]) -> None:
    """Find the verb behind `attack` and run it."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        raise SystemExit(0 if arguments else 2)
    verb, *rest = arguments
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"attack: there is no {verb!r}; it has {', '.join(VERBS)}.{hint}")
    {"measure": _measure, "find": _find, "curate": _curate}[verb](rest)


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return (
        "usage: sparsight attack {measure,find,curate} [OPTIONS]\n\n"
        "Words on pictures: how far they fool a model, and what in it reads them.\n\n"
        f"verbs:\n{verbs}\n\n"
        "`sparsight attack VERB --help` lists a verb's options; each writes what it finds to\n"
        "`--out`, and reads its options from `--config FILE.toml` too."
    )


def _measure(arguments: Sequence[str]) -> None:
    options = parse(MeasureOptions, "attack measure", arguments)
    tables = [SalienceTable.load(folder) for folder in options.off]
    model = _model(options, tables)
    pairs = _pairs(options)
    report: Any
    if tables:
        targets = [_target(table, options.selectivity, options.device) for table in tables]
        report = causal_check(
            model,
            pairs,
            targets,
            draws=options.draws,
            seed=options.seed,
            templates=options.templates,
            batch_size=options.batch_images,
            workers=options.workers,
            quiet=False,
        )
        if again := report.same_pictures:
            print_notes(
                [
                    f"on {again:,} of these {len(pairs):,} pictures they were found: the figures "
                    "flatter them, measure on others."
                ]
            )
    else:
        report = measure_attack(
            model,
            pairs,
            templates=options.templates,
            batch_size=options.batch_images,
            workers=options.workers,
            quiet=False,
        )
    _check_failed(report.failed, len(pairs), options.max_failed)
    _print(report.table())
    if options.out is not None:
        print(report.save(options.out))


def _find(arguments: Sequence[str]) -> None:
    options = parse(FindOptions, "attack find", arguments)
    if not options.runs and not options.neurons:
        raise UserError(
            "Nothing to test: name run folders of SAEs, or sites with --neurons, e.g. "
            "blocks.-2.mlp_post."
        )
    saes = open_saes(options.runs, options.device) if options.runs else {}
    ids = {(sae.metadata.get("model") or {}).get("id") for sae in saes.values()} - {None}
    if options.model is None and len(ids) != 1:
        raise UserError("Which model? Name it with --model.")
    model = load_model(
        options.model or str(ids.pop()),
        device=options.device,
        dtype=options.model_dtype,
        revision=options.revision,
        scale_jpegs=options.scale_jpegs,
    )
    whole = _pairs(options)
    pairs, others = whole.halves(options.seed) if options.check else (whole, None)
    jobs: list[tuple[str, Path | None, SparseAutoencoder | None]] = [
        *((str(sae.metadata.get("site")), folder, sae) for folder, sae in saes.items()),
        *((model.canonical_site(site), None, None) for site in options.neurons),
    ]
    names = [site if sae is not None else f"{site}-neurons" for site, _, sae in jobs]
    if len(set(names)) < len(names):
        raise UserError("Two of the runs are at one site; find them one by one, with other --out.")
    for name, (site, folder, sae) in zip(names, jobs, strict=True):
        table = find_text_salient(
            model,
            pairs,
            sae,
            site=site,
            tokens=options.tokens,
            contrast=options.contrast,
            statistic=options.statistic,
            alternative=options.alternative,
            fdr=options.fdr,
            selectivity=options.selectivity,
            permutations=options.permutations,
            seed=options.seed,
            batch_size=options.batch_images,
            workers=options.workers,
            quiet=False,
        )
        _check_failed(table.about["failed"], len(pairs), options.max_failed)
        if folder is not None:
            table.about["sae_folder"] = str(folder.absolute())
        place = table.save(options.out / name)
        kind = table.about["unit"]
        print(
            f"{place}: {len(table.found):,} of {table.about['n_tested']:,} {kind}s respond to "
            f"{table.about['compares']} (false discovery rate {table.about['fdr']}), "
            f"{len(table.selective):,} of them with a selectivity of "
            f"{table.about['selectivity']} or more"
        )
        if table.fewest > 1:
            print_notes(
                [
                    f"{site}: with {table.about['permutations']:,} flips fewer than {table.fewest} "
                    f"of {table.about['n_tested']:,} {kind}s are never found, however strong; more "
                    "--permutations find single ones."
                ]
            )
        if others is None:
            continue
        if not table.selective:
            print_notes([f"{site}: nothing to switch off."])
            continue
        report = causal_check(
            model,
            others,
            Target(table, None, sae),
            draws=options.draws,
            seed=options.seed,
            templates=options.templates,
            batch_size=options.batch_images,
            workers=options.workers,
            quiet=False,
        )
        _check_failed(report.failed, len(others), options.max_failed)
        report.save(place / "causal.json")
        _print(report.table())


def _curate(arguments: Sequence[str]) -> None:
    options = parse(CurateOptions, "attack curate", arguments)
    tables = [SalienceTable.load(folder) for folder in options.found]
    model = _model(options, tables)
    source = open_images(options.images, table=options.table)
    print_notes(source.notes)
    made = curate(
        model,
        source,
        [_target(table, options.selectivity, options.device) for table in tables],
        options.out,
        n=options.n,
        captions=options.captions,
        sentence=options.sentence,
        class_names=options.classes or None,
        words=options.words,
        max_failed=options.max_failed,
        seed=options.seed,
        batch_size=options.batch_images,
        workers=options.workers,
        quiet=False,
    )
    if made.failed:
        print_notes([f"{made.failed:,} pictures could not be loaded."])
    print(
        f"{made.folder}: {made.n:,} of {made.n_seen:,} pictures, scores {made.highest:.2f} to "
        f"{made.lowest:.2f}"
    )


def _model(options: Any, tables: Sequence[SalienceTable]) -> VisionModel:
    ids = {str(table.about["model"]) for table in tables}
    if options.model is None and len(ids) != 1:
        raise UserError("Which model? Name it with --model.")
    model = load_model(
        options.model or ids.pop(),
        device=options.device,
        dtype=options.model_dtype,
        revision=options.revision,
        scale_jpegs=options.scale_jpegs,
    )
    for table in tables:
        if table.about["weights_hash"] != model.weights_hash:
            raise UserError(
                f"{table.site}: what responds to words was found in {table.about['model']} "
                f"(weights {table.about['weights_hash'][:8]}), this is {model.id} (weights "
                f"{model.weights_hash[:8]}). Find it anew."
            )
    return model


def _pairs(options: PairOptions) -> AttackPairs:
    source = open_images(options.images, table=options.table)
    style: TextStyle | WorldBand | None = options.style
    if options.writing == "world":
        style = WorldBand()
    elif options.writing == "auto" and options.style == TextStyle():
        style = None
    pairs = make_pairs(
        source,
        options.classes or None,
        style,
        n=options.n,
        seed=options.seed,
        nonsense=options.nonsense,
    )
    print_notes(pairs.notes)
    return pairs


def _target(table: SalienceTable, selectivity: float | None, device: str | None) -> Target:
    sae = None
    if table.about["unit"] == "latent":
        folder = table.about.get("sae_folder")
        if folder is None:
            raise UserError(
                f"{table.site}: the table does not say where the SAE of these latents is; only "
                "tables that `sparsight attack find` wrote do. Use causal_check in Python."
            )
        if not Path(folder).is_dir():
            raise UserError(
                f"{table.site}: the SAE of these latents was at {folder}, and is not there now."
            )
        (sae,) = open_saes([Path(folder)], device).values()
    chosen = None if selectivity is None else table.select(selectivity=selectivity)
    return Target(table, chosen, sae, Off())


def _check_failed(failed: dict[str, int], n: int, allowed: float) -> None:
    """Tell of pictures that did not load; stop if they are many.

    Raises:
        UserError: a larger share than `allowed` failed.
    """
    for kind, count in failed.items():
        print(f"note: {count:,} of {n:,} {kind} pictures did not load; left out.", file=sys.stderr)
    worst = max(failed.values(), default=0)
    if worst > allowed * n:
        raise UserError(
            f"{worst:,} of {n:,} pictures did not load, more than {allowed:.1%} (--max-failed)."
        )


def _print(rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    head, *body = rows
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in body:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # figures with their intervals need room; a pipe has it
        console = Console(width=WIDTH)
    console.print(table)
