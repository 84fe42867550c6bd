"""The grid of a sweep: from lists of values to named combinations.

A key is the dotted path of a field of `TrainConfig`, or a short name. Its values are plain, or
whole parts: `sae.sparsity = ["topk", {kind = "relu", l1 = 1e-3}]`. One key is not a field:
`tokens`, the positions to train on.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsight.config import NONE, convert, from_dict, kind_of, to_dict
from sparsight.errors import UserError
from sparsight.training.config import TrainConfig
from sparsight.training.old_keys import REMEDY, pairs_with_remedy
from sparsight.vision import Tokens

TOKENS = "tokens"
SHORT_NAMES = {
    "k": "sae.sparsity.k",
    "n_latents": "sae.n_latents",
    "widths": "sae.n_latents",
    "expansion": "sae.expansion",
    "architecture": "sae.sparsity",
}
"""Short names for paths; `seed` and `lr` are paths already."""

_LABELS = {"sae.sparsity.k": "k", "sae.n_latents": "n"}
_PASS = "all autoencoders of a sweep share one pass, and with it"
_SHARED = {
    "n_vectors": f"{_PASS} its length",
    "data_seed": f"{_PASS} the order of the data; `seed` varies only the initial weights",
    "log_every": f"{_PASS} the steps at which metrics are logged",
    "checkpoint_every": f"{_PASS} the checkpoints",
    "target_site": f"{_PASS} the sites that are read",
    "loggers": "it does not affect the result",
}
"""Why some keys cannot vary."""

Setting = dict[str, Any]
"""A value for each key of a grid; a part is a table, or "none" if it is left out."""

Grid = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Combination:
    """One member of a grid.

    Attributes:
        name: name of its folder, e.g. `k32-n2048-seed1`.
        setting: the values, without keys that its parts do not have.
        values: its whole configuration, as `to_dict` returns it.
    """

    name: str
    setting: Setting
    values: dict[str, Any]


def combinations(grid: Grid, base: TrainConfig) -> Iterator[Combination]:
    """Yield every combination of the values of a grid from `checked`, each once.

    A key inside a part that varies or is switched off applies only where that field exists: with
    `architecture = ["topk", "relu"]`, `k` varies only the k of TopK.
    """
    names: dict[str, int] = {}
    yielded: set[str] = set()
    whole = {key for key in grid if key == TOKENS or key in _parts(base)}
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        made = to_dict(base)
        for key in (*filter(whole.__contains__, grid), *(key for key in grid if key not in whole)):
            if not _put(made, key, setting[key], base):
                del setting[key]
        same = json.dumps([setting.get(TOKENS), made], sort_keys=True)
        if same in yielded:
            continue
        yielded.add(same)
        name = "-".join(_shown(key, value, base) for key, value in setting.items())
        names[name] = names.get(name, 0) + 1
        yield Combination(name if names[name] == 1 else f"{name}_{names[name]}", setting, made)


def checked(grid: Mapping[str, Any], base: TrainConfig) -> Grid:
    """Return the grid with full paths as keys, and parts as tables with their kind.

    Raises:
        UserError: a key is unknown, cannot vary or is named twice; its list is empty, not a list,
            or has a value twice; or a value is not a valid part.
    """
    if not grid:
        raise UserError(
            "grid is empty: name the settings to vary, e.g. k = [16, 32], under [grid] in a TOML "
            "file."
        )
    given_lists = pairs_with_remedy(list(_flat(grid)))
    keys = [SHORT_NAMES.get(given, given) for given, _ in given_lists]
    parts = _parts(base)
    found: Grid = {}
    objects: list[Any] = []
    for (given, values), key in zip(given_lists, keys, strict=True):
        if key in _SHARED:
            raise UserError(f"grid: {given} cannot vary within a sweep: {_SHARED[key]}.")
        if key in found:
            raise UserError(f"grid: {given} is named twice; {key} is the same.")
        if not isinstance(values, list | tuple):
            if key in {*parts, *_leaves(base), TOKENS}:
                raise UserError(f"grid: {given} is {values!r}; expected a list of values.")
            raise UserError(_unknown(given, key, _leaves(base), base))
        if not values:
            raise UserError(f"grid: {given} is an empty list; give it at least one value.")
        found[key], made = zip(*(_value(key, each, base) for each in values), strict=True)
        twice = [each for i, each in enumerate(made) if each in made[:i]]
        if twice:
            shown = values[made.index(twice[0], made.index(twice[0]) + 1)]
            raise UserError(f"grid: {given} lists {NONE if shown is None else shown!r} twice.")
        objects += [(key, each) for each in made if dataclasses.is_dataclass(each)]
    inside = {f"{key}.{field.name}" for key, each in objects for field in dataclasses.fields(each)}
    allowed = {*_leaves(base), *parts, *inside, TOKENS}
    for (given, _), key in zip(given_lists, keys, strict=True):
        if key not in allowed:
            raise UserError(_unknown(given, key, sorted(allowed), base))
    if "sae.expansion" in found and ("sae.n_latents" in found or base.sae.n_latents is not None):
        raise UserError("grid: sae.expansion has no effect if n_latents is given. Leave one out.")
    return found


def _value(key: str, given: Any, base: TrainConfig) -> tuple[Any, Any]:
    """Return a value as it appears in a setting, and to compare it by: a part as its dataclass."""
    if key == TOKENS:
        return given, convert(Tokens, given, "grid", TOKENS)
    hint = _parts(base).get(key)
    if hint is None:
        plain = NONE if given is None else given
        return plain, plain
    own = base.remedy if key == REMEDY else None
    if own is not None and given in (own.word, kind_of(type(own))):
        given = own  # a plain name means the base's own remedy, if it is of that kind
    return _part(hint, given, key)


def _part(hint: Any, given: Any, key: str) -> tuple[Any, Any]:
    """Return a part as a table with its kind, and as its dataclass."""
    classes = _classes(hint)
    if given is None or given == NONE:
        return NONE, convert(hint, given, "grid", key)
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        table = {"kind": kind_of(type(given)), **_own(given)}
    elif isinstance(given, str):
        table = {"kind": given}
    elif isinstance(given, Mapping):
        table = {"kind": kind_of(classes[0]), **given}
    else:
        table = given
    made = convert(hint, table, "grid", key)
    return {**table, "kind": kind_of(type(made))}, made


def _put(values: dict[str, Any], key: str, value: Any, base: TrainConfig) -> bool:
    """Put a value in its place; return False if its part lacks that field."""
    if key == TOKENS:
        return True
    *tables, last = key.split(".")
    inside = values
    for table in tables:
        if not isinstance(inside.get(table), dict):
            return False
        own = dict(inside[table])  # a table from the grid is shared with other members
        inside[table] = own
        inside = own
    part = ".".join(tables)
    if part in _parts(base):
        kinds = {kind_of(each): each for each in _classes(_parts(base)[part])}
        made = kinds[inside.get("kind", next(iter(kinds)))]
        if last not in {field.name for field in dataclasses.fields(made)}:
            return False
    inside[last] = value
    return True


def _own(part: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from its defaults, as plain values."""
    plain = to_dict(part)
    return {
        field.name: plain[field.name]
        for field in dataclasses.fields(part)
        if field.name in plain
        and (field.default is dataclasses.MISSING or getattr(part, field.name) != field.default)
        and (
            field.default_factory is dataclasses.MISSING
            or getattr(part, field.name) != field.default_factory()
        )
    }


