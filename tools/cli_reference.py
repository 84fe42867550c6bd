"""`docs/reference/cli.md`, made from the parsers of the verbs whenever the documentation is built.

mkdocs calls `on_files` (`hooks` in mkdocs.yml). `python -m tools.cli_reference` prints the page.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from sparsight.cli import attack, options
from sparsight.cli.architecture import KINDS, REMEDIES
from sparsight.cli.help import SHARED, Help, Option, options_of
from sparsight.cli.main import VERBS
from sparsight.cli.verbs import run

PAGE = "reference/cli.md"

HEAD = """\
# Command line

Every verb of `sparsight` with all of its options and their defaults, made from the same parsers as
`sparsight VERB --help-all`. What the verbs have in common is on the page
[The verbs](../guide/overview.md); each has a page of its own in the guide, too.

"""


@dataclass(frozen=True)
class Section:
    """What the reference says of one verb.

    Attributes:
        verb: its name, such as `attack find`.
        about: what it does, in a sentence or two.
        examples: command lines, without `sparsight VERB`.
        options: every option, those that most calls give first.
        groups: what the help says about each group of options.
    """

    verb: str
    about: str
    examples: tuple[str, ...]
    options: tuple[Option, ...]
    groups: dict[str, str]


def all_verbs() -> Iterator[str]:
    """Every verb, with the verbs of `attack` in place of it."""
    for verb in VERBS:
        yield from (f"attack {inner}" for inner in attack.VERBS) if verb == "attack" else [verb]


def section(verb: str, *arguments: str) -> Section:
    """Read the options of a verb from the parser that its `--help-all` shows.

    Args:
        arguments: flags that decide which others there are, such as `--sparsity relu`.
    """
    seen: list[tuple[Any, Help, tuple[str, ...]]] = []

    def keep(parser: Any, verb: str, helped: Help, *, last: Any = (), whole: bool = False) -> str:
        seen.append((parser, helped, tuple(last)))
        return ""

    with (
        mock.patch.object(options, "render", keep),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        run(verb.replace(" ", "."), [*arguments, "--help-all"])
    parser, helped, last = seen[0]
    found = [replace(o, group=SHARED) if o.name in last else o for o in options_of(parser)]
    needed = [replace(o, group="needed") for o in found if o.required or o.name in helped.needed]
    names = {option.name for option in needed}
    rest = [option for option in found if option.name not in names]
    rest.sort(key=lambda option: option.group == SHARED)
    return Section(
        verb,
        " ".join((parser.description or "").split()),
        helped.examples,
        (*needed, *rest),
        {group.title: group.description or "" for group in parser._action_groups},
    )


def page() -> str:
    """The whole reference, in Markdown."""
    sections = [section(verb) for verb in all_verbs()]
    rows = "\n".join(
        f"| [`{each.verb}`](#{_anchor(each.verb)}) | {_cell(_text(_first_sentence(each.about)))} |"
        for each in sections
    )
    parts = [HEAD, f"| verb | what it does |\n|---|---|\n{rows}\n"]
    for each in sections:
        parts.append(_written(each))
        if each.verb == "train":
            parts.append(_kinds(each))
    return "\n".join(parts)


def _written(each: Section) -> str:
    lines = [f"## `sparsight {each.verb}` {{ #{_anchor(each.verb)} }}", "", _text(each.about), ""]
    if each.examples:
        lines += ["```text", *(f"sparsight {each.verb} {e}" for e in each.examples), "```", ""]
    for group in dict.fromkeys(option.group for option in each.options):
        if group != "options":
            lines += [f"**{group.capitalize()}**", ""]
        if about := each.groups.get(group, "") if group not in ("needed", "options") else "":
            lines += [_text(" ".join(about.split("\n\n")[0].split())), ""]
        lines += _table([option for option in each.options if option.group == group])
    return "\n".join(lines)


def _kinds(train: Section) -> str:
    """The flags that `--sparsity` and `--remedy` bring, for each of their kinds."""
    known = {(option.name, option.text) for option in train.options}
    lines = [
        "### Flags of each `--sparsity` and `--remedy`",
        "",
        "`train` and `sweep` take the flags of the kind that is chosen; those of the default kinds "
        "stand above.",
        "",
    ]
    for flag, kinds in (("--sparsity", KINDS), ("--remedy", REMEDIES)):
        for kind in kinds:
            options = section("train", flag, kind).options
            own = [option for option in options if (option.name, option.text) not in known]
            if own:
                lines += [f"**`{flag} {kind}`**", "", *_table(own)]
    return "\n".join(lines)


def _table(options: list[Option]) -> list[str]:
    rows = [
        f"| `{_cell(option.shown)}` | {_cell(_text(option.text))} | {_code(option.default)} |"
        for option in options
    ]
    return ["| option | what it does | default |", "|---|---|---|", *rows, ""]


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?]) ", text)[0].rstrip(".")


def _anchor(verb: str) -> str:
    return verb.replace(" ", "-")


def _text(text: str) -> str:
    """Words of the help as they stand: what looks like HTML or emphasis is neither."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = html.escape(parts[i], quote=False).replace("*", r"\*").replace("_", r"\_")
    return "`".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else ""


def on_files(files: Any, config: Any) -> Any:
    """Give mkdocs the page as if it lay in `docs/`."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files


if __name__ == "__main__":
    print(page())
