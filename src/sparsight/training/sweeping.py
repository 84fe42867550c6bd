"""Several autoencoders in one pass over the activations: the product of a grid and the sites.

A sweep is a folder of ordinary runs. While they train, they share the checkpoints next to them;
`sweep.toml` can repeat the sweep, and `sweep.json` holds the latest metrics of every member.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsight.activations import ActivationSource, HeldOut
from sparsight.config import write_toml
from sparsight.devices import choose_device
from sparsight.errors import SparsightError, UserError
from sparsight.figures import shown_in
from sparsight.files import read_json, write_json
from sparsight.notebooks import data_frame
from sparsight.pace import SECONDS, Pace
from sparsight.runs import checkpoint_files
from sparsight.runs.folder import RunFolder
from sparsight.sae.files import WEIGHTS
from sparsight.training import checkpoint
from sparsight.training.config import TrainConfig, TrainRecipe, stored_recipe
from sparsight.training.grid import TOKENS, Setting, checked, combinations, configuration
from sparsight.training.identity import holds_part, identity
from sparsight.training.planning import Activations, recipe_of, resolve, with_length, with_target
from sparsight.training.run import (
    CONFIG,
    DIVERGED,
    SWEEP,
    WRITTEN,
    Run,
    diverged,
    refuse_foreign_files,
)
from sparsight.training.trainer import Member, train_members
from sparsight.vision import Tokens

if TYPE_CHECKING:
    import pandas

TABLE = "sweep.json"
FORMAT_VERSION = 1
_TABLES = (SWEEP, TABLE, "table.json", "table.csv", "table.md")
"""Files in a sweep's folder, written here and by `compare`, which also writes `plots/`."""
FIGURES = (*(figure.key for figure in shown_in("log")), "vectors_per_second")


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep trains: every combination of the values in a grid, at every site."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """The configuration that all members share."""

    grid: dict[str, Any] = field(default_factory=dict)
    """Lists of values by dotted path into `train`, e.g. `sae.sparsity.k`, `remedy.alpha`, `seed`;
    `k`, `n_latents`, `expansion` and `architecture` are short for fields of `sae`. A whole part is
    a table, a name or a dataclass: `architecture = ["topk", {kind = "relu", l1 = 1e-3}]`. `tokens`
    varies the positions. In TOML, `[grid]`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", checked(self.grid, self.train))
        self.members  # noqa: B018  # to report an invalid combination at once

    @cached_property
    def members(self) -> dict[str, tuple[Setting, TrainConfig]]:
        """The grid's values and the resulting configuration, by name, e.g. `k32-n2048-seed1`."""
        return {
            each.name: (each.setting, configuration(each, self.train))
            for each in combinations(self.grid, self.train)
        }


@dataclass(frozen=True)
class SweepRecipe(TrainRecipe):
    """A whole sweep, as `sparsight sweep --config FILE.toml` reads it."""

    out: Path = Path("runs/sweep")
    """Folder of the sweep."""

    grid: dict[str, Any] = field(default_factory=dict)
    """Settings to vary: lists of values by dotted path into `train`; [grid] in a config file."""


@dataclass(frozen=True)
class Sweep(RunFolder):
    """A finished sweep.

    Attributes:
        out: its folder, which also holds the shared checkpoints.
        runs: its members by name, each an ordinary run in `out/NAME`.
        settings: the grid's values of each member, by name.
    """

    runs: Mapping[str, Run]
    settings: Mapping[str, Setting]

    def written(self) -> list[tuple[Path, Collection[str]]]:
        """Return the folders of SAEs, checkpoints and tables, with the files that are written."""
        members = [run.folder(site) for run in self.runs.values() for site in run.sites]
        return [
            *((folder, WRITTEN) for folder in members),
            (self.checkpoints, checkpoint_files.PARTIAL),
            (self.out, _TABLES),
            (self.out / "plots", ["*"]),
        ]

    def table(self) -> list[dict[str, Any]]:
        """Return one row per autoencoder.

        It holds `name`, `site`, `folder` (in `out`), `settings`, and the last line of the metrics:
        `fvu`, `l0`, `dead` (over the vectors since the previous line) and `vectors_per_second` (of
        the whole pass). If the autoencoder diverged, `diverged` gives the reason instead.
        """
        return [self._row(name, run, site) for name, run in self.runs.items() for site in run.sites]

    def to_pandas(self) -> pandas.DataFrame:
        """Return `table` as a pandas data frame: one row per autoencoder, one column per setting
        that varies.

        Raises:
            MissingExtra: pandas is not installed.
        """
        rows = self.table()
        return data_frame([{**row, **row.pop("settings")} for row in rows])

    def _row(self, name: str, run: Run, site: str) -> dict[str, Any]:
        folder = run.folder(site)
        row: dict[str, Any] = {
            "name": name,
            "site": site,
            "folder": folder.relative_to(self.out).as_posix(),
            "settings": self.settings[name],
        }
        reason = diverged(folder)
        if reason is not None:
            return {**row, "diverged": reason}
        last = (run.metrics(site) or [{}])[-1]
        return {**row, **{key: last.get(key) for key in FIGURES}}


