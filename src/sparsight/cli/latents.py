"""`sparsight latents`: list, filter and describe the latents of a run, and query its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import tyro

from sparsight.cli.help import Help
from sparsight.cli.latent_card import print_card
from sparsight.cli.listing import COLUMNS, print_rows, save_rows, sorted_by, with_sort_joined
from sparsight.cli.opening import open_run_index
from sparsight.cli.options import CommandOptions, parse
from sparsight.cli.printing import print_table
from sparsight.config import check_positive
from sparsight.editing.latent_search import find_latents
from sparsight.errors import UserError
from sparsight.figures import percent
from sparsight.latents import LatentIndex
from sparsight.latents.export import export_index
from sparsight.latents.expressions import close_to
from sparsight.latents.query import QueryResult

HELP = Help(
    examples=(
        "runs/b32-l9",
        "runs/b32-l9 --where 'density < .01 and moran > .3' --sort -moran",
        "runs/b32-l9 --label star --csv star.csv",
        "runs/b32-l9 12 40",
        "runs/b32-l9 --query '12 > .5 and not 4'",
    ),
    needed=("run", "latents"),
    common=("where", "label", "name", "sort", "limit", "query", "csv", "export"),
)


@dataclass(frozen=True)
class LatentsOptions(CommandOptions):
    """List and filter the latents of a run, describe single ones, or find images by a query.

    It reads the index of the run; no model runs.
    """

    run: tyro.conf.Positional[Path | None] = None
    """Run folder, or folder of an index. Required."""

    latents: tyro.conf.Positional[tuple[str, ...]] = ()
    """Latents to describe, by number or by words from their names; default: list all."""

    where: str | None = None
    """Condition on columns of the table: 'density < .01 and (moran > .3 or not name)'."""

    label: str | None = None
    """List only latents whose most frequent label on the top-activating images is this one."""

    name: str | None = None
    """List only latents whose name contains this text."""

    sort: str | None = None
    """Column to order by, largest first with a minus: --sort=-density. By default, latents are in
    order of their numbers."""

    limit: int = 40
    """Largest number of rows to print; files get all rows."""

    query: str | None = None
    """Find images: '12 > .5 and 977 > .2 and not 4', with activations of latents, or
    'label == "star" and 12'."""

    csv: Path | None = None
    """File for all columns of the listed latents, or for the images that a query finds."""

    json: Path | None = None
    """The same as JSON."""

    export: Path | None = None
    """Folder for the whole index as Parquet files, for SQL."""

    index: Path | None = None
    """Latent index; default: index/ in the run."""


def main(arguments: Sequence[str]) -> None:
    """Parse, then list, describe, query or export."""
    options = parse(LatentsOptions, "latents", with_sort_joined(arguments), helped=HELP)
    check_positive(limit=options.limit)
    _check(options)
    if options.run is None:
        raise UserError("Name the run whose latents to list: sparsight latents RUN.")
    index, _ = open_run_index(options.run, options.index)
    if options.export is not None:
        folder = export_index(index, options.export)
        print(f"{folder} · postings.parquet, latents.parquet, images.parquet")
    elif options.query is not None:
        _query(index, options.query, options)
    elif options.latents:
        words = dict.fromkeys(options.latents)
        for place, latent in enumerate(find_latents(list(words), index.n_latents, index)):
            if place:
                print()
            print_card(index, latent, options.run)
    else:
        _list(index, options)


def _check(options: LatentsOptions) -> None:
    """Refuse options that do nothing together."""
    filters = {"--where": options.where, "--label": options.label, "--name": options.name,
               "--sort": options.sort}  # fmt: skip
    kinds = {"--export": options.export, "--query": options.query,
             "numbers of latents": options.latents or None}  # fmt: skip
    asked = [name for name, value in kinds.items() if value is not None]
    if len(asked) > 1:
        raise UserError(f"Give either {asked[0]} or {asked[1]}.")
    used = [name for name, value in filters.items() if value is not None]
    if asked and used:
        raise UserError(f"{used[0]} filters the list of latents; it does nothing with {asked[0]}.")
    files = {"--csv": options.csv, "--json": options.json}
    written = [name for name, value in files.items() if value is not None]
    if written and asked and asked != ["--query"]:
        raise UserError(f"{written[0]} saves a list or a query; it does nothing with {asked[0]}.")


def _list(index: LatentIndex, options: LatentsOptions) -> None:
    table = index.table if options.where is None else index.where(options.where)
    if options.label is not None:
        _check_label(index, options.label)
        table = table.filter(pc.equal(table["top_label"], options.label))
    if options.name is not None:
        table = table.filter(
            pc.fill_null(pc.match_substring(table["name"], options.name, ignore_case=True), False)
        )
    table = sorted_by(table, options.sort)
    save_rows(table, options.csv, options.json)
    shown = table.slice(0, options.limit)
    if table.num_rows:
        chosen = [options.sort.lstrip("-")] if options.sort else []
        print_rows(shown, [*COLUMNS, *chosen])
    hidden = table.num_rows - shown.num_rows
    more = f"; --limit {table.num_rows} prints all" if hidden else ""
    print(f"{table.num_rows:,} of {index.n_latents:,} latents{more}")


def _check_label(index: LatentIndex, label: str) -> None:
    known = index.images["label"].unique().drop_null().to_pylist()
    if label not in known:
        raise UserError(
            f"--label {label}: no image has this label.{close_to(label, known)} There are "
            f"{len(known):,} labels."
        )


def _query(index: LatentIndex, text: str, options: LatentsOptions) -> None:
    found = index.query(text)
    rows = _image_table(found)
    save_rows(rows, options.csv, options.json)
    shown = rows.slice(0, options.limit)
    if found.labels:
        head = ("label", "images", "share", "in the collection", "lift")
        shares = [
            (share.label, f"{share.n:,}", percent(share.share), percent(share.base_share),
             f"{share.lift:.2f}")
            for share in found.labels[:10]
        ]  # fmt: skip
        print_table([head, *shares])
        if len(found.labels) > len(shares):
            print(f"and {len(found.labels) - len(shares):,} more labels")
        print()
    if len(found):
        print_rows(shown, shown.column_names)
    hidden = len(found) - shown.num_rows
    more = f"; --limit {len(found)} prints all" if hidden else ""
    print(f"{len(found):,} of {len(index.image_places):,} images{more}")


def _image_table(found: QueryResult) -> pa.Table:
    """Return the images of a query, the strongest first, with the activations of its latents."""
    order = found.strongest_order()
    infos = found.infos()
    columns = {
        "image": pa.array(found.places[order]),
        "id": pa.array([infos[i].id for i in order], pa.string()),
        "label": pa.array([infos[i].label for i in order], pa.string()),
    }
    for number, latent in enumerate(found.latents):
        columns[f"latent_{latent}"] = pa.array(found.activations[order, number])
    return pa.table(columns)