def _parts(config: TrainConfig) -> dict[str, Any]:
    """Return the types of the fields that hold whole parts, by dotted path; `sae` is not one."""
    return _parts_of(type(config), "")


def _parts_of(cls: type, path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= _parts_of(hint, f"{path}{name}.")
        elif _classes(hint):
            found[path + name] = hint
    return found


def _classes(hint: Any) -> list[type]:
    """Return the dataclasses among the choices of a type."""
    choices = (hint, *typing.get_args(hint))
    return [each for each in choices if isinstance(each, type) and dataclasses.is_dataclass(each)]


def _leaves(config: Any, path: str = "") -> list[str]:
    """Return the dotted paths of the fields that hold plain values."""
    found = []
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            found += _leaves(value, f"{path}{each.name}.")
        else:
            found.append(path + each.name)
    return found


def _unknown(given: str, key: str, allowed: Sequence[str], base: TrainConfig) -> str:
    table = key.rpartition(".")[0]
    if table in _parts(base) and table in _leaves(base):
        return f"grid: {given} cannot vary while {table} is none. Choose one under [train]."
    names = sorted({*allowed, *SHORT_NAMES, TOKENS} - set(_SHARED))
    close = difflib.get_close_matches(given, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"grid: unknown key {given!r}.{hint} These keys can vary: {', '.join(names)}."


def _flat(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the lists of a table and its sub-tables, with their dotted paths."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _shown(key: str, value: Any, base: TrainConfig) -> str:
    """Return a key and its value as a part of a folder's name."""
    if key == TOKENS:
        return str(value)
    if isinstance(value, Mapping):
        inside = (_joined(name, each) for name, each in value.items() if name != "kind")
        return "_".join([value["kind"], *inside])
    return _joined(_label(key, base), value)


def _joined(label: str, value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{label}{'_' if label[-1:].isdigit() else ''}{value!r}"
    parts = value if isinstance(value, list | tuple) else [value]
    return label + "".join(f"_{part}" for part in typing.cast(Sequence[Any], parts))


def _label(key: str, base: TrainConfig) -> str:
    if key in _LABELS:
        return _LABELS[key]
    last = key.rpartition(".")[2]
    others = [each.rpartition(".")[2] for each in _leaves(base) if each != key]
    return key if last in others else last


def configuration(made: Combination, base: TrainConfig) -> TrainConfig:
    """Return how a member trains.

    Raises:
        UserError: its values do not fit together.
    """
    config = from_dict(TrainConfig, made.values, f"grid, {made.name}")
    # The order of the data is that of the base; normalise how the configuration says so.
    order = base.order_seed
    return dataclasses.replace(config, data_seed=None if config.seed == order else order)