def sweep(
    source: Activations,
    config: SweepConfig,
    out: str | Path = "runs/sweep",
    *,
    sites: Sequence[str] | None = None,
    tokens: Tokens | None = None,
    held_out: HeldOut | float | None = None,
    resume: bool = True,
    device: str | torch.device | None = None,
    checkpoint_seconds: float | None = SECONDS,
    quiet: bool = False,
) -> Sweep:
    """Train an SAE for every combination in a grid on each site, all in one pass.

    If `tokens` or `batch_size` vary, there is one pass per value. Every member ends with exactly
    the same bits as if it were trained alone on the same sites, as an ordinary run in `out/NAME`
    (`out/NAME/SITE` if there are several sites). A member whose loss becomes infinite or NaN is
    dropped with a warning, and the others continue.

    Args:
        source: an activation store, live activations, or a model and its images.
        config: what to train.
        out: folder of the sweep. Finished members stay as they are; the others continue from their
            last shared checkpoint, with the same bits; members that a larger grid adds train in one
            new pass.
        sites: sites of the source to train on; all by default.
        tokens: as in `train`.
        held_out: as in `train`.
        resume: False refuses a folder that holds a sweep.
        device: "cpu", "cuda", …; by default a GPU if there is one.
        checkpoint_seconds: as in `train`, also for Ctrl-C and SIGTERM.
        quiet: show no progress line, and do not report what is already done.

    Returns:
        The sweep.

    Raises:
        UserError: a member's folder holds another run, another process is training into `out`, or a
            configuration does not fit the activations.
        SparsightError: activations are infinite or NaN, or the loss of every member becomes so; the
            last checkpoint stays.
    """
    place = choose_device(device, float64=True)
    out, pace = Path(out), Pace(checkpoint_seconds)
    sources, names, config = _resolved(source, sites, tokens, config)
    held_out = HeldOut.of(held_out)
    if held_out is not None:
        sources = {mode: held_out.split(each)[0] for mode, each in sources.items()}
    length = with_length(config.train, list(sources.values()), names, out / SWEEP)
    if length != config.train:
        config = dataclasses.replace(config, train=length)
    first = next(iter(sources.values()))
    for each in sources.values():
        for site in names:
            each.canonical_site(site)
            for _, train in config.members.values():
                train.sae.width(each.d_in(site))
    _refuse_single_run(out, resume)
    recipes = _recipes(out, sources, names, config, held_out)
    settings = [setting for setting, _ in config.members.values()]
    result = Sweep(
        out,
        {name: Run(out / name, names) for name in recipes},
        dict(zip(recipes, settings, strict=True)),
    )
    begun = checkpoint.identities(result.checkpoints)
    for name, run in result.runs.items():
        own = identity(recipes[name])
        holds_part(run, recipes[name], all(begun.get(f"{name}/{each}") == own for each in names))
    if list(_pending(result, recipes)) or result.checkpoints.exists() or result.has_leftovers():
        with result.claimed():
            _refuse_to_drop(result)
            result.clear()
            _write_recipe(first, names, config, out, held_out)
            read = with_target(names, config.train)
            while _train_together(sources, read, result, recipes, place, pace, quiet):
                pass
    return _settled(result)


def _resolved(
    source: Activations, sites: Sequence[str] | None, tokens: Tokens | None, config: SweepConfig
) -> tuple[dict[str, ActivationSource], tuple[str, ...], SweepConfig]:
    """Return the activations for each choice of positions, the sites, and the configuration."""
    modes = config.grid.get(TOKENS)
    if modes is not None and tokens is not None:
        raise UserError("tokens vary in the grid; leave them out elsewhere.")
    sources = {}
    for mode in modes or (tokens,):
        activations, names, train = resolve(source, config.train, sites, mode)
        sources[activations.tokens] = activations
    if train != config.train:  # a transcoder's target got its full name
        config = dataclasses.replace(config, train=train)
    return sources, names, config


def _train_together(
    sources: Mapping[str, ActivationSource],
    read: Sequence[str],
    sweep: Sweep,
    recipes: Mapping[str, TrainRecipe],
    device: torch.device,
    pace: Pace,
    quiet: bool,
) -> bool:
    """Train members that can share a pass; return False if nothing is left to train."""
    pending = list(_pending(sweep, recipes))
    held = checkpoint.identities(sweep.checkpoints)
    begun = [member for member in pending if member.name in held]
    together = begun or pending
    together = [member for member in together if _pass(member) == _pass(together[0])]
    if (held and not begun) or not pending:  # checkpoints of a pass whose members are all finished
        shutil.rmtree(sweep.checkpoints, ignore_errors=True)
    if not pending:
        return False
    sites = next(iter(sweep.runs.values())).sites
    total = len(sweep.runs) * len(sites)
    if not quiet and (len(pending) < total or begun):
        print(
            f"sweep: {total - len(pending)} of {total} autoencoders are done, {len(pending)} are "
            f"missing" + (f"; {len(begun)} continue from a checkpoint." if begun else "."),
            file=sys.stderr,
        )
    source = sources[_pass(together[0])[0]]
    train_members(
        source,
        read,
        together,
        sweep.checkpoints,
        "sweep",
        device,
        pace,
        quiet,
        drop_diverged=True,
    )
    shutil.rmtree(sweep.checkpoints, ignore_errors=True)
    return True


