from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sparsight.config import (
    first_difference,
    from_dict,
    load,
    read_toml,
    to_dict,
    whole_number,
    write_toml,
)
from sparsight.errors import UserError


@dataclass(frozen=True)
class Circle:
    radius: float = 1.0


@dataclass(frozen=True)
class Square:
    side: int = 2


@dataclass(frozen=True)
class Drawing:
    name: str
    shape: Circle | Square = field(default_factory=Circle)
    only: Square = field(default_factory=Square)
    maybe: Circle | None = None
    usually: Circle | None = field(default_factory=Circle)
    limit: float | None = 1.0
    sizes: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    where: Path = Path("out")


FULL = Drawing(
    name="a",
    shape=Square(5),
    only=Square(3),
    maybe=Circle(2.5),
    sizes=(1, 2),
    pair=(0.5, 2.0),
    where=Path("here"),
)


def test_a_configuration_survives_toml(tmp_path: Path) -> None:
    write_toml(tmp_path / "drawing.toml", FULL)
    assert load(Drawing, tmp_path / "drawing.toml") == FULL
    assert from_dict(Drawing, to_dict(Drawing("b"))) == Drawing("b")


def test_none_survives_toml_where_it_is_not_the_default(tmp_path: Path) -> None:
    without = Drawing("a", usually=None, limit=None)
    write_toml(tmp_path / "drawing.toml", without)
    assert load(Drawing, tmp_path / "drawing.toml") == without
    assert from_dict(Drawing, {"name": "none"}).name == "none"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "nmae": 1}, "here: unknown key 'nmae'. Did you mean 'name'"),
        ({"name": "a", "shape": {"kind": "square", "sidde": 1}}, "'shape.sidde'"),
        ({"name": "a", "shape": {"kind": "cube"}}, "shape.kind is 'cube'; expected 'circle' or"),
        ({"name": 3}, "name is 3; expected a str"),
        ({"name": "a", "sizes": ["x"]}, r"sizes\[0\] is 'x'; expected an int"),
        ({"name": "a", "pair": [1.0]}, "expected a list of 2"),
        ({"name": "a", "only": 3}, "only is 3; expected a table"),
        ({"name": "a", "only": {"side": True}}, "only.side is True"),
        ({}, "name is missing"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(Drawing, values, "here")


def test_a_table_without_a_kind_is_of_the_default_kind() -> None:
    assert from_dict(Drawing, {"name": "a", "shape": {"radius": 3.0}}).shape == Circle(3.0)
    with pytest.raises(UserError, match=r"unknown key 'shape\.side'"):
        from_dict(Drawing, {"name": "a", "shape": {"side": 3}})


def test_whole_numbers_stand_for_fractions() -> None:
    assert from_dict(Drawing, {"name": "a", "pair": [1, 2]}).pair == (1.0, 2.0)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(UserError, match=r"bad\.toml: cannot be read as TOML"):
        load(Drawing, tmp_path / "bad.toml")
    with pytest.raises(UserError, match="no such file"):
        load(Drawing, tmp_path / "absent.toml")


def test_the_first_difference_is_named_with_its_path() -> None:
    other = to_dict(FULL) | {"shape": {"kind": "square", "side": 6}}
    assert first_difference(to_dict(FULL), other) == "shape.side"
    assert first_difference(to_dict(FULL), to_dict(FULL)) is None


def test_files_carry_a_schema_version_and_another_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "drawing.toml"
    write_toml(path, FULL)
    assert path.read_text().startswith("schema_version = 1\n")
    path.write_text(path.read_text().replace("schema_version = 1", "schema_version = 2"))
    with pytest.raises(UserError, match=r"drawing\.toml: schema_version is 2"):
        load(Drawing, path)
    path.write_text('name = "by hand"')
    assert load(Drawing, path) == Drawing("by hand")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (".".join(["a"] * 20_000) + " = 1", "line 1 holds a key of more than 64 parts"),
        ("x = 1\n[" + ".".join(["a"] * 20_000) + "]", "line 2 holds a key of more than 64 parts"),
        ("x = " + "[" * 50_000, "nested too deeply"),
        ("x = " + "{a=" * 50_000, "nested too deeply"),
    ],
)
def test_settings_that_are_nested_without_end_are_refused_at_once(tmp_path, text, message):
    path = tmp_path / "deep.toml"
    path.write_text(text)
    started = time.monotonic()
    with pytest.raises(UserError, match=message):
        read_toml(path)
    assert time.monotonic() - started < 2


def test_whole_numbers_are_read_as_people_write_them() -> None:
    million = ("1000000", "1_000_000", "1,000,000", "1e6", "1.0E6", "1M", "1000k", "0.001G", " 1m ")
    assert {whole_number(text) for text in million} == {1_000_000}
    assert [whole_number(text) for text in ("0", "-3", "2.5e3", str(2**64))] == [0, -3, 2500, 2**64]
    for text in ("1.5", "1,5", "many", "1e999", "1__0", "M", "1e-3", "1e6M", "inf", "", "٣"):
        with pytest.raises(ValueError, match="not a whole number; write 1000000"):
            whole_number(text)


def test_toml_may_write_whole_numbers_likewise_and_nothing_else_is_rounded(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[only]\nside = 1e3\n[shape]\nkind = "square"\nside = "2k"\n')
    path.write_text(f"name = 'a'\n{path.read_text()}")
    drawing = load(Drawing, path)
    assert (drawing.only.side, drawing.shape) == (1000, Square(2000))
    for wrong in (1.5, "two", True):
        with pytest.raises(UserError, match=r"only\.side is .*; expected an int"):
            from_dict(Drawing, {"name": "a", "only": {"side": wrong}}, str(path))


def test_an_option_is_read_by_its_older_name_too_but_not_by_both(tmp_path: Path) -> None:
    from sparsight.cli.search import SearchOptions

    path = tmp_path / "search.toml"
    for name in ("image", "picture"):
        path.write_text(f'{name} = "mine.png"\n')
        assert load(SearchOptions, path).image == Path("mine.png")
    path.write_text('image = "mine.png"\npicture = "yours.png"\n')
    with pytest.raises(UserError, match="picture and image are the same; give one of them"):
        load(SearchOptions, path)
