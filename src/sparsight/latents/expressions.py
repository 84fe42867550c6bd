"""A small language of conditions, for queries and filters: parsing, and one line about a typo.

```text
expression  either ("or" either)*
either      term ("and" term)*
term        "not" term | "(" expression ")" | condition
condition   operand [ comparison operand | "in" "(" operand ("," operand)* ")" ]
operand     number | "text" | word
```

Keywords may be in capitals. What an operand means is up to the language that uses the tree
(`query.py`: latents and labels; `filters.py`: columns).
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sparsight.errors import UserError
from sparsight.text import shortened

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
KEYWORDS = ("and", "or", "not", "in")
DEEPEST = 64
"""Deepest nesting of parentheses and `not`."""
AROUND = 40
"""Characters that a message shows on either side of a typo."""

Kind = Literal["number", "text", "word", "keyword", "sign", "end"]

_TOKEN = re.compile(
    r"""(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
    | (?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | (?P<word>[^\W\d]\w*)
    | (?P<sign>==|!=|>=|<=|[<>(),])""",
    re.VERBOSE | re.DOTALL,
)
_BROKEN = re.compile(r"[+-]?[\w.]+|[^\w\s]{1,2}")
_HINTS = {"=": "==", "&": "and", "&&": "and", "|": "or", "||": "or", "!": "not", "<>": "!="}


@dataclass(frozen=True)
class Token:
    """A part of an expression.

    Attributes:
        kind: what it is; "end" stands after the last one.
        written: its characters in the expression.
        place: number of characters before it.
        value: a number, or the text without quotes; a word as it is; a keyword in small letters.
    """

    kind: Kind
    written: str
    place: int
    value: float | str


@dataclass(frozen=True)
class Condition:
    """An operand alone (`comparison` is None), or compared with one operand, or `in` several."""

    subject: Token
    comparison: str | None = None
    values: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Not:
    """Holds where its term does not."""

    term: Tree


@dataclass(frozen=True)
class And:
    """Holds where all of its terms do."""

    terms: tuple[Tree, ...]


@dataclass(frozen=True)
class Or:
    """Holds where at least one of its terms does."""

    terms: tuple[Tree, ...]


Tree = Condition | Not | And | Or


@dataclass(frozen=True)
class Text:
    """An expression as it was written.

    Attributes:
        written: the characters.
        what: what it is called in messages, such as "Query".
    """

    written: str
    what: str

    def wrong(self, token: Token, found: str) -> UserError:
        """Return the error about one token: a line with its place, marked by ^ in the text."""
        start, stop = max(0, token.place - AROUND), token.place + AROUND
        before = ("…" if start else "") + self.written[start : token.place]
        after = self.written[token.place : stop] + ("…" if stop < len(self.written) else "")
        shown = " ".join(f"{before}^{after}".split())
        return UserError(f"{self.what}, character {token.place + 1}: {found} In: {shown}")

    def unexpected(self, token: Token, expected: str) -> UserError:
        """Return the error about a token that stands where something else is expected."""
        found = "the end" if token.kind == "end" else f"`{shortened(token.written)}`"
        return self.wrong(token, f"expected {expected}, found {found}.")


def parse(text: Text, operand: str) -> Tree:
    """Parse an expression.

    Args:
        text: the expression.
        operand: what a condition may begin with, in words, for messages.

    Raises:
        UserError: a typo; the message has its place, and what is expected there.
    """
    return _Parser(text, operand).whole()


def conditions(tree: Tree) -> Iterator[Condition]:
    """Yield every condition of an expression, in order."""
    match tree:
        case Condition():
            yield tree
        case Not(term):
            yield from conditions(term)
        case And(terms) | Or(terms):
            for term in terms:
                yield from conditions(term)


def close_to(name: str, known: Iterable[str]) -> str:
    """Return a guess at what a misspelt name means, as a sentence after a space, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _tokens(text: Text) -> Iterator[Token]:
    place = 0
    while True:
        place += len(text.written[place:]) - len(text.written[place:].lstrip())
        if place == len(text.written):
            yield Token("end", "", place, "")
            return
        match = _TOKEN.match(text.written, place)
        if match is None:
            raise _unreadable(text, place)
        yield _token(text, match)
        place = match.end()


def _token(text: Text, match: re.Match[str]) -> Token:
    written, place = match[0], match.start()
    if match["number"]:
        token = Token("number", written, place, float(written))
        if not math.isfinite(float(written)):
            raise text.unexpected(token, "a finite number")
        return token
    if match["text"]:
        return Token("text", written, place, re.sub(r"\\(.)", r"\1", written[1:-1]))
    if match["word"] and written.lower() in KEYWORDS:
        return Token("keyword", written, place, written.lower())
    return Token("word" if match["word"] else "sign", written, place, written)


def _unreadable(text: Text, place: int) -> UserError:
    if text.written[place] in "\"'":
        here = Token("sign", text.written[place], place, "")
        return text.wrong(here, "the text that begins here has no closing quote.")
    match = _BROKEN.match(text.written, place)
    written = match[0] if match else text.written[place]
    here = Token("sign", written, place, "")
    if written in _HINTS:
        return text.wrong(
            here, f"`{written}` is not part of the language; write `{_HINTS[written]}`."
        )
    return text.wrong(
        here, f"`{shortened(written)}` is neither a number, a name, a text in quotes nor a sign."
    )


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: Text, operand: str) -> None:
        self.text = text
        self.operand_words = operand
        self.tokens = list(_tokens(text))
        self.next = 0
        self.depth = 0

    def whole(self) -> Tree:
        tree = self.expression()
        if self.token.kind != "end":
            last = self.tokens[self.next - 1]
            alone = last.kind in ("number", "text", "word")
            more = "a comparison, " if alone and self._is_alone() else ""
            raise self.text.unexpected(self.token, f"{more}`and`, `or` or the end")
        return tree

    def _is_alone(self) -> bool:
        """Return whether the operand that was read last is a condition by itself."""
        before = self.tokens[self.next - 2] if self.next > 1 else None
        return before is None or str(before.value) not in COMPARISONS

    @property
    def token(self) -> Token:
        return self.tokens[self.next]

    def taken(self, *values: str) -> Token | None:
        """Return the next token and step over it if it is one of these signs or keywords."""
        token = self.token
        if token.kind not in ("sign", "keyword") or token.value not in values:
            return None
        self.next += 1
        return token

    def needed(self, value: str, expected: str) -> None:
        if self.taken(value) is None:
            raise self.text.unexpected(self.token, expected)

    def expression(self) -> Tree:
        terms = [self.either()]
        while self.taken("or"):
            terms.append(self.either())
        return terms[0] if len(terms) == 1 else Or(tuple(terms))

    def either(self) -> Tree:
        terms = [self.term()]
        while self.taken("and"):
            terms.append(self.term())
        return terms[0] if len(terms) == 1 else And(tuple(terms))

    def term(self) -> Tree:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.text.wrong(self.token, f"more than {DEEPEST} levels of nesting.")
        if self.taken("not"):
            tree: Tree = Not(self.term())
        elif self.taken("("):
            tree = self.expression()
            self.needed(")", "`and`, `or` or `)`")
        else:
            tree = self.condition()
        self.depth -= 1
        return tree

    def condition(self) -> Condition:
        subject = self.operand(self.operand_words)
        if self.taken("in"):
            self.needed("(", "`(` and a list of values")
            values = [self.operand("a value")]
            while self.taken(","):
                values.append(self.operand("a value"))
            self.needed(")", "`,` or `)`")
            return Condition(subject, "in", tuple(values))
        comparison = self.taken(*COMPARISONS)
        if comparison is None:
            return Condition(subject)
        sign = str(comparison.value)
        value = self.operand(f"a value after `{sign}`")
        return Condition(subject, sign, (value,))

    def operand(self, expected: str) -> Token:
        token = self.token
        if token.kind not in ("number", "text", "word"):
            raise self.text.unexpected(token, expected)
        self.next += 1
        return token
