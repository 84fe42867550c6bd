"""Settings as frozen dataclasses, and the same settings as plain mappings and TOML.

A field whose type is a union of dataclasses is tagged by `kind`, the lower-case name of the class
(`{kind = "topk", k = 32}`); with a single dataclass, no tag is needed. A kind alone, `"topk"`, has
every default, and a class may have a shorter `word` for its kind, which is read as well. A class
with `upgraded` reads tables of earlier versions with it. `None` is left out if it is the default
and written `"none"` otherwise, because TOML has no word for it. An unknown key or a value of
another type is an error that names the place.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
import tomllib
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import tomli_w

from sparsight.errors import UserError
from sparsight.files import write_text
from sparsight.text import path_of, without_surrogates

Config = TypeVar("Config")

NONE = "none"

MOST_PARTS = 64
_BETWEEN_KEYS = re.compile(r"[={},\[\]]")

_NUMBER = re.compile(
    r"([+-]?(?:\d+(?:_\d+)*|\d{1,3}(?:,\d{3})+)(?:\.\d*)?)(e[+-]?\d{1,3}|[kmgb]|)",
    re.IGNORECASE | re.ASCII,
)
_POWERS = {"": 0, "k": 3, "m": 6, "g": 9, "b": 9}
_LONGEST_NUMBER = 25
"""Longest number, in digits; seeds of 64 bits have 20."""

SCHEMA = "schema_version"
SCHEMA_VERSION = 1
"""The version of TOML files; a file without one is read as this version."""


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a dataclass into a mapping of plain values; nested ones carry their `kind`."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = _plain(getattr(config, field.name))
        if value is not None:
            plain[field.name] = value
        elif field.default is not None:
            plain[field.name] = NONE
    return plain


def from_dict(cls: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """Build a dataclass from a mapping.

    Args:
        cls: the dataclass.
        values: its fields; those that are left out take their defaults.
        where: prefix of error messages, e.g. the file.

    Raises:
        UserError: a key is unknown or missing, or a value has another type or is out of range.
    """
    return typing.cast(Config, _build(cls, values, where, ""))


def convert(hint: Any, value: Any, where: str, path: str) -> Any:
    """Convert a plain value to a type, as `from_dict` does with the fields of a dataclass.

    Args:
        hint: the type.
        value: the value, e.g. a table for a dataclass.
        where: prefix of error messages, e.g. the file.
        path: the name of the value.

    Raises:
        UserError: the value has another type or is out of range.
    """
    return _convert(hint, value, where, path)


def kind_of(cls: type) -> str:
    """Return the `kind` of a dataclass, by which a table names it among several."""
    return _kind(cls)


def check_types(config: Any, path: str = "") -> None:
    """Convert a dataclass's fields to their types, as `from_dict` does; for its `__post_init__`.

    Args:
        config: the dataclass, frozen or not.
        path: prefix of its fields' names in messages, e.g. "auxk.".

    Raises:
        UserError: a value has another type, is not a choice of its `Literal`, or is not finite.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = _convert(hints[field.name], getattr(config, field.name), "", path + field.name)
        object.__setattr__(config, field.name, value)


def whole_number(text: str) -> int:
    """Read an integer as people write it: "1000000", "1_000_000", "1,000,000", "1e6", "1M".

    k, M and G (or B) stand for a thousand, a million and a thousand millions.

    Raises:
        ValueError: the text is not an integer.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is not None:
        value = Decimal(re.sub("[_,]", "", match[1]))
        power = match[2].lower()
        value = value.scaleb(_POWERS[power] if power in _POWERS else int(power[1:]))
        if value.adjusted() < _LONGEST_NUMBER and value == value.to_integral_value():
            return int(value)
    raise ValueError(f"{text!r} is not a whole number; write 1000000, 1_000_000, 1e6 or 1M.")


def check_seed(seed: int, name: str = "seed") -> None:
    """Check that both torch and numpy accept a seed.

    Raises:
        UserError: it is negative or beyond 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise UserError(f"{name} is {seed}; it must be 0 or more, and below 2^64.")


def check_positive(**values: int | None) -> None:
    """Check that counts, given by name, are 1 or more, or None.

    Raises:
        UserError: one is not.
    """
    for name, value in values.items():
        if value is not None and not 1 <= value < 2**63:
            end = "1 or more" if value < 1 else "below 2^63"
            raise UserError(f"{name} is {value}; it must be {end}.")


def check_seconds(**values: float) -> None:
    """Check that durations, given by name, are above 0.

    Raises:
        UserError: one is not.
    """
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name} is {value}; it must be above 0.")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UserError: the file is missing or is not TOML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        _check_depth(path, text)
        return tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except RecursionError:
        raise UserError(
            f"{path}: cannot be read as TOML (lists or tables are nested too deeply)."
        ) from None
    except (OSError, ValueError) as error:  # ValueError also for numbers with too many digits
        raise UserError(f"{path}: cannot be read as TOML ({error}).") from error


def _check_depth(path: Path, text: str) -> None:
    """Refuse keys with very many parts: `tomllib` takes time in the square of their number."""
    for number, line in enumerate(text.split("\n"), start=1):
        if any(part.count(".") >= MOST_PARTS for part in _BETWEEN_KEYS.split(line)):
            raise UserError(
                f"{path}: line {number} holds a key of more than {MOST_PARTS} parts; settings have "
                "a handful, such as train.sae.sparsity.k."
            )


def write_toml(path: Path, config: Any) -> None:
    """Write a dataclass as TOML, whole or not at all."""
    write_text(path, tomli_w.dumps({SCHEMA: SCHEMA_VERSION, **to_dict(config)}))


