"""The output of `--help`, which begins with examples, and the one line about a wrong option."""

from __future__ import annotations

import difflib
import re
import shutil
import textwrap
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tyro

ASKS = ("-h", "--help", "--help-all")
WIDEST = 100
NAME_COLUMN = 26
SHARED = "options of most verbs"

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# tyro draws a box; if standard output is not UTF-8, only rules below the title and the parts.
_BOX = re.compile(r"^│?\s*|\s*│?$")
_BORDER = re.compile(r"^[╭╰].*[╮╯]$")
_RULER = re.compile(r"^│?\s*[─-]{8,}\s*│?$")
_DEFAULT = re.compile(r"\s*\((default: (?P<value>.*)|required)\)$", re.DOTALL)

_WORDS = {
    r"^Error parsing ": "",
    r"Could not find valid parse for arguments: ": "expected a number, not ",
    r"no type matching .*? from (\[.*?\]).*": r"expected a number, not \1",
    r"could not convert string to float: ": "expected a number, not ",
}


@dataclass(frozen=True)
class Help:
    """What the help of a verb shows in addition to its options.

    Attributes:
        examples: complete command lines, without `sparsight VERB`.
        needed: options that most calls give, shown first; options without a default always are.
        common: other options that `--help` shows; `--help-all` shows the rest. Empty: all of them.
    """

    examples: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    common: tuple[str, ...] = ()


@dataclass(frozen=True)
class Option:
    """One option as the help shows it."""

    name: str
    """The name without dashes: `n-vectors`."""
    shown: str
    """The name with dashes, and the type of its value: `--n-vectors INT`."""
    text: str
    default: str
    required: bool
    group: str


def parser_of(cls: type, verb: str, default: Any) -> Any:
    """Return the options of a dataclass as a parser of tyro's own copy of argparse.

    None if tyro no longer exports it; tyro's own help is then shown.
    """
    export = getattr(tyro.extras, "get_parser", None)
    if export is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return export(
            cls, prog=f"sparsight {verb}", default=default, config=(tyro.conf.AvoidSubcommands,)
        )


def options_of(parser: Any) -> list[Option]:
    """Return every option of a parser, in order, positional arguments first."""
    options = [
        _option(action, group.title or "options")
        for group in parser._action_groups
        for action in group._group_actions
        if "--help" not in action.option_strings
    ]
    return sorted(options, key=lambda option: option.shown.startswith("-"))


def render(
    parser: Any,
    verb: str,
    helped: Help,
    *,
    last: Collection[str] = (),
    whole: bool = False,
) -> str:
    """Return the help of a verb.

    Args:
        parser: its options.
        verb: its name.
        helped: examples, and which options come first.
        last: names of the options that other verbs share; they come after the verb's own.
        whole: show every option, not only the common ones.
    """
    width = min(shutil.get_terminal_size((80, 24)).columns, WIDEST)
    options = [
        replace(option, group=SHARED) if option.name in last else option
        for option in options_of(parser)
    ]
    first = [option for option in options if option.required or option.name in helped.needed]
    rest = [option for option in options if option not in first]
    shown = [o for o in rest if whole or not helped.common or o.name in helped.common]
    lines = [_usage(verb, first, width), "", *_paragraphs(parser.description or "", width)]
    if helped.examples:
        lines += ["", "examples:"]
        lines += [f"  sparsight {verb} {example}" for example in helped.examples]
    if first:
        lines += ["", "needed:", *_table(first, width)]
    groups = sorted(dict.fromkeys(option.group for option in shown), key=SHARED.__eq__)
    about = {group.title: group.description for group in parser._action_groups}
    for group in groups:
        members = [option for option in shown if option.group == group]
        lines += ["", f"{group}:"]
        if whole and about.get(group):
            lines += textwrap.wrap(str(about[group]).split("\n\n")[0], width, initial_indent="  ")
        lines += _table(members, width)
    if len(shown) < len(rest):
        more = f"`sparsight {verb} --help-all` shows {len(rest) - len(shown)} more options."
        lines += ["", more]
    return "\n".join(lines)


