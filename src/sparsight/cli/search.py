"""`sparsight search`: find images by text or image, with plain or edited embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from rich.console import Console

from sparsight.cli.help import Help
from sparsight.cli.opening import as_trained, open_index, open_model
from sparsight.cli.options import ModelOptions, parse
from sparsight.cli.printing import plain_table, print_notes
from sparsight.config import check_positive
from sparsight.editing.contact_sheet import WORDS, write_contact_sheet
from sparsight.editing.interventions import check_belongs
from sparsight.editing.latent_search import find_latents
from sparsight.editing.retrieval import (
    SITE,
    Mode,
    SearchResult,
    embed_collection,
)
from sparsight.errors import UserError
from sparsight.files import check_folder, write_json
from sparsight.folders import replaced
from sparsight.images import open_images
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel
from sparsight.vision.queries import check_query, read_query

FIGURES, PAGE = "search.json", "search.html"
Asked = Literal["plain", "reconstructed", "filtered", "query", "steered"]


HELP = Help(
    examples=(
        "'a dog on a beach' --images photos/ --model openai/clip-vit-base-patch32",
        "--image query.jpg --images photos/ --model openai/clip-vit-base-patch32",
        "'an anchor' --sae runs/embedding --modes plain reconstructed",
    ),
    needed=("query", "images", "model"),
    common=("image", "sae", "modes", "latents", "top", "out", "max-images"),
)


@dataclass(frozen=True)
class SearchOptions(ModelOptions):
    """Search images by text or by image.

    With an SAE on the site `embedding`, also search by its reconstructions, by some of its latents
    alone, or with latents set to a given activation.
    """

    query: tyro.conf.Positional[str] = ""
    """Text to search for; alternatively, give --image."""

    ALIASES: ClassVar[Mapping[str, str]] = {"picture": "image"}

    image: Annotated[Path | None, tyro.conf.arg(aliases=("--picture",))] = None
    """Image to search by. This also works with models without a joint space of images and texts:
    the comparison then uses CLS after the final norm or, without CLS, the mean over positions."""

    images: str | None = None
    """Images to search, in any form that `extract` takes; default: those on which the SAE was
    trained."""

    model: str | None = None
    """Vision model; default: the model that the SAE names."""

    sae: str | None = None
    """SAE on the site `embedding`: a run folder, a file, or a name on the Hub."""

    modes: tuple[Asked, ...] = ()
    """Kinds of search to compare side by side; default: plain, and with --sae also
    reconstructed."""

    latents: tuple[str, ...] = ()
    """Latents for the modes `filtered` and `steered`: numbers, or words from their names in the
    index."""

    activation: float | None = None
    """Activation to which the mode `steered` sets the latents; default: the largest of each latent
    in the collection."""

    query_latents: int = 8
    """Number of the query's strongest latents that the mode `query` keeps."""

    top: int = 24
    """Number of images to find."""

    index: Path | None = None
    """Latent index in which to look up names; default: index/ in the run, if it exists."""

    out: Path | None = None
    """Folder for search.json and search.html; default: search/."""

    max_images: int | None = None
    """Search in a random sample of this many images; default: all."""

    batch_images: int = 64
    """Images per batch."""

    check: bool = True
    """Refuse an SAE that was trained on a model with other weights, or at another site."""


def main(arguments: Sequence[str]) -> None:
    """Parse, search, print a table, write the page."""
    options = parse(SearchOptions, "search", arguments, helped=HELP)
    if bool(options.query) == (options.image is not None):
        raise UserError("Give either a text to search for, or --image FILE.")
    query = options.query if options.image is None else read_query(options.image)
    sae = None if options.sae is None else SparseAutoencoder.from_pretrained(options.sae)
    modes: tuple[Mode, ...] = options.modes or (
        ("plain",) if sae is None else ("plain", "reconstructed")
    )
    latents = _latents(options, sae)
    _check(options, modes, latents)
    check_positive(top=options.top, query_latents=options.query_latents)
    model, spec = _subject(options, sae)
    if isinstance(query, str):
        check_query(model, query)
    elif not model.has_joint_space:
        print_notes([f"{model.id}: images are compared by {model.image_embedding}."])
    if options.image is not None and model.min_side is not None:
        query = read_query(options.image, model.min_side)
    images = open_images(spec, table=options.table)
    print_notes(images.notes)
    out = check_folder(options.out or Path("search"))
    collection = embed_collection(
        model,
        images,
        max_images=options.max_images,
        batch_images=options.batch_images,
        workers=options.workers,
        quiet=False,
    )
    if collection.failed:
        print_notes([f"{len(collection.failed)} images could not be read and were left out."])
    results = collection.compare(
        query,
        modes,
        sae=sae,
        latents=latents,
        activation=options.activation,
        top=options.top,
        n_query_latents=options.query_latents,
        check=options.check,
        name=None if options.image is None else options.image.name,
    )
    with replaced(out, (FIGURES, PAGE)) as staged:
        write_json(staged / FIGURES, {"results": [result.to_dict() for result in results]})
        write_contact_sheet(results, images, staged / PAGE)
    _print(results)
    print(f"{out} · {FIGURES}, {PAGE}")


def _latents(options: SearchOptions, sae: SparseAutoencoder | None) -> list[int]:
    """Return the latents that --latents names."""
    if sae is None:
        return []
    index = open_index(options.index, Path(options.sae or ""), sae)
    return list(find_latents(options.latents, sae.n_latents, index))


def _subject(options: SearchOptions, sae: SparseAutoencoder | None) -> tuple[VisionModel, str]:
    """Return the model, and the images to search: as named, or else those of the SAE.

    Raises:
        UserError: they are not known, or the SAE belongs to another model or site.
    """
    about = {} if sae is None else sae.metadata.get("model") or {}
    spec = options.images or (None if sae is None else sae.metadata.get("images"))
    id, wanted = as_trained(about, options, options.model)
    if id is None or spec is None:
        raise UserError("Give --model and --images, or an SAE that names both.")
    model = open_model(id, wanted)
    if sae is not None:
        check_belongs(sae, model, model.canonical_site(SITE), strict=options.check)
    return model, spec


def _check(options: SearchOptions, modes: Sequence[Mode], latents: Sequence[int]) -> None:
    edited = [mode for mode in modes if mode != "plain"]
    if edited and options.sae is None:
        raise UserError(f"Mode {edited[0]!r} needs an SAE on the site embedding; give --sae.")
    for mode in ("filtered", "steered"):
        if mode in modes and not latents:
            raise UserError(f"Mode {mode!r} needs --latents.")
    if options.activation is not None and not math.isfinite(options.activation):
        raise UserError(f"--activation is {options.activation}; it must be a finite number.")
    if options.latents and not {"filtered", "steered"} & set(modes):
        raise UserError("--latents works only with --modes filtered or steered.")


def _print(results: Sequence[SearchResult]) -> None:
    table = plain_table()
    table.add_column("", justify="right")
    for result in results:
        table.add_column(WORDS[result.mode], overflow="fold")
    for i in range(max(len(result.hits) for result in results)):
        cells = []
        for result in results:
            hit = result.hits[i] if i < len(result.hits) else None
            words = "" if hit is None else f"{hit.cosine:.3f}  {hit.label or hit.id}"
            cells.append(words)
        table.add_row(str(i + 1), *cells)
    Console(markup=False, emoji=False).print(table)
    for result in results:
        if result.latents:
            print(f"{WORDS[result.mode]}: {', '.join(map(str, result.latents))}")