def load(cls: type[Config], path: Path) -> Config:
    """Read a dataclass from a TOML file.

    Raises:
        UserError: as in `read_toml` and `from_dict`; or the file has another schema version.
    """
    values = read_toml(path)
    version = values.pop(SCHEMA, SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: {SCHEMA} is {version!r}; this Sparsight reads {SCHEMA_VERSION}. "
            "Update Sparsight, or remove the line if the file was written by hand."
        )
    return from_dict(cls, values, str(path))


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Return the dotted name of the first field in which two mappings differ, or None."""
    for key in sorted({*one, *other}):
        left, right = one.get(key), other.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            inner = first_difference(left, right)
            if inner is not None:
                return f"{key}.{inner}"
        elif left != right:
            return key
    return None


def value_at(values: Mapping[str, Any], dotted: str) -> Any:
    """Return the value of a field of a nested mapping by its dotted name; None if there is none."""
    value: Any = values
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"kind": _kind(type(value)), **to_dict(value)}
    if isinstance(value, Path | str):
        return without_surrogates(str(value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _kind(cls: type) -> str:
    return cls.__name__.lower()


def _build(cls: type, values: Mapping[str, Any], where: str, path: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    arguments = {}
    if hasattr(cls, "upgraded"):
        values = cls.upgraded(values, where, path)
    aliases: Mapping[str, str] = getattr(cls, "ALIASES", {})
    for name, value in values.items():
        dotted, key = f"{path}{name}", aliases.get(name, name)
        if key != name and key in values:
            raise UserError(f"{_at(where)}{dotted} and {path}{key} are the same; give one of them.")
        if key == "kind" and key not in fields:
            continue
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(fields)}."
            raise UserError(f"{_at(where)}unknown key {dotted!r}.{hint}")
        if isinstance(value, Mapping) and "kind" not in value:
            value = {**_default_kind(fields[key]), **value}
        arguments[key] = _convert(hints[key], value, where, dotted)
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in arguments:
            raise UserError(f"{_at(where)}{path}{name} is missing.")
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(f"{_at(where)}{error}") from error


def _default_kind(field: dataclasses.Field[Any]) -> dict[str, str]:
    """Return the kind of a table that names none: that of the field's default, if a dataclass."""
    make = field.default_factory
    default = field.default if make is dataclasses.MISSING else make()
    return {"kind": _kind(type(default))} if dataclasses.is_dataclass(default) else {}


def _convert(hint: Any, value: Any, where: str, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, where, path)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            given = value.get("kind", _kind(hint))
            if given != _kind(hint):
                raise _wrong(where, f"{path}.kind", given, repr(_kind(hint)))
            return _build(hint, value, where, f"{path}.")
        raise _wrong(where, path, value, "a table")
    if origin is Literal:
        if value in typing.get_args(hint):
            return value
        raise _wrong(where, path, value, " or ".join(map(repr, typing.get_args(hint))))
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(where, path, value, "a list")
        inner = typing.get_args(hint)
        of = [inner[0]] * len(value) if inner[1:] == (...,) else list(inner)
        if len(of) != len(value):
            raise _wrong(where, path, value, f"a list of {len(of)}")
        return tuple(
            _convert(item_hint, one, where, f"{path}[{number}]")
            for number, (item_hint, one) in enumerate(zip(of, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, path, value, "a table")
        inside = typing.get_args(hint)[1]
        return {key: _convert(inside, item, where, f"{path}.{key}") for key, item in value.items()}
    if hint in (int, float) and isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise UserError(f"{_at(where)}{path} is a number of more than 64 bits.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise _wrong(where, path, value, "a finite number")
    if hint is int and where:  # in a file people write 1e6 or "1M", but not in a program
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, str):
            with suppress(ValueError):
                return whole_number(value)
    if hint is Path and isinstance(value, str):
        if not value or "\0" in value:
            raise _wrong(where, path, value, "a path")
        return path_of(value)
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise _wrong(where, path, value, f"{'an' if hint is int else 'a'} {hint.__name__}")


def _convert_union(choices: tuple[Any, ...], value: Any, where: str, path: str) -> Any:
    if type(None) in choices and (value is None or (value == NONE and str not in choices)):
        return None
    classes = {
        _kind(choice): choice
        for choice in choices
        if isinstance(choice, type) and dataclasses.is_dataclass(choice)
    }
    words = {getattr(choice, "word", kind): kind for kind, choice in classes.items()}
    others = [
        choice for choice in choices if choice is not type(None) and choice not in classes.values()
    ]
    if type(value) in classes.values():
        return value
    nothing = (NONE,) if type(None) in choices else ()
    if isinstance(value, str) and words.get(value, value) in classes:
        value = {"kind": value}
    if classes and isinstance(value, Mapping):
        if len(classes) == 1 and "kind" not in value:
            return _build(next(iter(classes.values())), value, where, f"{path}.")
        kind = value.get("kind")
        if isinstance(kind, str):
            kind = words.get(kind, kind)
        if not isinstance(kind, str) or kind not in classes:
            raise _wrong(where, f"{path}.kind", kind, " or ".join(map(repr, (*nothing, *words))))
        return _build(classes[kind], value, where, f"{path}.")
    errors = []
    for choice in others:
        try:
            return _convert(choice, value, where, path)
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    raise _wrong(where, path, value, "a table")


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _wrong(where: str, path: str, value: Any, expected: str) -> UserError:
    return UserError(f"{_at(where)}{path} is {reprlib.repr(value)}; expected {expected}.")
