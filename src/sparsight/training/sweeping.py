"""Several autoencoders in one pass over the activations: the product of a grid and the sites.

A sweep is a folder of ordinary runs. While they train their checkpoints lie together beside them;
`sweep.toml` repeats the sweep, and `sweep.json` holds the latest figures of every member.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import shutil
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsight.activations import ActivationSource
from sparsight.config import NONE, from_dict, load, to_dict, write_toml
from sparsight.errors import SparsightError, UserError
from sparsight.files import lock, read_json, write_json
from sparsight.sae.files import WEIGHTS
from sparsight.training import checkpoint
from sparsight.training.config import TrainConfig, TrainRecipe
from sparsight.training.run import CONFIG, DIVERGED, SWEEP, Run
from sparsight.training.trainer import (
    Activations,
    Loop,
    Member,
    as_activations,
    chosen_sites,
    holds_part,
    identity,
    recipe_of,
)
from sparsight.vision import Tokens

TABLE = "sweep.json"
FORMAT_VERSION = 1
FIGURES = ("fvu", "l0", "dead", "vectors_per_second")

SHORT_NAMES = {"k": "sae.sparsity.k", "n_latents": "sae.n_latents"}
"""What may be written instead of a path; `seed` and `lr` are paths already."""

_LABELS = {"sae.sparsity.k": "k", "sae.n_latents": "n"}
_PASS = "the members share one pass, and with it"
_SHARED = {
    "batch_size": f"{_PASS} the batches",
    "n_vectors": f"{_PASS} its length",
    "data_seed": f"{_PASS} the order of the data; `seed` varies the initial weights alone",
    "log_every": f"{_PASS} the steps at which figures are logged",
    "checkpoint_every": f"{_PASS} the checkpoints",
    "loggers": "it changes nothing about what is learnt",
}
"""Why some keys cannot vary."""

Setting = dict[str, Any]
"""A value for each key of a grid."""


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep trains: every combination of the values in a grid, at every site."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """What the members have in common."""

    grid: dict[str, Any] = field(default_factory=dict)
    """Lists of values by dotted path into `train`, e.g. `sae.sparsity.k`, `auxk.alpha`, `seed`;
    `k`, `n_latents`, `seed` and `lr` will do for these. In TOML, `[grid]`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", _checked_grid(self.grid, self.train))
        self.members  # noqa: B018  # so that a combination that does not fit is told of at once

    @cached_property
    def members(self) -> dict[str, tuple[Setting, TrainConfig]]:
        """By name, e.g. `k32-n2048-seed1`: the values, and the configuration that they make."""
        found = {}
        for values in itertools.product(*self.grid.values()):
            setting = dict(zip(self.grid, values, strict=True))
            name = "-".join(f"{self._label(key)}{_shown(each)}" for key, each in setting.items())
            found[name] = (setting, self._configuration(name, setting))
        return found

    def _configuration(self, name: str, setting: Setting) -> TrainConfig:
        values = to_dict(self.train)
        for key, value in setting.items():
            *tables, last = key.split(".")
            inside = values
            for table in tables:
                inside = inside[table]
            inside[last] = value
        config = from_dict(TrainConfig, values, f"grid, {name}")
        # The order of the data is that of the base; a configuration has one way to say so.
        order = self.train.order_seed
        return dataclasses.replace(config, data_seed=None if config.seed == order else order)

    def _label(self, key: str) -> str:
        if key in _LABELS:
            return _LABELS[key]
        last = key.rpartition(".")[2]
        others = [each.rpartition(".")[2] for each in _leaves(self.train) if each != key]
        return key if last in others else last


@dataclass(frozen=True)
class SweepRecipe(TrainRecipe):
    """A whole sweep, as `sparsight sweep --config FILE.toml` takes it."""

    out: Path = Path("runs/sweep")
    """Folder of the sweep."""

    grid: dict[str, Any] = field(default_factory=dict)
    """What varies: lists of values by dotted path into `train`; [grid] in a config file."""


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Attributes:
        out: its folder.
        runs: its members by name, each an ordinary run in `out/NAME`.
        settings: the values of the grid by name.
    """

    out: Path
    runs: Mapping[str, Run]
    settings: Mapping[str, Setting]

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints of what trains together."""
        return self.out / "checkpoints"

    def table(self) -> list[dict[str, Any]]:
        """A row an autoencoder: `name`, `site`, `folder` (in `out`), `settings`, and the last line
        of its metrics: `fvu`, `l0`, `dead` (shares and means over the vectors since the line
        before), `vectors_per_second` (of the whole pass). `diverged` says why there is none.
        """
        return [self._row(name, run, site) for name, run in self.runs.items() for site in run.sites]

    def _row(self, name: str, run: Run, site: str) -> dict[str, Any]:
        folder = run.folder(site)
        row: dict[str, Any] = {
            "name": name,
            "site": site,
            "folder": folder.relative_to(self.out).as_posix(),
            "settings": self.settings[name],
        }
        if (folder / DIVERGED).exists():
            return {**row, "diverged": read_json(folder / DIVERGED)["reason"]}
        last = (run.metrics(site) or [{}])[-1]
        return {**row, **{key: last.get(key) for key in FIGURES}}


