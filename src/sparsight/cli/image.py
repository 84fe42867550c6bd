"""`sparsight image`: list the latents that fire in one image, and at each of its patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import tyro

from sparsight.cli.help import Help
from sparsight.cli.listing import print_rows, save_rows, sorted_by, with_sort_joined
from sparsight.cli.opening import as_trained, open_model, open_run_index
from sparsight.cli.options import CommandOptions, ModelOptions, parse
from sparsight.cli.patch_grid import patch_rows, print_patches
from sparsight.cli.printing import print_notes
from sparsight.config import check_positive
from sparsight.errors import UserError
from sparsight.latents import LatentIndex
from sparsight.latents.filters import filtered
from sparsight.latents.one_image import ImageLatents, image_latents, place_of
from sparsight.latents.run_files import read_run
from sparsight.latents.stored import find_stored
from sparsight.sae import SparseAutoencoder, SparseCode
from sparsight.text import shortened

COLUMNS = ("latent", "activation", "relative", "patch", "n_active_images", "name", "top_label",
           "top_label_share")  # fmt: skip

HELP = Help(
    examples=(
        "runs/b32-l9 mine.png",
        "runs/b32-l9 17 --where 'n_active_images < 100'",
        "runs/b32-l9 cat/017.jpg --patches",
    ),
    needed=("run", "photo"),
    common=("patches", "where", "sort", "limit", "csv"),
)


@dataclass(frozen=True)
class ImageOptions(CommandOptions):
    """List the latents that fire in one image, the strongest first, with their names.

    An image of the collection is looked up in the index; for another one, the model runs.
    """

    run: tyro.conf.Positional[Path | None] = None
    """Run folder, or folder of an index. Required."""

    photo: tyro.conf.Positional[str] = ""
    """Image file; or an image of the collection, by its place (a number) or its id. Required."""

    patches: bool = False
    """Show which latents are the strongest at each patch."""

    where: str | None = None
    """Condition on columns, of `sparsight latents` or of this list: 'relative > .5 and name'."""

    sort: str | None = None
    """Column to order by, largest first with a minus: --sort=-relative; default: -activation."""

    limit: int = 40
    """Largest number of rows to print; files get all rows."""

    csv: Path | None = None
    """File for all columns of the listed latents; with --patches, one row per patch and latent."""

    json: Path | None = None
    """The same as JSON."""

    model: str | None = None
    """Vision model; default: the model that the SAE names."""

    device: str | None = None
    """cpu, cuda, cuda:1, xpu or mps; default: a CUDA or Intel GPU if available, otherwise cpu."""

    index: Path | None = None
    """Latent index; default: index/ in the run."""


def main(arguments: Sequence[str]) -> None:
    """Parse, look up or compute, print."""
    joined = with_sort_joined(arguments)
    options = parse(ImageOptions, "image", joined, helped=HELP)
    check_positive(limit=options.limit)
    if options.run is None or not options.photo:
        raise UserError("Name a run and an image: sparsight image RUN PHOTO.")
    index, sae = open_run_index(options.run, options.index, options.device)
    found = _latents(options, options.run, index, sae)
    table = found.table if options.where is None else filtered(found.table, options.where)
    table = sorted_by(table, options.sort)
    chosen = table["latent"].to_pylist()
    rows = patch_rows(found, chosen) if options.patches else table
    save_rows(rows, options.csv, options.json)
    label = "" if found.info.label is None else f" · {found.info.label}"
    place = "" if found.image is None else f" · image {found.image} of the collection"
    print(f"{found.info.id}{label}{place}")
    if options.patches:
        print_patches(found, chosen, options.limit)
    else:
        _print(found, table, options)


def _print(found: ImageLatents, table: pa.Table, options: ImageOptions) -> None:
    shown = table.slice(0, options.limit)
    patches = [found.patch_at(position) for position in shown["position"].to_pylist()]
    words = [None if patch is None else f"{patch[0]},{patch[1]}" for patch in patches]
    chosen = [options.sort.removeprefix("-")] if options.sort else []
    if shown.num_rows:
        print_rows(shown.append_column("patch", pa.array(words, pa.string())), [*COLUMNS, *chosen])
    hidden = table.num_rows - shown.num_rows
    more = f"; --limit {table.num_rows} prints all" if hidden else ""
    some = "" if table.num_rows == len(found) else f" of {len(found):,}"
    print(f"{table.num_rows:,}{some} latents fire{more}")


def _latents(
    options: ImageOptions, run: Path, index: LatentIndex, sae: SparseAutoencoder | None
) -> ImageLatents:
    place = _place(options.photo, index)
    if place is not None and not options.patches and index.version > 1:
        return image_latents(index, place)
    if place is None and not _is_file(options.photo):
        raise UserError(
            f"{shortened(options.photo, 200)}: is neither an image file, nor the id of an image "
            f"in {index.folder}."
        )
    if sae is None:
        raise UserError(
            f"{run}: this needs the SAE of the index; give the run folder instead of the "
            "index, and the index with --index."
        )
    image: int | Path = Path(options.photo) if place is None else place
    if isinstance(image, int):
        index.info(image)  # it exists
        code = _stored(run, index, image)
        if code is not None:
            return image_latents(index, image, code=code)
    about = index.manifest["model"]
    id, wanted = as_trained(about, ModelOptions(device=options.device), options.model)
    if id is None:
        raise UserError(f"{run}: names no model. Give one with --model.")
    return image_latents(index, image, sae=sae, model=open_model(id, wanted))


def _place(photo: str, index: LatentIndex) -> int | None:
    """Return the place of an image of the collection; None if the text is not one."""
    if photo.isdecimal():
        return int(photo)
    place = place_of(index, photo)
    if place is not None and _is_file(photo):
        uri = index.info(place).uri
        if Path(photo).resolve() != Path(uri).resolve():
            note = f"{photo} is the id of an image of the collection; ./{photo} is the file."
            print_notes([note])
    return place


def _is_file(photo: str) -> bool:
    """Return whether a text is the path of a file; one that is too long for a path is not."""
    try:
        return Path(photo).is_file()
    except OSError:
        return False


def _stored(folder: Path, index: LatentIndex, image: int) -> SparseCode | None:
    """Return the code of an image from codes or activations on disk, if there are any."""
    run = replace(read_run(folder, folder.name), index=index)
    stored = find_stored(run)
    return None if stored is None else stored.code(image)