def _pass(member: Member) -> tuple[str, int]:
    """Return what the members of one pass share: the positions, and the size of a batch."""
    return str(member.recipe.tokens), member.config.batch_size


def _pending(sweep: Sweep, recipes: Mapping[str, TrainRecipe]) -> Iterator[Member]:
    """Yield the members that have neither an SAE nor diverged."""
    for name, run in sweep.runs.items():
        for site in run.sites:
            folder = run.folder(site)
            if not run.is_finished(site) and diverged(folder) is None:
                yield Member(f"{name}/{site}", site, folder, recipes[name])


def _recipes(
    out: Path,
    sources: Mapping[str, ActivationSource],
    sites: tuple[str, ...],
    config: SweepConfig,
    held_out: HeldOut | None,
) -> dict[str, TrainRecipe]:
    """Return the recipes of the members, by name; an existing run keeps its name.

    A new key in the grid adds a part to every name.
    """
    there = {}
    for path in (*out.glob(f"*/{CONFIG}"), *out.glob(f"*/*/{CONFIG}")):
        name = path.relative_to(out).parts[0]
        with suppress(UserError):  # `holds_part` reports damaged ones
            there[json.dumps(identity(stored_recipe(path)), sort_keys=True)] = name
    recipes = {}
    for name, (setting, train) in config.members.items():
        source = sources[setting[TOKENS]] if TOKENS in setting else next(iter(sources.values()))
        recipe = recipe_of(source, Run(out / name, sites), train, held_out)
        kept = there.get(json.dumps(identity(recipe), sort_keys=True), name)
        recipes[kept] = dataclasses.replace(recipe, out=out / kept)
    return recipes


def _settled(sweep: Sweep) -> Sweep:
    """Write the sweep's table and return the sweep; raise an error if all members diverged."""
    rows = sweep.table()
    table = {"format_version": FORMAT_VERSION, "members": rows}
    path = sweep.out / TABLE
    if _read_or_none(path) != json.loads(json.dumps(table)):
        write_json(path, table)
    reasons = [row["diverged"] for row in rows if "diverged" in row]
    if len(reasons) == len(rows):
        raise SparsightError(
            f"{sweep.out}: every autoencoder of the sweep diverged. {reasons[0]} Choose another "
            "folder and lower learning rates."
        )
    return sweep


def _read_or_none(path: Path) -> dict[str, Any] | None:
    """Return the contents of a file that can be rewritten; None if it is missing or damaged."""
    try:
        return read_json(path)
    except UserError:
        return None


def _refuse_single_run(out: Path, resume: bool) -> None:
    if (out / SWEEP).exists():
        if not resume:
            raise UserError(f"{out} already holds a sweep. Choose another folder, or resume it.")
    elif (out / CONFIG).exists() or (out / "checkpoints").exists():
        raise UserError(f"{out} holds a single run. Choose another folder for a sweep.")
    else:
        refuse_foreign_files(out)


def _refuse_to_drop(sweep: Sweep) -> None:
    """Raise a `UserError` if a run that is not part of this sweep would lose its checkpoint."""
    own = {f"{name}/{site}" for name, run in sweep.runs.items() for site in run.sites}
    cut = []
    for member in sorted(checkpoint.identities(sweep.checkpoints).keys() - own):
        name, _, site = member.partition("/")
        folders = (sweep.out / name, sweep.out / name / site)
        if not any((each / end).exists() for each in folders for end in (WEIGHTS, DIVERGED)):
            cut.append(member)
    if cut:
        raise UserError(
            f"{sweep.out}: holds an interrupted sweep, with {', '.join(cut[:3])}"
            f"{', …' if len(cut) > 3 else ''}. Finish it first, or choose another folder; "
            f"`sparsight sweep --config {shlex.quote(str(sweep.out / SWEEP))}` repeats it."
        )


def _write_recipe(
    source: ActivationSource,
    sites: tuple[str, ...],
    config: SweepConfig,
    out: Path,
    held_out: HeldOut | None,
) -> None:
    recipe = recipe_of(source, Run(out, sites), config.train, held_out)
    own = {item.name: getattr(recipe, item.name) for item in dataclasses.fields(recipe)}
    if TOKENS in config.grid:
        own |= {"tokens": None, "activations": None}
    write_toml(out / SWEEP, SweepRecipe(**own, grid=config.grid))