def sweep(
    source: Activations,
    config: SweepConfig,
    out: str | Path = "runs/sweep",
    *,
    sites: Sequence[str] | None = None,
    tokens: Tokens | None = None,
    resume: bool = True,
    device: str | None = None,
    quiet: bool = False,
) -> Sweep:
    """Train an SAE for every combination in a grid on each site, all in one pass.

    Each ends with the bits that it would have if it were trained alone on the same sites, and as
    an ordinary run in `out/NAME` (`out/NAME/SITE` where there are several sites). A member whose
    loss ceases to be finite is dropped with a warning, and the others go on.

    Args:
        source: an activation store, live activations, or a model and its images.
        config: what to train.
        out: folder of the sweep. Members that are finished stay as they are; the others go on from
            their last common checkpoint with the same bits, and those that a larger grid brought
            train in one new pass.
        sites: which sites of the source; all by default.
        tokens: as in `train`.
        resume: False refuses a folder that holds a sweep.
        device: "cpu", "cuda", …; a GPU if there is one.
        quiet: no progress line, and no word about what is done already.

    Returns:
        The sweep.

    Raises:
        UserError: a member's folder holds another run, another process trains into `out`, or a
            configuration does not fit the activations.
        SparsightError: the activations are not finite, or the loss of every member ceases to be;
            the last checkpoint stays.
    """
    out = Path(out)
    activations = as_activations(source, sites, tokens)
    names = chosen_sites(activations, sites)
    for site in names:
        for _, each in config.members.values():
            each.sae.width(activations.d_in(site))
    _refuse_single_run(out, resume)
    recipes = _recipes(out, activations, names, config)
    settings = [setting for setting, _ in config.members.values()]
    result = Sweep(
        out,
        {name: Run(out / name, names) for name in recipes},
        dict(zip(recipes, settings, strict=True)),
    )
    for name, run in result.runs.items():
        holds_part(run, recipes[name])
    if list(_pending(result, recipes)) or result.checkpoints.exists():
        with lock(out / ".lock", f"{out}: another process is training into it."):
            _refuse_to_drop(result)
            _write_recipe(activations, names, config, out)
            while _train_together(activations, result, recipes, device, quiet):
                pass
    return _settled(result)


def _train_together(
    source: ActivationSource,
    sweep: Sweep,
    recipes: Mapping[str, TrainRecipe],
    device: str | None,
    quiet: bool,
) -> bool:
    """Train what can share a pass; False if nothing is left to train."""
    pending = list(_pending(sweep, recipes))
    held = checkpoint.members(sweep.checkpoints)
    begun = [member for member in pending if member.name in held]
    if held and not begun:
        shutil.rmtree(sweep.checkpoints)  # of a pass whose members are all finished
    if not pending:
        return False
    sites = next(iter(sweep.runs.values())).sites
    total = len(sweep.runs) * len(sites)
    if not quiet and (len(pending) < total or begun):
        print(
            f"sweep: of {total} autoencoders {total - len(pending)} are done, {len(pending)} are "
            f"missing" + (f", {len(begun)} of which go on from a checkpoint." if begun else "."),
            file=sys.stderr,
        )
    loop = Loop(source, sites, begun or pending, sweep.checkpoints, device, drop_diverged=True)
    loop.run_to_end("sweep", quiet)
    shutil.rmtree(sweep.checkpoints, ignore_errors=True)
    return True


def _pending(sweep: Sweep, recipes: Mapping[str, TrainRecipe]) -> Iterator[Member]:
    """The members that have neither an SAE nor a reason why there is none."""
    for name, run in sweep.runs.items():
        for site in run.sites:
            folder = run.folder(site)
            if not run.is_finished(site) and not (folder / DIVERGED).exists():
                yield Member(f"{name}/{site}", site, folder, recipes[name])


def _recipes(
    out: Path, source: ActivationSource, sites: tuple[str, ...], config: SweepConfig
) -> dict[str, TrainRecipe]:
    """The recipes of the members, by name: a run that is there keeps the name that it has.

    With one more key in the grid every name has one more part.
    """
    there = {}
    for path in (*out.glob(f"*/{CONFIG}"), *out.glob(f"*/*/{CONFIG}")):
        name = path.relative_to(out).parts[0]
        there[json.dumps(identity(load(TrainRecipe, path)), sort_keys=True)] = name
    found = {}
    for name, (_, train) in config.members.items():
        recipe = recipe_of(source, Run(out / name, sites), train)
        kept = there.get(json.dumps(identity(recipe), sort_keys=True), name)
        found[kept] = dataclasses.replace(recipe, out=out / kept)
    return found


