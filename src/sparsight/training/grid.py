"""The grid of a sweep: from lists of values to named combinations.

A key is the dotted path of a field of `TrainConfig`, or a short name. Its values are plain, or
whole parts: `sae.sparsity = ["topk", {kind = "relu", l1 = 1e-3}]`. One key is no field:
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
"""What may be written instead of a path; `seed` and `lr` are paths already."""

_LABELS = {"sae.sparsity.k": "k", "sae.n_latents": "n"}
_PASS = "the members share one pass, and with it"
_SHARED = {
    "n_vectors": f"{_PASS} its length",
    "data_seed": f"{_PASS} the order of the data; `seed` varies the initial weights alone",
    "log_every": f"{_PASS} the steps at which figures are logged",
    "checkpoint_every": f"{_PASS} the checkpoints",
    "target_site": f"{_PASS} what is read",
    "loggers": "it changes nothing about what is learnt",
}
"""Why some keys cannot vary."""

Setting = dict[str, Any]
"""A value for each key of a grid; a part is a table, one that is left out is "none"."""

Grid = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Combination:
    """One member of a grid.

    Attributes:
        name: of its folder, e.g. `k32-n2048-seed1`.
        setting: the values; a key that its parts do not have is left out.
        values: all of its configuration, as `to_dict` gives it.
    """

    name: str
    setting: Setting
    values: dict[str, Any]


def combinations(grid: Grid, base: TrainConfig) -> Iterator[Combination]:
    """Every combination of the values of a grid that `checked` gave, each once.

    A key inside of a part that varies, or of one that is switched off, counts where there is such
    a field: `k` beside `architecture = ["topk", "relu"]` varies the k of TopK alone.
    """
    names: dict[str, int] = {}
    told: set[str] = set()
    whole = {key for key in grid if key == TOKENS or key in _parts(base)}
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        made = to_dict(base)
        for key in (*filter(whole.__contains__, grid), *(key for key in grid if key not in whole)):
            if not _put(made, key, setting[key], base):
                del setting[key]
        same = json.dumps([setting.get(TOKENS), made], sort_keys=True)
        if same in told:
            continue
        told.add(same)
        name = "-".join(_shown(key, value, base) for key, value in setting.items())
        names[name] = names.get(name, 0) + 1
        yield Combination(name if names[name] == 1 else f"{name}_{names[name]}", setting, made)


def checked(grid: Mapping[str, Any], base: TrainConfig) -> Grid:
    """The grid with whole paths as keys, and parts as tables with their kind.

    Raises:
        UserError: a key is unknown, shared or named twice, or its list is empty, none, or has a
            value twice; or a value is no such part.
    """
    if not grid:
        raise UserError(
            "grid is empty: name what varies, e.g. k = [16, 32]; [grid] in a TOML file."
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
            raise UserError(f"grid: {given} is an empty list; give it a value at least.")
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
        raise UserError(
            "grid: sae.expansion has no effect where n_latents is given. Leave one out."
        )
    return found


def _value(key: str, given: Any, base: TrainConfig) -> tuple[Any, Any]:
    """A value as it stands in a setting, and what it is compared by: parts as their dataclass."""
    if key == TOKENS:
        return given, convert(Tokens, given, "grid", TOKENS)
    hint = _parts(base).get(key)
    if hint is None:
        plain = NONE if given is None else given
        return plain, plain
    own = base.remedy if key == REMEDY else None
    if own is not None and given in (own.word, kind_of(type(own))):
        given = own  # a name alone is the base's own, if it has that one
    return _part(hint, given, key)


def _part(hint: Any, given: Any, key: str) -> tuple[Any, Any]:
    """A part as a table with its kind, and as its dataclass."""
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
    """Put a value where it belongs; False where its part has no such field."""
    if key == TOKENS:
        return True
    *tables, last = key.split(".")
    inside = values
    for table in tables:
        if not isinstance(inside.get(table), dict):
            return False
        own = dict(inside[table])  # shared with other members where it came from the grid
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
    """The fields of a dataclass that differ from its defaults, plain."""
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
    """Types of the fields that hold whole parts, by dotted path; not `sae`, which is all of it."""
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
    """The dataclasses among the choices of a type."""
    choices = (hint, *typing.get_args(hint))
    return [each for each in choices if isinstance(each, type) and dataclasses.is_dataclass(each)]


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


def _unknown(given: str, key: str, allowed: Sequence[str], base: TrainConfig) -> str:
    table = key.rpartition(".")[0]
    if table in _parts(base) and table in _leaves(base):
        return f"grid: {given} cannot vary where {table} is none. Give the base one, in [train]."
    names = sorted({*allowed, *SHORT_NAMES, TOKENS} - set(_SHARED))
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


def _shown(key: str, value: Any, base: TrainConfig) -> str:
    """A key and its value as a part of a folder's name."""
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
    """How a member trains.

    Raises:
        UserError: its values do not fit together.
    """
    config = from_dict(TrainConfig, made.values, f"grid, {made.name}")
    # The order of the data is that of the base; a configuration has one way to say so.
    order = base.order_seed
    return dataclasses.replace(config, data_seed=None if config.seed == order else order)