def wrong_option(verb: str, printed: str, known: Sequence[str]) -> str:
    """Return one line from the box that tyro draws about a wrong command line.

    Args:
        verb: its name.
        printed: tyro's output.
        known: every option of the verb, with dashes.
    """
    rows = [_COLOUR.sub("", row).strip() for row in printed.splitlines()]
    boxed = any(_BORDER.match(row) for row in rows)
    inner = [row for row in rows if not _BORDER.match(row)] if boxed else rows[2:]
    parts = "\n".join("─" if _RULER.match(row) else _BOX.sub("", row) for row in inner).split("─")
    texts = [" ".join(part.split()) for part in parts]
    words: list[str] = []
    for part, text in zip(parts, texts, strict=True):
        if "Missing from" in part:
            named = [row.split()[0] for row in part.splitlines() if row.startswith(("--", "["))]
            words.append(f"missing {_listed(named or [text])}")
        elif "Unrecognized options" in part:
            tokens = re.split(r"[,\s]+", text.split("Unrecognized options:")[-1].strip())
            words.append(_unknown(tokens, known))
    if not words:
        plain = [text for text in texts if text and "full helptext" not in text]
        words.append(_lower(_reworded(plain[0])) if plain else "wrong option")
    ending = "" if words[-1].endswith((".", "?")) else "."
    return f"{verb}: {'; '.join(words)}{ending} `sparsight {verb} --help` lists the options."


def _option(action: Any, group: str) -> Option:
    match = _DEFAULT.search(action.help or "")
    text = (action.help or "")[: match.start()] if match else action.help or ""
    value = (match["value"] or "") if match else ""
    takes = action.metavar if isinstance(action.metavar, str) else ""
    takes = re.sub(r"\{None\}\|", "", takes).replace("{None,", "{")
    takes = re.sub(r"^\[+(\{?[^\[\]]+\}?) \[.*\]+$", r"\1 …", takes).strip("[]")
    names = [name for name in action.option_strings if name.startswith("--")]
    if takes:
        names = names[-1:]  # an option's older names, which are still read, come first
    name = names[0].removeprefix("--") if names else action.dest
    flag, takes = (names[0], takes) if names else (name.upper(), "")
    if len(names) == 2:  # a pair: on and off
        *above, last = name.split(".")
        flag = "--" + ".".join([*above, f"[no-]{last}"]) if value == "True" else flag
        value, takes = "on" if value == "True" else "", ""
    value = "" if value in ("None", "False", "''") else value
    return Option(
        name=name,
        shown=f"{flag} {takes}".strip(),
        text=" ".join(text.split()),
        default=value,
        required=action.required and "(required)" in (action.help or ""),
        group="options" if group == "positional arguments" else group,
    )


def _usage(verb: str, first: list[Option], width: int) -> str:
    parts = [option.shown for option in first]
    return "\n".join(
        textwrap.wrap(
            f"usage: sparsight {verb} {' '.join([*parts, '[options]'])}",
            width,
            subsequent_indent="       ",
            break_on_hyphens=False,
            break_long_words=False,
        )
    )


def _paragraphs(text: str, width: int) -> list[str]:
    wrapped = [textwrap.fill(" ".join(part.split()), width) for part in text.split("\n\n")]
    return "\n\n".join(wrapped).splitlines()


def _table(options: Sequence[Option], width: int) -> list[str]:
    lines: list[str] = []
    for option in options:
        text = option.text + (f" [{option.default}]" if option.default else "")
        wrapped = textwrap.wrap(text, width - NAME_COLUMN - 2, break_on_hyphens=False) or [""]
        if len(option.shown) > NAME_COLUMN - 2:
            lines.append(f"  {option.shown}")
        else:
            lines.append(f"  {option.shown:<{NAME_COLUMN}}{wrapped.pop(0)}".rstrip())
        lines += [" " * (NAME_COLUMN + 2) + line for line in wrapped]
    return lines


def _unknown(tokens: list[str], known: Sequence[str]) -> str:
    flags = [token for token in tokens if token.startswith("-")] or tokens
    kind = "option" if flags[0].startswith("-") else "argument"
    text = f"unknown {kind}{'s' * (len(flags) > 1)} {_listed(flags)}"
    close = difflib.get_close_matches(flags[0].split("=")[0], known, n=1)
    return f"{text}; did you mean {close[0]}?" if close else text


def _reworded(text: str) -> str:
    """Reword tyro's message about a value, without Python's terms for numbers."""
    for pattern, words in _WORDS.items():
        text = re.sub(pattern, words, text)
    return text


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