def _settled(sweep: Sweep) -> Sweep:
    """The sweep, its table written; an error if it holds nothing but members that diverged."""
    rows = sweep.table()
    table = {"format_version": FORMAT_VERSION, "members": rows}
    path = sweep.out / TABLE
    if not path.exists() or read_json(path) != json.loads(json.dumps(table)):
        write_json(path, table)
    reasons = [row["diverged"] for row in rows if "diverged" in row]
    if len(reasons) == len(rows):
        raise SparsightError(
            f"{sweep.out}: every autoencoder of the sweep diverged. {reasons[0]} Choose another "
            "folder, and lower learning rates."
        )
    return sweep


def _refuse_single_run(out: Path, resume: bool) -> None:
    if (out / SWEEP).exists():
        if not resume:
            raise UserError(f"{out} holds a sweep already. Choose another folder, or resume it.")
    elif (out / CONFIG).exists() or (out / "checkpoints").exists():
        raise UserError(f"{out} holds a single run. Choose another folder for a sweep.")


def _refuse_to_drop(sweep: Sweep) -> None:
    """Raise a `UserError` if others than the members of this sweep would lose a checkpoint."""
    own = {f"{name}/{site}" for name, run in sweep.runs.items() for site in run.sites}
    cut = []
    for member in sorted(checkpoint.members(sweep.checkpoints) - own):
        name, _, site = member.partition("/")
        folders = (sweep.out / name, sweep.out / name / site)
        if not any((each / end).exists() for each in folders for end in (WEIGHTS, DIVERGED)):
            cut.append(member)
    if cut:
        raise UserError(
            f"{sweep.out}: holds a sweep that was cut, with {', '.join(cut[:3])}"
            f"{', …' if len(cut) > 3 else ''}. Finish it first, or choose another folder; "
            f"`sparsight sweep --config {sweep.out / SWEEP}` repeats it."
        )


def _write_recipe(
    source: ActivationSource, sites: tuple[str, ...], config: SweepConfig, out: Path
) -> None:
    recipe = recipe_of(source, Run(out, sites), config.train)
    own = {item.name: getattr(recipe, item.name) for item in dataclasses.fields(recipe)}
    write_toml(out / SWEEP, SweepRecipe(**own, grid=config.grid))


def _checked_grid(grid: Mapping[str, Any], base: TrainConfig) -> dict[str, tuple[Any, ...]]:
    """The grid with whole paths as keys.

    Raises:
        UserError: a key is unknown, shared or named twice, or its list is empty, none, or has a
            value twice.
    """
    if not grid:
        raise UserError(
            "grid is empty: name what varies, e.g. k = [16, 32]; [grid] in a TOML file."
        )
    allowed = _leaves(base)
    found: dict[str, tuple[Any, ...]] = {}
    for given, values in _flat(grid):
        key = SHORT_NAMES.get(given, given)
        if key in _SHARED:
            raise UserError(f"grid: {given} cannot vary within a sweep: {_SHARED[key]}.")
        if key not in allowed:
            raise UserError(_unknown(given, key, allowed, base))
        if key in found:
            raise UserError(f"grid: {given} is named twice; {key} is the same.")
        if not isinstance(values, list | tuple):
            raise UserError(f"grid: {given} is {values!r}; expected a list of values.")
        if not values:
            raise UserError(f"grid: {given} is an empty list; give it a value at least.")
        plain = [NONE if each is None else each for each in values]
        twice = [each for place, each in enumerate(plain) if each in plain[:place]]
        if twice:
            raise UserError(f"grid: {given} lists {twice[0]!r} twice.")
        found[key] = tuple(plain)
    if "sae.expansion" in found and ("sae.n_latents" in found or base.sae.n_latents is not None):
        raise UserError(
            "grid: sae.expansion has no effect where n_latents is given. Leave one out."
        )
    return found


def _unknown(given: str, key: str, allowed: Sequence[str], base: TrainConfig) -> str:
    names = sorted({*allowed, *SHORT_NAMES} - set(_SHARED))
    table = key.partition(".")[0]
    if "." in key and table in allowed and getattr(base, table) is None:
        return f"grid: {given} cannot vary where {table} is none. Give the base one, in [train]."
    close = difflib.get_close_matches(given, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"grid: unknown key {given!r}.{hint} What may vary: {', '.join(names)}."


def _flat(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The lists of a table and of those in it, by dotted path."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _leaves(config: Any, path: str = "") -> list[str]:
    """Dotted paths of the fields that hold plain values."""
    found = []
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            found += _leaves(value, f"{path}{each.name}.")
        else:
            found.append(path + each.name)
    return found


def _shown(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    parts = value if isinstance(value, list | tuple) else [value]
    return "".join(f"_{part}" for part in typing.cast(Sequence[Any], parts))
